"""Distributions over the paths of a chain: the one dynamic program of HMMs, random fields, CTC and transducers.

A path takes one of S states at each step. Its score is a sum of log potentials, here of one document of T steps:

    score(z) = start[z_1] + Σ_t emission[t, z_t] + Σ_{t<T} transition[z_t, z_{t+1}] + end[z_T]

and its probability `exp(score(z) - log_partition)`:

    log_partition, total            the sum over all paths, in logs, or in any semiring
    marginals, pair_marginals       the probabilities of states and of transitions
    expectation, entropy            the mean of other numbers along a path, and of -log p
    best_path, best_paths           the path of the highest score, the k best
    sample_path, path_score         a path drawn at random, the score of a given one

All functions take a `mask` (a step off it is as if it were not
there: the path goes on from the one before) and `reset` (a new document begins before that step, with `start`), with
the meaning they have in `unroll`. A row without steps has one path, the empty one, of score 0.

`parallel=True` combines the steps as a tree (`lax.associative_scan`), O(log T) deep, for O(T S³) operations instead of
O(T S²): Särkkä and García-Fernández, Temporal Parallelization of Bayesian Smoothers, 2021, arXiv:1905.13002. Both forms
keep long products near 1, so that 10,000 steps in float32 neither overflow nor lose what is normalised.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors
from jaxseq.structured import passes, semirings
from jaxseq.structured.banded import Band as Band
from jaxseq.structured.passes import Parts
from jaxseq.structured.semirings import LOG, MAX, Semiring


class Chain(NamedTuple):
    """Log potentials of paths, `-inf` where something is impossible.

    `transition[..., i, j]` is that from state i to state j, or a `Band`: the same at all steps, `[state, state]` or
    one a row, `[*batch, state, state]`, or `[*batch, time, state, state]`, of which entry t leads out of step t (what
    leads out of the last step of a document is not read). `start` and `end` may be one for all rows; no `end` is 0.
    """

    start: Float[Array, "*batch state"]
    transition: Float[Array, "... state state"] | Band
    emission: Float[Array, "*batch time state"]
    end: Float[Array, "*batch state"] | None = None


class Path(NamedTuple):
    """States, 0 off the mask, and the score of the whole path."""

    states: Int[Array, "*batch time"]
    score: Float[Array, "*batch"]


def total(
    semiring: Semiring,
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Float[Array, "*batch"]:
    """The sum over all paths, in a semiring, of the products of their potentials; documents of a row are multiplied.

    Elements of `best(k)` have their axis first, `[k, *batch]`; of several documents those of equal rank are multiplied.
    Gradients in `MAX` mean nothing where no path is possible, those in `COUNT` are 0.

    >>> chain = Chain(jnp.zeros(3), jnp.zeros((3, 3)), jnp.zeros((2, 3)))
    >>> total(semirings.COUNT, chain).item()
    9.0
    """
    parts = _checked("total", chain, mask, reset)
    return _log_partition(parts, parallel) if semiring is LOG else passes.forward(semiring, parallel, *parts).total


def log_partition(
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Float[Array, "*batch"]:
    """`log Σ_z exp(score(z))`, of all documents of a row together; -inf if one has no possible path.

    The gradients in the potentials of that document are 0, those in the others as they are without it.
    Its gradients are the expected numbers of times that a potential is used. Memory O(T S), also for the gradient.

    >>> chain = Chain(jnp.zeros(3), jnp.zeros((3, 3)), jnp.zeros((2, 3)))
    >>> print(jnp.exp(log_partition(chain)).round(3))
    9.0
    """
    return _log_partition(_checked("log_partition", chain, mask, reset), parallel)


def marginals(
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Float[Array, "*batch time state"]:
    """The probability of each state at each step, given all steps; 0 off the mask, and where no path is possible.

    >>> chain = Chain(jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.full((2, 2), 0.5)), jnp.zeros((2, 2)))
    >>> marginals(chain).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """

    chain = _arrays("marginals", chain)

    def of_emission(emission):
        return _log_partition(_checked("marginals", chain._replace(emission=emission), mask, reset), parallel).sum()

    return jax.grad(of_emission)(chain.emission)


def pair_marginals(
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Any:
    """The probability of each transition out of each step `[*batch, time, state, state]`, or a `Band` of them.

    It is 0 out of the last step of a document and off the mask. For the sums over all steps, the expected counts, take
    the gradient of `log_partition` with regard to `transition`: it needs no array of all steps.
    """
    name, chain = "pair_marginals", _arrays("pair_marginals", chain)
    _checked(name, chain, mask, reset)
    nothing = jnp.zeros_like(chain.emission[..., :1, None])  # placed on devices as the rows are

    def each_step(weights):
        return weights if weights.ndim > chain.emission.ndim else weights[..., None, :, :] + nothing

    def of_transition(transition):
        return _log_partition(_checked(name, chain._replace(transition=transition), mask, reset), parallel).sum()

    return jax.grad(of_transition)(jax.tree.map(each_step, chain.transition))


def expectation(
    chain: Chain,
    values: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Float[Array, "*batch"]:
    """The mean, over paths of the chain, of the sum of other numbers along the path: `values`, shaped as the chain.

    It is the derivative of the log-partition in the direction of the values (Eisner, Inside-Outside and
    Forward-Backward Algorithms Are Just Backprop, 2016, https://aclanthology.org/W16-5901).

    >>> chain = Chain(jnp.zeros(2), jnp.zeros((2, 2)), jnp.zeros((3, 2)))
    >>> ones = Chain(jnp.zeros(2), jnp.zeros((2, 2)), jnp.array([[0.0, 1.0]] * 3))  # how often state 1 is taken
    >>> expectation(chain, ones).item()
    1.5
    """

    chain = _arrays("expectation", chain)
    if jax.tree.structure(chain) != jax.tree.structure(values):
        raise ValueError(f"expectation needs values with the parts of the chain, got {errors.shape_of(values)}.")

    def of(chain):
        return _log_partition(_checked("expectation", chain, mask, reset), parallel)

    def direction(value, like):
        value = jnp.asarray(value, like.dtype)
        axes = zip(reversed(value.shape), reversed(like.shape), strict=False)
        if value.ndim > like.ndim or any(own not in (1, wanted) for own, wanted in axes):
            raise ValueError(f"expectation needs values of the shapes of the chain: {like.shape}, not {value.shape}.")
        return jnp.broadcast_to(value, like.shape)

    return jax.jvp(of, (chain,), (jax.tree.map(direction, values, chain),))[1]


def entropy(
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Float[Array, "*batch"]:
    """The entropy in nats of the distribution over paths, `log_partition - E[score]`; 0 where no path is possible.

    >>> print(entropy(Chain(jnp.zeros(2), jnp.zeros((2, 2)), jnp.zeros((3, 2)))).round(3))  # 3 ln 2
    2.079
    """
    given = _checked("entropy", chain, mask, reset)
    # without what all paths share: else the entropy would be the small difference of two large numbers
    potentials = {
        "start": _centred(given.start, 1),
        "transition": jax.tree.map(lambda weights: _centred(weights, 2), given.transition),
        "emission": _centred(given.emission, 1),
        "end": _centred(given.end, 1),
    }

    def of(potentials):
        return _log_partition(given._replace(**potentials), parallel)

    scores = jax.tree.map(lambda score: jnp.where(jnp.isneginf(score), 0, score), potentials)
    log_z, mean = jax.jvp(of, (potentials,), (scores,))
    return jnp.where(jnp.isneginf(log_z), 0, log_z - mean)


def best_path(
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Path:
    """The path of the highest score (Viterbi, 1967, doi:10.1109/TIT.1967.1054010).

    Of equal ones that with the smaller state at the last step in which they differ. The score is -inf, and the states
    mean nothing, if no path is possible.

    >>> chain = Chain(jnp.zeros(2), jnp.array([[0.0, -5.0], [-5.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> path = best_path(chain)
    >>> path.states.tolist(), path.score.item()
    ([0, 0], 2.0)
    """

    given = _checked("best_path", chain, mask, reset)
    forward = passes.forward(MAX, parallel, *given)
    return Path(passes.walk(_largest, parallel, forward.states[:, None], None, 0, *given), forward.total)


def best_paths(
    chain: Chain,
    k: int,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Path:
    """The k best paths, the best first: `states` `[k, *batch, time]` and their scores `[k, *batch]`.

    Where there are fewer, the scores of the others are -inf. Of a row of several documents, path r takes the r-th best
    of each. (List Viterbi: Seshadri and Sundberg, 1994, doi:10.1109/26.275301.)

    >>> chain = Chain(jnp.array([0.0, -1.0]), jnp.zeros((2, 2)), jnp.zeros((1, 2)))
    >>> best_paths(chain, 3).score.tolist()
    [0.0, -1.0, -inf]
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"best_paths needs k >= 1, a static number, got {k!r}.")

    given = _checked("best_paths", chain, mask, reset)
    forward = passes.forward(semirings.best(k), parallel, *given)
    walk = functools.partial(passes.walk, _ranked(k), parallel, forward.states, None)
    paths = jax.vmap(lambda rank: walk(rank, *given))(jnp.arange(k))
    return Path(paths, forward.total)


def sample_path(
    key: Array,
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Path:
    """A path drawn with its probability, for each row; `jax.vmap` over keys draws several and reads forward once.

    Forward filtering, backward sampling (Scott, Bayesian Methods for Hidden Markov Models, 2002,
    doi:10.1198/016214502753479464). Where no path is possible the score is -inf, and the states mean nothing.

    >>> chain = Chain(jnp.zeros(2), jnp.zeros((2, 2)), jnp.zeros((3, 2)))
    >>> keys = jax.random.split(jax.random.key(0), 10)
    >>> jax.vmap(lambda key: sample_path(key, chain))(keys).states.shape
    (10, 3)
    """
    errors.check_key("sample_path", key)

    given = _checked("sample_path", chain, mask, reset)
    forward = passes.forward(LOG, parallel, *given)
    keys = jax.random.split(key, len(given.emission))
    states = passes.walk(_drawn, parallel, forward.states[:, None], keys, 0, *given)
    return Path(states, path_score(chain, states, mask, reset=reset))


def _largest(key, scores, rank):
    return scores.argmax(axis=-1)


@functools.lru_cache
def _ranked(k):
    def pick(key, scores, rank):
        return jnp.take_along_axis(lax.top_k(scores, k)[1], rank[..., None], axis=-1)[..., 0]

    return pick


def _drawn(key, scores, rank):
    return jax.random.categorical(key, scores, axis=-1)


@functools.partial(jax.jit, inline=True)
def path_score(
    chain: Chain,
    states: Int[Array, "*batch time"],
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
) -> Float[Array, "*batch"]:
    """The score of a path, without a loop; `path_score - log_partition` is its log-probability.

    A state outside [0, S) gives NaN.

    >>> chain = Chain(jnp.zeros(2), jnp.array([[0.0, -5.0], [-5.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 1.0]]))
    >>> path_score(chain, jnp.array([0, 1])).item()
    -2.0
    """
    parts = _checked("path_score", chain, mask, reset)
    states = jnp.asarray(states)
    time, *batch, _ = parts.emission.shape
    if not jnp.issubdtype(states.dtype, jnp.integer) or states.shape != (*batch, time):
        raise ValueError(
            f"path_score needs integer states [*batch, time] = {(*batch, time)}, got {errors.shape_of(states)}."
        )
    states = jnp.moveaxis(states.astype(int), -1, 0)
    keep, places = parts.flags()
    following = jnp.take_along_axis(states, jnp.minimum(places.following, len(states) - 1), axis=0)

    def at(potentials, index):
        size = potentials.shape[-1]
        inside = (index >= 0) & (index < size)
        taken = jnp.take_along_axis(potentials, jnp.clip(index, 0, size - 1)[..., None], axis=-1)[..., 0]
        return jnp.where(inside, taken, jnp.nan)

    def each_step(potentials):
        return jnp.broadcast_to(potentials, (len(states), *potentials.shape))

    column = jax.vmap(passes.column, in_axes=(None if parts.split()[0] is None else 0, 0))
    onward = at(column(parts.transition, following), states)
    score = at(parts.emission, states) + jnp.where(places.last, at(each_step(parts.end), states), onward)
    score += jnp.where(places.first, at(each_step(parts.start), states), 0)
    return jnp.where(keep, score, 0).sum(axis=0)


def _wide(array):
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"A Chain needs floating log potentials, got {errors.shape_of(array)}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _arrays(name, chain) -> Chain:
    """The potentials as arrays of at least float32."""
    if not isinstance(chain, Chain):
        raise TypeError(f"{name} needs a Chain(start, transition, emission), got {errors.shape_of(chain)}.")
    start, transition, emission, end = chain
    transition = Band(_wide(transition.weights)) if isinstance(transition, Band) else _wide(transition)
    return Chain(_wide(start), transition, _wide(emission), None if end is None else _wide(end))


def _checked(name, chain, mask, reset) -> Parts:
    chain = _arrays(name, chain)
    dtype = jnp.result_type(*jax.tree.leaves(chain))
    start, transition, emission, end = jax.tree.map(lambda array: array.astype(dtype), chain)
    if emission.ndim < 2 or emission.shape[-1] == 0:
        raise ValueError(f"{name} needs emission [*batch, time, state], got shape {emission.shape}.")
    *batch, time, states = emission.shape
    for flags, what in ((mask, "mask"), (reset, "reset")):
        if flags is not None:
            errors.check_flags(name, flags, what, (*batch, time))
    end = jnp.zeros_like(start) if end is None else end
    for what, part in (("start", start), ("end", end)):
        if part.shape not in ((states,), (*batch, states)):
            raise ValueError(
                f"{name} needs {what} [state] or [*batch, state] = {(*batch, states)}, got shape {part.shape}."
            )
    banded = isinstance(transition, Band)
    weights, side = (transition.weights, "moves") if banded else (transition, "state")
    sides = (max(weights.shape[-2], 1) if banded and weights.ndim > 1 else states, states)
    if weights.shape not in (sides, (*batch, *sides), (*batch, time, *sides)):
        raise ValueError(
            f"{name} needs transition [{side}, state], [*batch, {side}, state] or [*batch, time, {side}, state], the "
            f"last two or three axes {(time, *sides)} here, got shape {weights.shape}."
        )
    return passes.parts_of(start, transition, emission, end, mask, reset)


def _centred(potentials, axes):
    """Potentials less the largest along the last `axes`."""
    largest = lax.stop_gradient(potentials.max(axis=tuple(range(-axes, 0)), keepdims=True))
    return potentials - jnp.where(jnp.isneginf(largest), 0, largest)


def _log_partition(parts: Parts, parallel: bool) -> Float[Array, "*batch"]:
    if isinstance(parts.transition, Band) and not parallel:
        return passes.banded_log_partition(*parts)
    return passes.forward(LOG, parallel, *parts).total
