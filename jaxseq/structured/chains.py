"""Distributions over the paths of a chain: the one dynamic program of HMMs, random fields, CTC and transducers.

A path takes one of S states at each step. Its score is a sum of log potentials, here of one document of T steps:

    score(z) = start[z_1] + Σ_t emission[t, z_t] + Σ_{t<T} transition[z_t, z_{t+1}] + end[z_T]

and its probability `exp(score(z) - log_partition)`. All functions take a `mask` (a step off it is as if it were not
there: the path goes on from the one before) and `reset` (a new document begins before that step, with `start`), with
the meaning they have in `unroll`. A row without steps has one path, the empty one, of score 0.

`parallel=True` combines the steps as a tree (`lax.associative_scan`), O(log T) deep, for O(T S³) operations instead of
O(T S²): Särkkä and García-Fernández, Temporal Parallelization of Bayesian Smoothers, 2021, arXiv:1905.13002. Both forms
keep long products near 1, so that 10,000 steps in float32 neither overflow nor lose what is normalised.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks, sharding
from jaxseq.core.unroll import scan_from_fresh
from jaxseq.structured import banded, semirings
from jaxseq.structured.semirings import LOG, MAX, Semiring


class Band(NamedTuple):
    """Transitions that move up by 0 to K - 1 states: `weights[..., k, j]` is that from state j - k to state j.

    What would begin below state 0 is not read. The alignments of CTC and of transducers are such.
    """

    weights: Float[Array, "... moves state"]


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

    >>> chain = Chain(jnp.zeros(3), jnp.zeros((3, 3)), jnp.zeros((2, 3)))
    >>> total(semirings.COUNT, chain).item()
    9.0
    """
    parts = _checked("total", chain, mask, reset)
    if semiring is LOG and isinstance(parts.transition, Band) and not parallel:
        return _banded_log_partition(*parts)
    return _forward(semiring, parallel, *parts).total


def log_partition(
    chain: Chain,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    parallel: bool = False,
) -> Float[Array, "*batch"]:
    """`log Σ_z exp(score(z))`, of all documents of a row together; -inf, with gradients of 0, if no path is possible.

    Its gradients are the expected numbers of times that a potential is used. Memory O(T S), also for the gradient.

    >>> chain = Chain(jnp.zeros(3), jnp.zeros((3, 3)), jnp.zeros((2, 3)))
    >>> print(jnp.exp(log_partition(chain)).round(3))
    9.0
    """
    return total(LOG, chain, mask, reset=reset, parallel=parallel)


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

    def of_emission(emission):
        return log_partition(chain._replace(emission=emission), mask, reset=reset, parallel=parallel).sum()

    return jax.grad(of_emission)(_wide(chain.emission))


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
    nothing = jnp.zeros_like(chain.emission[..., :1, None])  # placed on devices as the rows are

    def each_step(weights):
        if weights.ndim > chain.emission.ndim:
            return weights
        return weights[..., None, :, :] + nothing

    def of_transition(transition):
        return log_partition(chain._replace(transition=transition), mask, reset=reset, parallel=parallel).sum()

    return jax.grad(of_transition)(jax.tree.map(lambda weights: each_step(_wide(weights)), chain.transition))


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

    def of(chain):
        return log_partition(chain, mask, reset=reset, parallel=parallel)

    chain = jax.tree.map(_wide, chain)
    if jax.tree.structure(chain) != jax.tree.structure(values):
        raise ValueError(f"expectation needs values with the parts of the chain, got {errors.shape_of(values)}.")
    values = jax.tree.map(lambda value, like: jnp.broadcast_to(value, like.shape).astype(like.dtype), values, chain)
    return jax.jvp(of, (chain,), (values,))[1]


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
    scores = jax.tree.map(lambda score: jnp.where(jnp.isneginf(score), 0, score), chain)
    log_z = log_partition(chain, mask, reset=reset, parallel=parallel)
    mean = expectation(chain, scores, mask, reset=reset, parallel=parallel)
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

    def pick(key, scores, rank):
        return scores.argmax(axis=-1)

    given = _checked("best_path", chain, mask, reset)
    forward = _forward(MAX, parallel, *given)
    return Path(_walk(pick, parallel, forward.states[:, None], None, 0, *given), forward.total)


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

    def pick(key, scores, rank):
        return jnp.take_along_axis(lax.top_k(scores, k)[1], rank[..., None], axis=-1)[..., 0]

    given = _checked("best_paths", chain, mask, reset)
    forward = _forward(semirings.best(k), parallel, *given)
    walk = functools.partial(_walk, pick, parallel, forward.states, None)
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
    """
    errors.check_key("sample_path", key)

    def pick(key, scores, rank):
        return jax.random.categorical(key, scores, axis=-1)

    given = _checked("sample_path", chain, mask, reset)
    forward = _forward(LOG, parallel, *given)
    keys = jax.random.split(key, chain.emission.shape[-2])
    states = _walk(pick, parallel, forward.states[:, None], keys, 0, *given)
    return Path(states, path_score(chain, states, mask, reset=reset))


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
    if not jnp.issubdtype(states.dtype, jnp.integer) or states.shape != chain.emission.shape[:-1]:
        raise ValueError(
            f"path_score needs integer states [*batch, time] = {chain.emission.shape[:-1]}, got "
            f"{errors.shape_of(states)}."
        )
    states = jnp.moveaxis(states.astype(int), -1, 0)
    keep, places = _flags(parts)
    following = jnp.take_along_axis(states, jnp.minimum(places.following, len(states) - 1), axis=0)

    def at(potentials, index):
        size = potentials.shape[-1]
        inside = (index >= 0) & (index < size)
        taken = jnp.take_along_axis(potentials, jnp.clip(index, 0, size - 1)[..., None], axis=-1)[..., 0]
        return jnp.where(inside, taken, jnp.nan)

    def each_step(potentials):
        return jnp.broadcast_to(potentials, (len(states), *potentials.shape))

    column = jax.vmap(_column, in_axes=(None if parts.split()[0] is None else 0, 0))
    onward = at(column(parts.transition, following), states)
    score = at(parts.emission, states) + jnp.where(places.last, at(each_step(parts.end), states), onward)
    score += jnp.where(places.first, at(each_step(parts.start), states), 0)
    return jnp.where(keep, score, 0).sum(axis=0)


class _Parts(NamedTuple):
    """A chain that was checked: time first, at least float32, nothing behind the mask, axes of a batch everywhere."""

    start: Float[Array, "*batch state"]
    transition: Any  # [time?, *batch or ones, from, to], or a Band
    emission: Float[Array, "time *batch state"]
    end: Float[Array, "*batch state"]
    keep: Bool[Array, "time *batch"] | None
    reset: Bool[Array, "time *batch"] | None

    def split(self) -> tuple[Any, Any]:
        """The transitions that vary from step to step, and those that do not: one of them is None."""
        varying = jax.tree.leaves(self.transition)[0].ndim > self.emission.ndim
        return (self.transition, None) if varying else (None, self.transition)


def _flags(parts):
    """The mask, all True without one, and where in it documents begin and end."""
    keep = jnp.ones_like(parts.emission[..., 0], bool) if parts.keep is None else parts.keep
    places = masks.places(keep.shape, parts.keep, parts.reset, axis=0)
    return keep, sharding.placed(places, jax.typeof(keep).sharding.spec)


def _wide(array):
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"A Chain needs floating log potentials, got {errors.shape_of(array)}.")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _checked(name, chain, mask, reset) -> _Parts:
    if not isinstance(chain, Chain):
        raise TypeError(f"{name} needs a Chain(start, transition, emission), got {errors.shape_of(chain)}.")
    chain = jax.tree.map(_wide, chain)
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
    nothing = jnp.zeros_like(emission.sum(axis=-2))  # placed on devices as the rows are
    start, end = (jnp.broadcast_to(part, (*batch, states)) + nothing for part in (start, end))
    banded = isinstance(transition, Band)
    weights = transition.weights if banded else transition
    sides = (weights.shape[-2] if banded and weights.ndim > 1 else states, states)
    if weights.shape not in (sides, (*batch, *sides), (*batch, time, *sides)):
        raise ValueError(
            f"{name} needs transition [state, state], [*batch, state, state] or [*batch, time, state, state], the last "
            f"two or three axes {(time, *sides)} here, got shape {weights.shape}."
        )
    varying = weights.ndim > emission.ndim
    emission, weights = jnp.moveaxis(emission, -2, 0), jnp.moveaxis(weights, -3, 0) if varying else weights
    if not varying:
        weights = jnp.expand_dims(weights, tuple(range(emission.ndim - weights.ndim)))
    keep, reset = (None if flags is None else jnp.moveaxis(jnp.asarray(flags), -1, 0) for flags in (mask, reset))
    if keep is not None:
        emission = masks.zero_unless(keep, emission)
        weights = masks.zero_unless(keep, weights) if varying else weights
    return _Parts(start, Band(weights) if banded else weights, emission, end, keep, reset)


class _Forward(NamedTuple):
    """The sums over paths that end in each state at each step, up to a factor a step; and over all whole paths."""

    states: Float[Array, "time ..."]
    total: Float[Array, "..."]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(semiring: Semiring, parallel: bool, *parts: Any) -> _Forward:
    p = _Parts(*parts)
    last = _flags(p)[1].last
    states, scale = (_tree if parallel and len(p.emission) else _loop)(semiring, p, last)

    def whole(states, last):  # the sum over the states of the last step of a document
        sums = semiring.sum(semiring.times(states, semiring.lift(p.end)), -1)
        return _select(semiring, last, sums, jnp.full_like(sums, semiring.one))

    product = semiring.product(jax.vmap(whole)(states, last), 0)
    empty = semiring.sum(semiring.lift(jnp.zeros_like(p.start[..., :1])), -1)
    product = _select(semiring, last.any(axis=0), product, empty)
    return _Forward(states, semiring.times(product, semiring.lift(scale)) if semiring.scaled else product)


@jax.jit
def _banded_log_partition(*parts: Any) -> Float[Array, "*batch"]:
    p = _Parts(*parts)
    potentials = banded.Potentials(p.start, p.transition.weights, p.emission, p.end)
    return banded.log_partition(potentials, banded.Flags(p.keep, p.reset, _flags(p)[1].last))


def _select(semiring, flags, chosen, otherwise):
    """`masks.select` where elements may have an axis in front."""
    if semiring.ranks is None:
        return masks.select(flags, chosen, otherwise)
    return jax.vmap(masks.select, in_axes=(None, 0, 0))(flags, chosen, otherwise)


def _rescaled(semiring, elements, axes):
    """Elements divided by the largest along the last `axes`, and the log of what they were divided by, `[*batch]`."""
    first = elements if semiring.ranks is None else elements[0]
    last = tuple(range(-axes, 0))
    if not semiring.scaled:
        return elements, jnp.zeros_like(first.sum(axis=last))
    largest = lax.stop_gradient(first.max(axis=last))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    return semiring.times(elements, semiring.lift(jnp.expand_dims(-largest, last))), largest


def _padded(semiring, elements):
    """Elements with all the ranks of the semiring."""
    return semiring.sum(elements[..., None], -1)


def _loop(semiring: Semiring, p: _Parts, last: Array) -> tuple[Array, Array]:
    """Step by step; the carry is the sum over paths that arrive in each state, before its emission."""
    start = _padded(semiring, semiring.lift(p.start))
    varying, constant = p.split()

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(arriving, inputs):
        emission, transition, keep, reset = inputs
        if reset is not None:
            arriving = _select(semiring, reset, start, arriving)
        here, scale = _rescaled(semiring, semiring.times(arriving, semiring.lift(emission)), 1)
        moved = semiring.sum(_moved(semiring, here, transition if constant is None else constant), -2)
        if keep is not None:
            moved, scale = _select(semiring, keep, moved, arriving), masks.zero_unless(keep, scale)
        return moved, (here, scale)

    xs = (p.emission, varying, p.keep, p.reset)
    _, (states, scales) = scan_from_fresh(lax.scan, step, start, xs, len(p.emission), False)
    return states, scales.sum(axis=0)


def _tree(semiring: Semiring, p: _Parts, last: Array) -> tuple[Array, Array]:
    """As a tree of products of matrices; from a fresh start on, all rows of a product are what arrives from `start`."""
    start = _padded(semiring, semiring.lift(p.start))
    varying, constant = p.split()
    count = p.emission.shape[-1]
    stay = jnp.where(jnp.eye(count, dtype=bool), 0.0, -jnp.inf).astype(p.emission.dtype)
    fresh = lax.broadcasted_iota(int, last.shape, 0) == 0
    if p.reset is not None:
        fresh |= p.reset

    def element(emission, transition, keep, fresh):
        transition = _dense(transition if constant is None else constant)
        lifted = semiring.times(semiring.lift(emission[..., :, None]), semiring.lift(transition))
        matrix = _padded(semiring, lifted)
        if keep is not None:
            held = _padded(semiring, semiring.lift(jnp.broadcast_to(stay, (*emission.shape, count))))
            matrix = _select(semiring, keep, matrix, held)
        begun = jnp.broadcast_to(semirings.matmul(semiring, start[..., None, :], matrix), matrix.shape)
        return _rescaled(semiring, _select(semiring, fresh, begun, matrix), 2)

    def combine(earlier, later):
        (a, scale_a, fresh_a), (b, scale_b, fresh_b) = earlier, later
        product, scale = _rescaled(semiring, semirings.matmul(semiring, a, b), 2)
        scale = scale_b + masks.zero_unless(~fresh_b, scale_a + scale)
        return _select(semiring, fresh_b, b, product), scale, fresh_a | fresh_b

    matrices, scales = jax.vmap(element)(p.emission, varying, p.keep, fresh)
    matrices, scales, _ = lax.associative_scan(jax.vmap(combine), (matrices, scales, fresh))

    def here(arriving, scale, fresh, emission):
        arriving = _select(semiring, fresh, start, arriving)
        states, rescale = _rescaled(semiring, semiring.times(arriving, semiring.lift(emission)), 1)
        return states, masks.zero_unless(~fresh, scale) + rescale

    def from_before(after):  # what stood after the step before; nothing reads what is before the first
        return jnp.concatenate([jnp.zeros_like(after[:1]), after[:-1]])

    states, scales = jax.vmap(here)(from_before(matrices[..., 0, :]), from_before(scales), fresh, p.emission)
    return states, masks.zero_unless(last, scales).sum(axis=0)


def _moved(semiring, states, transition):
    """The products of what is in each state with its transitions, `[..., from, to]` or `[..., moves, to]`."""
    if not isinstance(transition, Band):
        return semiring.times(states[..., :, None], semiring.lift(transition))
    unchanged = [(0, 0)] * (states.ndim - 1)
    moves, count = transition.weights.shape[-2:]
    shifted = [jnp.pad(states, [*unchanged, (k, 0)], constant_values=semiring.zero)[..., :count] for k in range(moves)]
    return semiring.times(jnp.stack(shifted, axis=-2), semiring.lift(transition.weights))


def _dense(transition):
    """Transitions as matrices."""
    if not isinstance(transition, Band):
        return transition
    *leading, moves, count = transition.weights.shape
    move = jnp.arange(count) - jnp.arange(count)[:, None]
    index = jnp.broadcast_to(jnp.clip(move, 0, moves - 1), (*leading, count, count))
    taken = jnp.take_along_axis(transition.weights, index, axis=-2)
    return jnp.where(jnp.broadcast_to((move >= 0) & (move < moves), taken.shape), taken, -jnp.inf)


def _column(transition, state):
    """The transitions from each state to one, `[..., from]`; states out of range are clipped."""
    weights = transition.weights if isinstance(transition, Band) else transition
    count = weights.shape[-1]
    state = jnp.clip(state, 0, count - 1)
    if weights.size == math.prod(weights.shape[-2:]):  # the same for all rows
        taken = sharding.rows(weights.reshape(weights.shape[-2:]).T, state)
    else:
        taken = jnp.take_along_axis(weights, state[..., None, None], axis=-1)[..., 0]
    if not isinstance(transition, Band):
        return taken
    move = state[..., None] - jnp.expand_dims(jnp.arange(count), tuple(range(state.ndim)))
    inside = (move >= 0) & (move < weights.shape[-2])
    return jnp.where(inside, jnp.take_along_axis(taken, jnp.clip(move, 0, weights.shape[-2] - 1), axis=-1), -jnp.inf)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk(pick: Callable[..., Array], parallel: bool, states: Array, keys: Any, rank: Any, *parts: Any) -> Array:
    """The states of a path, chosen from the last to the first: `pick(key, scores [*batch, ranks * S], rank)`.

    `states` `[time, ranks, *batch, S]` are those of `_forward`; an index counts the states of all ranks.
    """
    p = _Parts(*parts)
    keep, places = _flags(p)
    varying, constant = p.split()
    count = p.emission.shape[-1]

    def back(after, inputs):
        here, transition, keep, last, key = inputs
        onward = _column(transition if constant is None else constant, after % count)
        onward = masks.select(last, p.end, jnp.broadcast_to(onward, p.end.shape))
        scores = jnp.concatenate([scores + onward for scores in here], axis=-1)
        chosen = pick(key, scores, jnp.where(last, rank, after // count))
        return jnp.where(keep, chosen, after)

    inputs = (states, varying, keep, places.last, keys)
    nowhere = jnp.zeros_like(keep.any(axis=0), int)
    if not parallel or not len(p.emission):

        def step(after, inputs):
            after = back(after, inputs)
            return after, after

        _, chosen = scan_from_fresh(lax.scan, step, nowhere, inputs, len(p.emission), True)
    else:  # whereto each index leads, for all of them; then these maps are composed

        def maps(inputs):
            return jax.vmap(lambda index: back(nowhere + index, inputs))(jnp.arange(states.shape[1] * count))

        def compose(later, earlier):
            return jnp.take_along_axis(earlier, later, axis=1)

        chosen = lax.associative_scan(compose, jax.vmap(maps)(inputs), reverse=True)[:, 0]
    return jnp.moveaxis(jnp.where(keep, chosen % count, 0), 0, -1)
