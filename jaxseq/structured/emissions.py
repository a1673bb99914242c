"""What the states of a hidden Markov model say of an observation: its likelihood, draws, and the best fit.

An observation that is NaN, or a token below 0, is missing: time passes, and it says nothing of the states. (A step off
the mask is another thing: there no time passes.) An infinite one is impossible, -inf in all states.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import sharding
from jaxseq.core.layer import Layer, Params
from jaxseq.structured.semirings import logsumexp

LEAST = 1e-6  # of an observation: a state that is expected to have fewer keeps its parameters


class Emission(Layer):
    """A distribution of observations in each of `states` states.

    One of your own gives `init` and `log_likelihood`, and perhaps `simulate` and `maximize`; `FunctionEmission` takes
    functions instead.
    """

    states: int

    input_rank: ClassVar[int] = 1  # of an observation: 0 for tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states < 1:
            raise ValueError(f"{type(self).__name__} needs states >= 1, got {self.states}.")

    @abc.abstractmethod
    def log_likelihood(self, params: Any, x: Array) -> Float[Array, "*batch state"]:
        """`log p(x | state)` of observations `[*batch, *features]`, 0 where x is missing; at least in float32."""

    def simulate(self, key: Array, params: Any, states: Int[Array, "*batch"]) -> Array:
        """Observations `[*batch, *features]` drawn in the given states."""
        raise TypeError(f"{self} does not say how to draw observations: give it a method simulate.")

    def maximize(
        self,
        params: Any,
        xs: Array,
        weights: Float[Array, "*batch_time state"],
        smoothing: float | Float[Array, ""] = 0.0,
    ) -> Params:
        """The params of the highest likelihood of observations that count `weights` times in each state.

        States without observations keep their `params`. `smoothing` is added to counts, where there are any.
        """
        raise TypeError(f"{self} has no closed form of its best fit: fit it by gradients of the log-likelihood.")

    def spread(self, key: Array, xs: Array, keep: Bool[Array, "*batch_time"]) -> Params:
        """Params to begin a fit of these observations with, different in each state."""
        return self.init(key)

    def log_prior(self, params: Any) -> Float[Array, ""]:
        """The sum of the log-probabilities that `smoothing` counts once more."""
        return jnp.zeros(())


def wide(tree: Any) -> Any:
    """A tree of arrays in float32, or wider if they are."""

    def at_least(leaf):
        enough = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits >= 32
        return leaf if enough else leaf.astype(jnp.float32)

    return jax.tree.map(at_least, tree)


def normalized(logits: Float[Array, "... outcome"]) -> Float[Array, "... outcome"]:
    """Log-probabilities; logits may be -inf, and where all of them are so are these."""
    total = logsumexp(logits, -1)[..., None]
    return logits - jnp.where(jnp.isneginf(total), 0, total)


def log_shares(
    logits: Float[Array, "... outcome"], counts: Float[Array, "... outcome"], smoothing: float | Float[Array, ""]
) -> Float[Array, "... outcome"]:
    """`log (counts + smoothing) / Σ`; logits of -inf stay, and so do all of a row without counts."""
    counts = jnp.where(jnp.isneginf(logits), 0, counts + smoothing)
    total = counts.sum(axis=-1, keepdims=True)
    some = total > LEAST
    seen = some & (counts > 0)
    shares = jnp.where(seen, counts, 1) / jnp.where(some, total, 1)
    return jnp.where(some, jnp.where(seen, jnp.log(shares), -jnp.inf), logits)


def log_sum(logits: Float[Array, "... outcome"]) -> Float[Array, ""]:
    """The sum of log-probabilities, without those that are -inf."""
    return jnp.where(jnp.isneginf(logits), 0, normalized(logits)).sum()


def cast_like(params: Any, found: Any) -> Any:
    """`found` in the dtypes of `params`."""
    return jax.tree.map(lambda old, new: new.astype(old.dtype), params, found)


class CategoricalParams(NamedTuple):
    """Logits of tokens in each state."""

    logits: Float[Array, "state vocab"]


class CategoricalEmission(Emission):
    """A token below `vocab_size`, with the probabilities `softmax(logits[state])`; a token below 0 is missing.

    A token of `vocab_size` or more gives NaN.

    >>> emission = CategoricalEmission(2, 3)
    >>> params = CategoricalParams(jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])))
    >>> jnp.exp(emission.log_likelihood(params, jnp.array([0, 2, -1]))).round(3).tolist()
    [[0.5, 0.25], [0.0, 0.5], [1.0, 1.0]]
    """

    vocab_size: int

    input_rank = 0

    def init(self, key: Array) -> CategoricalParams:
        return CategoricalParams(jax.random.normal(key, (self.states, self.vocab_size)))

    def log_probs(self, params: CategoricalParams) -> Float[Array, "state vocab"]:
        """`log p(x | state)` of all tokens."""
        return normalized(wide(params.logits))

    def log_likelihood(self, params: CategoricalParams, x: Int[Array, "*batch"]) -> Float[Array, "*batch state"]:
        x = x.astype(int)  # a narrow one does not hold the size of the vocabulary
        each = sharding.rows(self.log_probs(params).T, jnp.clip(x, 0, self.vocab_size - 1))
        each = jnp.where((x < self.vocab_size)[..., None], each, jnp.nan)
        return jnp.where((x < 0)[..., None], 0, each)

    def simulate(self, key: Array, params: CategoricalParams, states: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        return jax.random.categorical(key, wide(params.logits)[states])

    def maximize(self, params, xs, weights, smoothing=0.0):
        tokens, weights = xs.astype(int).ravel(), weights.reshape(-1, self.states)
        tokens = jnp.where((tokens < 0) | (tokens >= self.vocab_size), self.vocab_size, tokens)
        zeros = jnp.zeros((self.vocab_size + 1, self.states), weights.dtype)
        placement = sharding.out_sharding(PartitionSpec(), tokens, weights)
        counts = zeros.at[tokens].add(weights, out_sharding=placement)[:-1].T
        return cast_like(params, CategoricalParams(log_shares(wide(params.logits), counts, smoothing)))

    def log_prior(self, params: CategoricalParams) -> Float[Array, ""]:
        return log_sum(wide(params.logits))


class FunctionEmission(Emission):
    """Any likelihood: `function(params, x) -> [*batch, state]`, of params that `initial(key)` makes.

    Both are functions of a module. `rank` is that of an observation, 0 for tokens. What is missing (a token below 0; an
    observation with a NaN) is given to the function as zeros, and what it says of it is not read.
    """

    function: Callable[[Any, Array], Float[Array, "*batch state"]]
    initial: Callable[[Array], Params]
    _: dataclasses.KW_ONLY
    rank: int = 1
    input_size: int | None = None

    @property
    def input_rank(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rank

    def init(self, key: Array) -> Params:
        return self.initial(key)

    def log_likelihood(self, params: Params, x: Array) -> Float[Array, "*batch state"]:
        integers = jnp.issubdtype(x.dtype, jnp.integer)
        missing = (x < 0 if integers else jnp.isnan(x)).any(axis=tuple(range(x.ndim - self.rank, x.ndim)))
        x = jnp.where(jnp.expand_dims(missing, tuple(range(missing.ndim, x.ndim))), 0, x)
        needed = f"{self} needs log-likelihoods [*batch, state] = {(*missing.shape, self.states)} of its function"
        try:
            found = self.function(params, x)
        except (TypeError, ValueError) as error:
            error.add_note(f"{needed}, which was given x of shape {x.shape}.")
            raise
        if jnp.shape(found) != (*missing.shape, self.states):
            raise ValueError(f"{needed}, got shape {jnp.shape(found)}.")
        return jnp.where(missing[..., None], 0, wide(found))
