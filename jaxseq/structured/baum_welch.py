"""Fits of hidden Markov models: to observations alone, and to observations with their states."""

import bisect
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks
from jaxseq.structured import chains
from jaxseq.structured.chains import Chain
from jaxseq.structured.hmm import HMM, HMMParams


class Fitted(NamedTuple):
    """The params, and how the fit went.

    `trace[i]` is the log-likelihood after i updates, of all rows together, and what `smoothing` adds to it,
    `smoothing * hmm.log_prior(params)`; it never falls but for rounding. It has `steps + 1` numbers, of which those
    after `iterations`, the number of updates made, repeat the last. `converged` says whether `tolerance` was met.
    """

    params: HMMParams
    trace: Float[Array, "steps"]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


class _Loop(NamedTuple):
    params: HMMParams
    counts: Chain
    trace: Float[Array, "steps"]
    count: Int[Array, ""]
    converged: Bool[Array, ""]


def baum_welch(
    hmm: HMM,
    params: HMMParams,
    xs: Any,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    steps: int = 100,
    tolerance: float | None = 1e-6,
    smoothing: float | Float[Array, ""] = 0.0,
    parallel: bool = False,
) -> Fitted:
    """Fits a hidden Markov model to observations by expectation maximisation, from given params on.

    Each update takes the expected numbers of states and transitions, the gradients of the log-likelihood, for counts
    (Baum et al., A Maximization Technique Occurring in the Statistical Analysis of Probabilistic Functions of Markov
    Chains, Annals of Mathematical Statistics 1970, doi:10.1214/aoms/1177697196). What has no counts keeps its params,
    and what is forbidden (a logit of -inf) stays so. Missing observations are as in `HMM`. It finds a local optimum:
    see `baum_welch_restarts`. It stops when the likelihood is not finite. It has no gradient in reverse mode, for its
    loop has no fixed length; follow those of `log_partition` instead.

    Args:
        hmm: the model; its emission needs `maximize`. Transitions of a `VaryingHMM` are given, and not fitted.
        params: where to start, for example `hmm.spread(key, xs, mask)`.
        xs: observations `[*batch, time, *features]`, as `hmm.chain` takes them.
        mask: False at padding.
        reset: True where another sequence begins.
        steps: the most updates, a static number.
        tolerance: it has converged when an update adds no more than this share of the trace; None makes all updates.
        smoothing: added to each count of first states, transitions and tokens: a Dirichlet prior.
        parallel: in `log_partition`.

    Raises:
        ValueError: if the params give the observations no finite likelihood, unless under `jit` or `vmap`.

    >>> from jaxseq.structured.vector_emissions import GaussianEmission
    >>> hmm = HMM(GaussianEmission(states=2, input_size=1))
    >>> xs = jnp.array([0.1, -0.1, 0.0, 5.1, 4.9, 5.0, jnp.nan, 0.1])[:, None]
    >>> fitted = baum_welch(hmm, hmm.spread(jax.random.key(0), xs), xs)
    >>> sorted(fitted.params.emission.mean.round(1).ravel().tolist()) == [0.0, 5.0]
    True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"baum_welch needs steps >= 0, a static number, got {steps!r}.")
    _check_smoothing("baum_welch", smoothing)
    fitted = _baum_welch(hmm, steps, parallel, params, xs, mask, reset, tolerance, smoothing)
    _check_possible("baum_welch", hmm, fitted, xs, mask, reset)
    return fitted


def _check_smoothing(name, smoothing):
    if not isinstance(smoothing, Tracer) and not smoothing >= 0:
        raise ValueError(f"{name} needs smoothing >= 0, got {smoothing}.")


def _check_possible(name, hmm, fitted, xs, mask, reset):
    """Raises ValueError if the fit ended at a log-likelihood that is not finite, where that can be seen."""
    value = fitted.trace[-1]
    if isinstance(value, Tracer) or jnp.isfinite(value):
        return
    chain = jax.jit(hmm.chain)(fitted.params, xs, mask)

    def is_lost(keep):
        return ~jnp.isfinite(chains.log_partition(chain, keep, reset=reset))

    index = _first_lost(is_lost, chain, mask)
    if index is None:
        raise ValueError(f"{name} got a log-likelihood of {value}: params or smoothing are not finite.")
    cause = "no state can have it there" if jnp.isneginf(value) else "a token outside the vocabulary, or NaN in params"
    raise ValueError(f"{name} got an observation at {index} whose log-likelihood is {value}: {cause}.")


def _first_lost(
    is_lost: Callable[[Array], Array], chain: Chain, mask: Bool[Array, "*batch time"] | None
) -> tuple[int, ...] | None:
    """The index [*batch, time] of the step up to which the first row that is lost is so; None if no row is."""
    *batch, time = chain.emission.shape[:-1]
    keep = jnp.ones((*batch, time), bool) if mask is None else jnp.asarray(mask)
    compiled = jax.jit(is_lost)
    rows = np.argwhere(np.asarray(compiled(keep)))
    if not len(rows):
        return None
    row = tuple(rows[0].tolist())

    def is_lost_by(last):
        return bool(np.asarray(compiled(keep & (jnp.arange(time) <= last)))[row])

    return *row, bisect.bisect_left(range(time), True, key=is_lost_by)


def _without_padding(hmm, xs, mask):
    """Inputs whose padding, weighed by 0, gives 0."""
    if mask is None:
        return xs
    mask = jnp.asarray(mask)
    errors.check_flags(hmm, mask, "mask", hmm._steps(xs))
    return masks.zero_unless(mask, jax.tree.map(jnp.asarray, xs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _baum_welch(hmm, steps, parallel, params, xs, mask, reset, tolerance, smoothing):
    hmm._check_params(params)
    xs = _without_padding(hmm, xs, mask)

    def expect(params):
        chain = hmm.chain(params, xs, mask)
        varying = None if params.transition is not None else chain.transition

        def log_likelihood(learned):
            whole = learned if varying is None else learned._replace(transition=varying)
            return chains.log_partition(whole, mask, reset=reset, parallel=parallel).sum()

        learned = chain if varying is None else chain._replace(transition=None)  # pyright: ignore[reportArgumentType]
        value, counts = jax.value_and_grad(log_likelihood)(learned)
        return value + smoothing * hmm.log_prior(params).astype(value.dtype), counts

    def update(loop: _Loop) -> _Loop:
        params = hmm.maximize(loop.params, xs, loop.counts, smoothing)
        value, counts = expect(params)
        before = loop.trace[loop.count]
        converged = jnp.zeros((), bool)
        if tolerance is not None:
            converged = value - before <= tolerance * jnp.abs(value)
        later = jnp.arange(steps + 1) > loop.count
        return _Loop(params, counts, jnp.where(later, value, loop.trace), loop.count + 1, converged)

    value, counts = expect(params)
    trace = jnp.full(steps + 1, value)
    loop = _Loop(params, counts, trace, jnp.zeros((), int), jnp.zeros((), bool))

    def goes_on(loop):
        return (loop.count < steps) & ~loop.converged & jnp.isfinite(loop.trace[-1])

    loop = jax.lax.while_loop(goes_on, update, loop)
    return Fitted(loop.params, loop.trace, loop.count, loop.converged)


def baum_welch_restarts(
    hmm: HMM,
    key: Array,
    xs: Any,
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    restarts: int = 10,
    **options: Any,
) -> Fitted:
    """The best of several fits by `baum_welch`, run together, each from random params (`hmm.spread`).

    Options are those of `baum_welch`. To see all of them, `jax.vmap` it yourself over params.

    >>> from jaxseq.structured.emissions import CategoricalEmission
    >>> hmm = HMM(CategoricalEmission(states=2, vocab_size=2))
    >>> fitted = baum_welch_restarts(hmm, jax.random.key(0), jnp.array([0, 1, 0, 1, 0, 1]), restarts=5, steps=300)
    >>> print(fitted.trace[-1].round(2) + 0.0)  # it alternates
    0.0
    """
    errors.check_key("baum_welch_restarts", key)
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 1:
        raise ValueError(f"baum_welch_restarts needs restarts >= 1, a static number, got {restarts!r}.")

    def fit(key):
        return baum_welch(hmm, hmm.spread(key, xs, mask), xs, mask, **options)

    fits = jax.vmap(fit)(jax.random.split(key, restarts))
    best = jnp.nan_to_num(fits.trace[:, -1], nan=-jnp.inf).argmax()
    fitted = jax.tree.map(lambda leaf: leaf[best], fits)
    _check_possible("baum_welch_restarts", hmm, fitted, xs, mask, options.get("reset"))
    return fitted


def fit_labelled(
    hmm: HMM,
    params: HMMParams,
    xs: Any,
    states: Int[Array, "*batch time"],
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    reset: Bool[Array, "*batch time"] | None = None,
    smoothing: float | Float[Array, ""] = 0.0,
) -> HMMParams:
    """The params of the highest likelihood of observations and their states: counts, with `smoothing` added to each.

    What is never seen keeps its `params`, and what they forbid stays forbidden.

    Raises:
        ValueError: if a state on the mask is outside [0, S), or a token outside the vocabulary; where that cannot be
            seen, under `jit` or `vmap`, all params are NaN instead.

    >>> from jaxseq.structured.emissions import CategoricalEmission
    >>> hmm = HMM(CategoricalEmission(states=2, vocab_size=2))
    >>> xs, states = jnp.array([0, 1, 1, 0]), jnp.array([0, 0, 1, 1])
    >>> params = fit_labelled(hmm, hmm.init(jax.random.key(0)), xs, states)
    >>> jnp.exp(params.transition).round(3).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    _check_smoothing("fit_labelled", smoothing)
    fitted, is_lost = _fit_labelled(hmm, params, xs, states, mask, reset, smoothing)
    if not isinstance(is_lost, Tracer) and is_lost:
        chain = jax.jit(hmm.chain)(params, xs, mask)
        index = _first_lost(lambda keep: jnp.isnan(chains.path_score(chain, states, keep, reset=reset)), chain, mask)
        count = hmm.emission.states
        if index is None or 0 <= (state := np.asarray(states)[index]) < count:
            raise ValueError(f"fit_labelled got a token outside the vocabulary, at {index}, or params that are NaN.")
        raise ValueError(f"fit_labelled got state {state} at {index}; the model has {count} states, from 0 on.")
    return fitted


@functools.partial(jax.jit, static_argnums=0)
def _fit_labelled(hmm, params, xs, states, mask, reset, smoothing):
    chain = hmm.chain(params, xs, mask)
    xs = _without_padding(hmm, xs, mask)

    def score(learned):
        whole = learned if learned.transition is not None else learned._replace(transition=chain.transition)
        return chains.path_score(whole, states, mask, reset=reset).sum()

    learned = chain if params.transition is not None else chain._replace(transition=None)
    value, counts = jax.value_and_grad(score)(learned)
    is_lost = jnp.isnan(value)
    fitted = hmm.maximize(params, xs, counts, smoothing)
    return jax.tree.map(lambda leaf: jnp.where(is_lost, jnp.nan, leaf), fitted), is_lost
