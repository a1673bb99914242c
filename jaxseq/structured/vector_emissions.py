"""Emissions of vectors: normal and Poisson."""

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import gammaln
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import sharding
from jaxseq.structured.emissions import LEAST, Emission, cast_like, wide


def _beside(leaf: Array, x: Array) -> Array:
    """Params `[state, ...]` with the axes of a batch of observations `[*batch, feature]`."""
    return jnp.expand_dims(leaf, tuple(range(x.ndim - 1)))


class _Vectors(Emission):
    """Emissions of vectors whose features are independent in each state; each may be missing by itself."""

    input_size: int

    @abc.abstractmethod
    def log_density(self, params: Any, x: Float[Array, "*batch 1 feature"]) -> Float[Array, "*batch state feature"]:
        """The log-density of each feature in each state."""

    def log_likelihood(self, params: Any, x: Float[Array, "*batch feature"]) -> Float[Array, "*batch state"]:
        finite, otherwise = jnp.isfinite(x), jnp.where(jnp.isnan(x), 0.0, -jnp.inf)
        params, x = wide((params, jnp.where(finite, x, 0)))
        each = self.log_density(jax.tree.map(lambda leaf: _beside(leaf, x), params), x[..., None, :])
        return jnp.where(finite[..., None, :], each, otherwise[..., None, :]).sum(axis=-1)


def _flat(xs: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Observations `[count, feature]`, which features are there and possible, and weights `[count, state]`."""
    xs, weights = xs.reshape(-1, xs.shape[-1]), weights.reshape(-1, weights.shape[-1])
    seen = jnp.isfinite(xs)
    return wide(jnp.where(seen, xs, 0)).astype(weights.dtype), seen.astype(weights.dtype), weights


def _product(weights: Array, values: Array) -> Array:
    """The product of matrices `[state, count]` and `[count, feature]`, summed over devices that share the count."""
    return jnp.matmul(weights, values, out_sharding=sharding.out_sharding(PartitionSpec(), weights, values))


def _mean(xs: Array, seen: Array, weights: Array, otherwise: Array) -> tuple[Array, Array]:
    """The means of features `[state, feature]`, and of how many observations they are."""
    count = _product(weights.T, seen)
    return jnp.where(count > LEAST, _product(weights.T, xs * seen) / jnp.maximum(count, LEAST), otherwise), count


def _scattered(key: Array, xs: Array, keep: Array, states: int) -> tuple[Array, Array]:
    """Some observations `[state, feature]`, drawn without replacement, and the variances of all `[feature]`."""
    flat, seen, kept = sharding.placed(_flat(xs, keep[..., None].astype(wide(xs).dtype)), PartitionSpec(None))
    middle, count = _mean(flat, seen, kept, jnp.zeros((1, flat.shape[-1]), flat.dtype))
    variance = (kept * seen * (flat - middle) ** 2).sum(axis=0) / jnp.maximum(count[0], 1)
    flat = jnp.where(seen * kept > 0, flat, middle)
    nothing = jnp.broadcast_to(middle, (states, flat.shape[-1]))
    flat, kept = jnp.concatenate([flat, nothing]), jnp.concatenate([kept[:, 0], jnp.full(states, 1e-9, flat.dtype)])
    return flat[jax.random.choice(key, len(flat), (states,), replace=False, p=kept / kept.sum())], variance


class GaussianParams(NamedTuple):
    """Means, and logarithms of standard deviations."""

    mean: Float[Array, "state feature"]
    log_scale: Float[Array, "state feature"]


class GaussianEmission(_Vectors):
    """A vector of `input_size` independent normal features; those that are NaN are missing.

    A fit (`maximize`) holds all variances at `least_variance` or above, so that no state collapses onto an observation.

    >>> emission = GaussianEmission(1, 2)
    >>> params = GaussianParams(mean=jnp.zeros((1, 2)), log_scale=jnp.zeros((1, 2)))
    >>> emission.log_likelihood(params, jnp.array([[0.0, 0.0], [0.0, jnp.nan]])).round(3).tolist()
    [[-1.8380000591278076], [-0.9190000295639038]]
    """

    _: dataclasses.KW_ONLY
    least_variance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_variance(self)

    def init(self, key: Array) -> GaussianParams:
        shape = (self.states, self.input_size)
        return GaussianParams(mean=jax.random.normal(key, shape), log_scale=jnp.zeros(shape))

    def log_density(self, params, x):
        standard = (x - params.mean) * jnp.exp(-params.log_scale)
        return -0.5 * standard**2 - params.log_scale - 0.5 * math.log(2 * math.pi)

    def simulate(self, key: Array, params: GaussianParams, states: Int[Array, "*batch"]) -> Array:
        mean, log_scale = (leaf[states] for leaf in wide(params))
        return (mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape, mean.dtype)).astype(params.mean.dtype)

    def maximize(self, params, xs, weights, smoothing=0.0):
        flat, seen, weights = _flat(xs, weights)
        mean, count = _mean(flat, seen, weights, params.mean.astype(flat.dtype))

        def squares(mean, weights):  # of deviations from the mean: their digits do not cancel
            return _product(weights[None], seen * (flat - mean) ** 2)[0]

        variance = jax.vmap(squares)(mean, weights.T) / jnp.maximum(count, LEAST)
        log_scale = 0.5 * jnp.log(jnp.maximum(variance, self.least_variance))
        log_scale = jnp.where(count > LEAST, log_scale, params.log_scale.astype(flat.dtype))
        return cast_like(params, GaussianParams(mean, log_scale))

    def spread(self, key: Array, xs: Array, keep: Bool[Array, "*batch_time"]) -> GaussianParams:
        mean, variance = _scattered(key, xs, keep, self.states)
        log_scale = jnp.broadcast_to(0.5 * jnp.log(jnp.maximum(variance, self.least_variance)), mean.shape)
        return GaussianParams(mean.astype(xs.dtype), log_scale.astype(xs.dtype))


def _check_variance(emission: Any) -> None:
    if not 0 < emission.least_variance < math.inf:
        raise ValueError(f"{type(emission).__name__} needs a least_variance above 0, got {emission.least_variance}.")


class FullGaussianParams(NamedTuple):
    """`factor` is a Cholesky factor of each covariance: lower triangles, with the logarithms of the diagonal."""

    mean: Float[Array, "state feature"]
    factor: Float[Array, "state feature feature"]


class FullGaussianEmission(Emission):
    """A normal vector of `input_size` features with a covariance in each state; with a NaN in it, all of it is missing.

    A fit holds the eigenvalues of covariances at `least_variance` or above.
    """

    input_size: int
    _: dataclasses.KW_ONLY
    least_variance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_variance(self)

    def init(self, key: Array) -> FullGaussianParams:
        shape = (self.states, self.input_size)
        return FullGaussianParams(jax.random.normal(key, shape), jnp.zeros((*shape, self.input_size)))

    def cholesky(self, params: FullGaussianParams) -> Float[Array, "state feature feature"]:
        """The factors L of the covariances L Lᵀ."""
        eye = jnp.broadcast_to(jnp.eye(self.input_size, dtype=bool), params.factor.shape)
        return jnp.tril(jnp.where(eye, jnp.exp(jnp.where(eye, params.factor, 0)), params.factor))

    def log_likelihood(self, params: FullGaussianParams, x: Float[Array, "*batch feature"]) -> Array:
        finite, otherwise = jnp.isfinite(x).all(axis=-1), jnp.where(jnp.isnan(x).any(axis=-1), 0.0, -jnp.inf)
        params, x = wide((params, jnp.where(finite[..., None], x, 0)))
        eye = jnp.broadcast_to(jnp.eye(self.input_size, dtype=x.dtype), params.factor.shape)
        whiten = solve_triangular(self.cholesky(params), eye, lower=True)
        away = x[..., None, :] - _beside(params.mean, x)
        standard = jnp.einsum("sij,...sj->...si", whiten, away)
        log_scale = jnp.diagonal(params.factor, axis1=-2, axis2=-1).sum(axis=-1)
        constant = _beside(log_scale + 0.5 * self.input_size * math.log(2 * math.pi), x)
        return jnp.where(finite[..., None], -0.5 * (standard**2).sum(axis=-1) - constant, otherwise[..., None])

    def simulate(self, key: Array, params: FullGaussianParams, states: Int[Array, "*batch"]) -> Array:
        mean, lower = wide(params).mean[states], self.cholesky(wide(params))[states]
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return (mean + (lower @ noise[..., None])[..., 0]).astype(params.mean.dtype)

    def maximize(self, params, xs, weights, smoothing=0.0):
        flat, seen, weights = _flat(xs, weights)
        whole = seen.all(axis=-1)
        weights = jnp.where(whole[:, None], weights, 0)
        mean, counts = _mean(flat, jnp.ones_like(flat), weights, params.mean.astype(flat.dtype))
        count = counts[:, :1, None]

        def scatter(given):
            mean, weights = given
            away = flat - mean
            return _product((away * weights[:, None]).T, away)

        covariance = jax.lax.map(scatter, (mean, weights.T)) / jnp.maximum(count, LEAST)
        factor = jnp.where(count > LEAST, self._factor(covariance), params.factor.astype(flat.dtype))
        return cast_like(params, FullGaussianParams(mean, factor))

    def _factor(self, covariance: Array) -> Array:
        values, vectors = jnp.linalg.eigh(covariance)
        values = jnp.maximum(values, self.least_variance)
        lower = jnp.linalg.cholesky((vectors * values[..., None, :]) @ jnp.swapaxes(vectors, -1, -2))
        eye = jnp.broadcast_to(jnp.eye(self.input_size, dtype=bool), lower.shape)
        return jnp.where(eye, jnp.log(jnp.where(eye, lower, 1)), lower)

    def spread(self, key: Array, xs: Array, keep: Bool[Array, "*batch_time"]) -> FullGaussianParams:
        mean, variance = _scattered(key, xs, keep & jnp.isfinite(xs).all(axis=-1), self.states)
        factor = jnp.diag(0.5 * jnp.log(jnp.maximum(variance, self.least_variance)))
        factor = jnp.broadcast_to(factor, (self.states, *factor.shape))
        return FullGaussianParams(mean.astype(xs.dtype), factor.astype(xs.dtype))


class PoissonParams(NamedTuple):
    """Logarithms of mean counts."""

    log_rate: Float[Array, "state feature"]


class PoissonEmission(_Vectors):
    """A vector of `input_size` independent counts, as floating numbers; those that are NaN are missing.

    A number below 0 is impossible. A fit holds rates at 1e-6 or above. Draws have the dtype of the params: bfloat16
    rounds those above 256.

    >>> emission = PoissonEmission(1, 1)
    >>> params = PoissonParams(log_rate=jnp.log(jnp.array([[2.0]])))
    >>> f"{jnp.exp(emission.log_likelihood(params, jnp.array([1.0])))[0]:.3f}"  # 2 exp(-2)
    '0.271'
    """

    def init(self, key: Array) -> PoissonParams:
        return PoissonParams(jax.random.normal(key, (self.states, self.input_size)))

    def log_density(self, params, x):
        whole = jnp.maximum(x, 0)
        return jnp.where(x < 0, -jnp.inf, whole * params.log_rate - jnp.exp(params.log_rate) - gammaln(whole + 1))

    def simulate(self, key: Array, params: PoissonParams, states: Int[Array, "*batch"]) -> Array:
        rate = jnp.exp(wide(params).log_rate)[states]
        return jax.random.poisson(key, rate).astype(params.log_rate.dtype)

    def maximize(self, params, xs, weights, smoothing=0.0):
        flat, seen, weights = _flat(xs, weights)
        mean, _ = _mean(flat, seen, weights, jnp.exp(params.log_rate.astype(flat.dtype)))
        return cast_like(params, PoissonParams(jnp.log(jnp.maximum(mean, 1e-6))))

    def spread(self, key: Array, xs: Array, keep: Bool[Array, "*batch_time"]) -> PoissonParams:
        some, variance = _scattered(key, xs, keep, self.states)
        return PoissonParams(jnp.log(some + 0.1 * jnp.sqrt(variance) + 1e-3).astype(xs.dtype))  # no rate of 0
