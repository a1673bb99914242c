"""Hidden Markov models: as distributions over chains, and their filter as a cell."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell
from jaxseq.structured import chains
from jaxseq.structured.chains import Chain
from jaxseq.structured.emissions import CategoricalEmission, Emission, log_shares, log_sum, normalized, wide
from jaxseq.structured.semirings import logsumexp


class HMMParams(NamedTuple):
    """Logits of the first state and of transitions from each state, any real numbers; -inf forbids.

    Of probabilities give the logarithm, `transition=jnp.log(A)`: as logits they would be softmaxed once more.
    `transition` is None in a `VaryingHMM`.
    """

    prior: Float[Array, "state"]
    transition: Float[Array, "state state"] | None
    emission: Any


class HMMState(NamedTuple):
    """`log p(next state | observations so far)`; before the first one, the log-probabilities of the first state."""

    predicted: Float[Array, "*batch state"]


class Filtered(NamedTuple):
    """`log_probs` are `log p(state | observations so far)`, `log_likelihood` is `log p(observation | those before)`."""

    log_probs: Float[Array, "*batch state"]
    log_likelihood: Float[Array, "*batch"]


class Simulated(NamedTuple):
    """States and what they emitted."""

    states: Int[Array, "*batch time"]
    xs: Array


class HMM(Cell):
    """A hidden Markov model, and as a cell its filter.

    p(z, x) = π[z₁] Π A[z₍t₋₁₎, zₜ] Π p(xₜ | zₜ)

    (Rabiner, A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition, Proceedings of the
    IEEE 1989, doi:10.1109/5.18626.) `chain` gives it to all functions of `chains`:

        chain = hmm.chain(params, xs, mask)
        chains.log_partition(chain, mask)          log p(x)
        chains.path_score(chain, states, mask)     log p(z, x)
        chains.marginals, pair_marginals           smoothing: p(zₜ | x), p(zₜ, z₍t₊₁₎ | x)
        chains.best_path, best_paths               the most likely path, or k of them
        chains.sample_path                         a path drawn from p(z | x)

    `unroll` filters: it outputs `Filtered` at each step, whose increments sum to log p(x); the state predicts the next
    one. Observations that are missing (NaN, or a token below 0; see the emissions) say nothing, while time passes. An
    observation that is impossible gives -inf from there to the next reset. All is computed in float32 or wider, but the
    state and the outputs of `unroll` have the dtype of the params: in bfloat16 each step rounds them, so take the
    likelihood of many steps from `log_partition`.

    `baum_welch` fits it to observations, `fit_labelled` to states as well; or follow gradients of `log_partition`.

    >>> hmm = HMM(CategoricalEmission(states=2, vocab_size=3))
    >>> params = hmm.init(jax.random.key(0))
    >>> xs = jnp.array([0, 2, -1, 1])  # the third is missing
    >>> state, filtered = hmm.unroll(params, xs)
    >>> log_likelihood = chains.log_partition(hmm.chain(params, xs))
    >>> jnp.allclose(filtered.log_likelihood.sum(), log_likelihood, atol=1e-5).item()
    True
    >>> chains.best_path(hmm.chain(params, xs)).states.shape
    (4,)
    """

    emission: Emission

    free_state = False  # it is a distribution

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.emission, Emission):
            raise TypeError(
                f"{type(self).__name__} needs an Emission, such as CategoricalEmission(states, vocab_size), got "
                f"{self.emission!r}."
            )

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.emission.input_rank

    @property
    def input_size(self) -> int | None:
        return getattr(self.emission, "input_size", None)

    def init(self, key: Array) -> HMMParams:
        """Random transitions, and the params of the emission."""
        return self._params(key, self.emission.init)

    def spread(self, key: Array, xs: Any, mask: Bool[Array, "*batch time"] | None = None) -> HMMParams:
        """Random params to begin a fit of these observations with; of an emission of your own, those of `init`.

        Which state gets which is random too: a transition matrix that is known does not belong to them, but to an
        emission whose params are given in its order.
        """
        observed = self._checked(xs, jnp.zeros(()).dtype)
        keep = jnp.ones(self._steps(xs), bool) if mask is None else jnp.asarray(mask)
        errors.check_flags(self, keep, "mask", self._steps(xs))
        observed = masks.zero_unless(keep, observed)
        return self._params(key, lambda key: self.emission.spread(key, observed, keep))

    def _params(self, key, emission):
        prior_key, transition_key, emission_key = jax.random.split(key, 3)
        params = emission(emission_key)
        dtype = errors.float_dtype(params) or jnp.zeros(()).dtype
        states = self.emission.states
        logits = jax.random.normal(transition_key, (states, states), dtype)
        return HMMParams(jax.random.normal(prior_key, (states,), dtype), self._own(logits), params)

    def _own(self, transition):
        """The transitions that are params."""
        return transition

    def _observed(self, xs):
        """The observations among the inputs."""
        try:
            return jnp.asarray(xs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self} needs observations as one array [*batch, time, *features]: pad sequences of different lengths "
                "and give the mask; jaxseq.pad(sequences) makes both."
            ) from error

    def _transition(self, params: Any, xs: Any) -> Array:
        """The logits of the transitions."""
        return params.transition

    def _steps(self, xs) -> tuple[int, ...]:
        observed = self._observed(xs)
        return observed.shape[: max(observed.ndim - self.emission.input_rank, 0)]

    def _check_params(self, params: Any) -> None:
        if not isinstance(params, HMMParams):
            raise TypeError(
                f"{self} needs HMMParams, such as hmm.init(key) or hmm.spread(key, xs), got {errors.shape_of(params)}."
            )
        errors.check_params(self, params)

    def _checked(self, xs: Any, dtype: Any) -> Array:
        """The observations; whole numbers among vectors become floating ones, of `dtype` or wider."""
        observed = self._observed(xs)
        if observed.ndim <= self.emission.input_rank:
            raise ValueError(
                f"{self} needs observations [*batch, time, *features] with features of rank "
                f"{self.emission.input_rank}, got shape {observed.shape}."
            )
        if self.emission.input_rank == 0:
            errors.check_tokens(self, observed)
        elif dtype is not None and jnp.issubdtype(observed.dtype, jnp.integer):
            observed = observed.astype(jnp.promote_types(dtype, jnp.float32))
        if (size := getattr(self.emission, "input_size", None)) is not None:
            errors.check_features(self, observed, size)
        return observed

    def chain(self, params: HMMParams, xs: Any, mask: Bool[Array, "*batch time"] | None = None) -> Chain:
        """The chain of states, given observations `[*batch, time, *features]`: what `chains` works on.

        Give its functions the mask as well: here it only clears the padding, so that nothing in it has any effect.

        Raises:
            ValueError, TypeError: if the params are those of another model, or the observations not of the shape, dtype
                or kind that the emission reads.
        """
        self._check_params(params)
        dtype, steps = errors.float_dtype(params), self._steps(xs)
        if self.emission.input_rank and dtype is not None:
            errors.check_dtype(self, self._observed(xs), dtype)
        observed, transition = self._checked(xs, dtype), self._transition(params, xs)
        if mask is not None:
            mask = jnp.asarray(mask)
            errors.check_flags(self, mask, "mask", steps)
            observed = masks.zero_unless(mask, observed)
        if transition.ndim > 2:
            read = ~masks.places(steps, mask, None).last  # nothing leads out of the last step
            transition = masks.zero_unless(read if mask is None else read & mask, transition)
        emission = self.emission.log_likelihood(params.emission, observed)
        return Chain(normalized(wide(params.prior)), normalized(wide(transition)), emission)

    def initial_state(self, params: HMMParams, batch_shape: tuple[int, ...] = ()) -> HMMState:
        self._check_params(params)
        prior = normalized(wide(params.prior)).astype(params.prior.dtype)
        return HMMState(jnp.broadcast_to(prior, (*batch_shape, *prior.shape)))

    def _filter(self, params, state, x) -> tuple[Filtered, Float[Array, "*batch state"]]:
        """The distribution over states after an observation, and that of the next state."""
        predicted = wide(state.predicted)
        here = predicted + self.emission.log_likelihood(params.emission, self._observed(x))
        log_likelihood = logsumexp(here, -1)
        here -= jnp.where(jnp.isneginf(log_likelihood), 0, log_likelihood)[..., None]
        transition = normalized(wide(self._transition(params, x)))
        transition = jnp.expand_dims(transition, tuple(range(here.ndim + 1 - transition.ndim)))
        return Filtered(here, log_likelihood), logsumexp(here[..., :, None] + transition, -2)

    def step(self, params: HMMParams, state: HMMState, x: Any, key: Array | None = None) -> tuple[HMMState, Filtered]:
        filtered, predicted = self._filter(params, state, x)
        narrow = jax.tree.map(lambda leaf: leaf.astype(state.predicted.dtype), (HMMState(predicted), filtered))
        return narrow

    def simulate(
        self, key: Array, params: HMMParams, length: int, batch_shape: tuple[int, ...] = (), transition: Any = None
    ) -> Simulated:
        """States `[*batch, time]` and observations drawn from the model; `transition` is for a `VaryingHMM`."""
        errors.check_key(self, key)
        self._check_params(params)
        length = operator.index(length)
        if length < 0:
            raise ValueError(f"{self} needs a length of 0 or more steps to simulate, got {length}.")
        state_key, emission_key = jax.random.split(key)
        logits = params.transition if transition is None else transition
        if logits is None:
            raise ValueError(f"{self} needs the logits of its transitions to simulate: give transition=.")
        sides = (self.emission.states,) * 2
        if jnp.shape(logits) not in (sides, (*batch_shape, *sides), (*batch_shape, length, *sides)):
            raise ValueError(
                f"{self} needs logits of transitions [*batch, time, state, state] = {(*batch_shape, length, *sides)} "
                f"to simulate, or [state, state], got shape {jnp.shape(logits)}."
            )
        start = normalized(wide(params.prior))
        nothing = jnp.zeros((*batch_shape, length, self.emission.states), start.dtype)
        states = chains.sample_path(state_key, Chain(start, normalized(wide(jnp.asarray(logits))), nothing)).states
        return Simulated(states, self.emission.simulate(emission_key, params.emission, states))

    def maximize(
        self, params: HMMParams, xs: Any, counts: Chain, smoothing: float | Float[Array, ""] = 0.0
    ) -> HMMParams:
        """The params of the highest likelihood, given how often each potential of the chain is used.

        These are the gradients of `log_partition` (expected counts) or of `path_score` (those of a path), with None for
        transitions that are given. What has no counts keeps its params; `smoothing` is added to counts of first states,
        transitions and tokens, but to none that is forbidden.
        """
        observed = self._observed(xs)
        prior = log_shares(wide(params.prior), counts.start, smoothing)
        transition = params.transition
        if transition is not None:
            found = log_shares(wide(transition), jnp.asarray(counts.transition), smoothing)
            transition = found.astype(transition.dtype)
        emission = self.emission.maximize(params.emission, observed, counts.emission, smoothing)
        return HMMParams(prior.astype(params.prior.dtype), transition, emission)

    def log_prior(self, params: HMMParams) -> Float[Array, ""]:
        """The sum of all log-probabilities that `smoothing` counts once more: a Dirichlet prior, but for a constant."""
        total = log_sum(wide(params.prior)) + self.emission.log_prior(params.emission)
        return total if params.transition is None else total + log_sum(wide(params.transition))


class VaryingHMM(HMM):
    """A hidden Markov model whose transitions are given at each step, among the inputs `(xs, transition)`.

    `transition` `[*batch, time, state, state]` are logits, perhaps those of a network that reads other inputs: entry t
    leads from the state at step t to the next one. `chain`, `unroll`, `spread` and `baum_welch` take the pair.

    >>> from jaxseq.structured.vector_emissions import PoissonEmission
    >>> hmm = VaryingHMM(PoissonEmission(states=2, input_size=1))
    >>> params = hmm.init(jax.random.key(0))
    >>> filtered = hmm.unroll(params, (jnp.ones((5, 1)), jnp.zeros((5, 2, 2))))[1]
    >>> filtered.log_probs.shape
    (5, 2)
    """

    input_names = ("xs", "transition")

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.emission.input_rank, 2)

    @property
    def input_size(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None

    def zero_input(self, params: HMMParams, batch_shape: tuple[int, ...] = ()) -> Any:
        states = self.emission.states
        return (
            HMM(self.emission).zero_input(params, batch_shape),
            jnp.zeros((*batch_shape, states, states), params.prior.dtype),
        )

    def _own(self, transition):
        return None

    def _observed(self, xs):
        return super()._observed(self._pair(xs)[0])

    def _check_params(self, params):
        if isinstance(params, HMMParams) and params.transition is not None:
            raise ValueError(f"{self} needs params whose transition is None: it is given among the inputs.")
        super()._check_params(params)

    def _transition(self, params, xs):
        transition = jnp.asarray(self._pair(xs)[1])
        expected = (*self._steps(xs), self.emission.states, self.emission.states)
        if transition.shape != expected:
            raise ValueError(
                f"{self} needs logits of transitions [*batch, time, state, state] = {expected}, got shape "
                f"{transition.shape}."
            )
        return transition

    def _pair(self, xs):
        if not isinstance(xs, tuple) or len(xs) != 2:
            raise ValueError(f"{self} needs a pair (xs, transition), got {errors.shape_of(xs)}.")
        return xs


class TokenHMM(HMM):
    """A hidden Markov model of tokens as a language model: it reads a token and outputs the logits of the next.

    These are `log p(xₜ₊₁ | x₁ ... xₜ)`, so `generate` runs on it. Params are those of the `HMM` of the same emission.

    >>> import jaxseq as js
    >>> cell = TokenHMM(CategoricalEmission(states=2, vocab_size=3))
    >>> params = cell.init(jax.random.key(0))
    >>> js.generate(cell, params, jnp.array([0]), max_new_tokens=4, key=jax.random.key(1)).tokens.shape
    (4,)
    """

    emission: CategoricalEmission

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.emission, CategoricalEmission):
            raise TypeError(f"TokenHMM needs a CategoricalEmission, whose tokens it predicts, got {self.emission}.")

    @property
    def output_size(self) -> int:
        return self.emission.vocab_size

    def step(self, params: HMMParams, state: HMMState, x: Any, key: Array | None = None) -> tuple[HMMState, Array]:
        _, predicted = self._filter(params, state, x)
        tokens = self.emission.log_probs(params.emission)
        tokens = jnp.expand_dims(tokens, tuple(range(predicted.ndim - 1)))
        logits = logsumexp(predicted[..., :, None] + tokens, -2)
        return HMMState(predicted.astype(state.predicted.dtype)), logits.astype(state.predicted.dtype)
