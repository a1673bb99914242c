"""Linear recurrences, whose decay is given by the input alone, so that all steps are computed at once."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Inexact

from jaxseq.core import errors, masks
from jaxseq.core.activations import Activation, activation
from jaxseq.core.cell import Cell
from jaxseq.core.linear_scan import linear_scan
from jaxseq.core.precision import widen
from jaxseq.core.unroll import Run

_glorot = initializers.glorot_uniform(in_axis=0, out_axis=2, batch_axis=1)


class LinearState(NamedTuple):
    """The state of a linear recurrence."""

    hidden: Float[Array, "*batch hidden"]


class LinearParams(NamedTuple):
    """The parameters of a recurrence that multiplies its input alone."""

    input_kernel: Float[Array, "input gate hidden"]
    bias: Float[Array, "gate hidden"]


LINEAR_AXES: Any = LinearParams._make(  # specs stand where the arrays do
    (PartitionSpec("input", "gate", "hidden"), PartitionSpec("gate", "hidden"))
)


class LinearRecurrence(Cell):
    """A cell whose next state is linear in its state, elementwise, with coefficients that the input gives.

        h' = a(x) h + b(x),   y = read(h', x)

    A subclass gives `init`, `initial_state`, `coefficients` and `read`, which take one step or any number of them at
    once; `unroll` then computes all coefficients, all states by `linear_scan`, and all outputs. One whose h is not
    the field `hidden` of its state, as where it is complex, also overrides `pack` and `unpack`. The states are
    computed in float32 at least.
    """

    input_size: int

    @abc.abstractmethod
    def coefficients(self, params: Any, x: Array) -> tuple[Inexact[Array, "..."], Inexact[Array, "..."]]:
        """The decay a and the drive b for inputs `[*leading, features]`, both of `widen`ed numbers.

        The drive is `[*leading, ...]`; the decay broadcasts against it, and lacks the leading axes if it is the same
        for all inputs.
        """

    @abc.abstractmethod
    def read(self, params: Any, hidden: Inexact[Array, "..."], x: Array) -> Array:
        """The output from the states h after the inputs x, both `[*leading, ...]`."""

    def pack(self, state: Any) -> Inexact[Array, "..."]:
        """The state as the array h."""
        return widen(state.hidden)

    def unpack(self, hidden: Inexact[Array, "..."], dtype: Any) -> Any:
        """The array h as a state of `dtype`."""
        return LinearState(hidden.astype(dtype))

    def check(self, params: Any, state: Any, x: Array) -> None:
        """Raises unless params, state and input are those of this cell, with the same batch axes and one dtype."""
        errors.check_params(self, params)
        errors.check_features(self, x, self.input_size)
        errors.check_dtype(self, x, errors.float_dtype(params))
        errors.check_state(self, state, jax.eval_shape(lambda p: self.initial_state(p, x.shape[:-1]), params))

    def zeros(self, params: Any, batch_shape: tuple[int, ...], *sizes: int) -> Float[Array, "..."]:
        """Zeros `[*batch, *sizes]` in the dtype of the params."""
        errors.check_params(self, params)
        return jnp.zeros((*batch_shape, *sizes), errors.float_dtype(params))

    def step(self, params: Any, state: Any, x: Float[Array, "*batch input"], key: Array | None = None) -> Any:
        self.check(params, state, x)
        dtype = errors.float_dtype(params)
        decay, drive = self.coefficients(params, x)
        state = self.unpack(jnp.broadcast_to(decay, drive.shape) * self.pack(state) + drive, dtype)
        return state, self.read(params, self.pack(state), x).astype(dtype)  # of the state itself: gradients find it

    def _unroll(self, params: Any, xs: Array, state: Any, run: Run) -> Any:
        dtype = errors.float_dtype(params)
        decay, drive = self.coefficients(params, xs)
        start = self.pack(self.initial_state(params, run.batch_shape))
        if decay.ndim < drive.ndim and (run.keep is not None or run.reset is not None):
            decay = jnp.broadcast_to(decay, (*xs.shape[:-1], *decay.shape))
        if run.keep is not None:
            decay, drive = masks.select(run.keep, (decay, drive), (jnp.ones_like(decay), jnp.zeros_like(drive)))
        if run.reset is not None:
            fresh = jnp.broadcast_to(decay * start[None], drive.shape)
            drive = drive + masks.zero_unless(run.reset, fresh)
        last, states = linear_scan(decay, drive, self.pack(state), reset=run.reset, reverse=run.reverse)
        if run.keep is not None:
            states = masks.select(run.keep, states, jnp.broadcast_to(start[None], states.shape))
        ys = self.read(params, states, xs).astype(dtype)
        return self.unpack(last, dtype), ys if run.keep is None else masks.zero_unless(run.keep, ys)


class GatedLinear(LinearRecurrence):
    """A real linear recurrence of gates that are products of the input, whose output is its state.

    A subclass gives `gates`, their names in the order of the kernel, and `coefficients`.
    """

    gates: ClassVar[tuple[str, ...]]

    @property
    @abc.abstractmethod
    def output_size(self) -> int:
        """The number of units."""

    def init(self, key: Array) -> Any:
        errors.check_key(self, key)
        shape = (len(self.gates), self.output_size)
        return LinearParams(_glorot(key, (self.input_size, *shape)), jnp.zeros(shape))

    def axes(self) -> Any:
        return LINEAR_AXES

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> LinearState:
        return LinearState(self.zeros(params, batch_shape, self.output_size))

    def products(self, params: Any, x: Array) -> tuple[Array, ...]:
        """x W + b of each gate, widened."""
        gates = widen(jnp.tensordot(x, params.input_kernel, 1))
        gates = gates + jnp.broadcast_to(widen(params.bias), gates.shape)
        return tuple(jnp.moveaxis(gates, -2, 0))

    def read(self, params: Any, hidden: Array, x: Array) -> Array:
        return hidden


class MinGRU(GatedLinear):
    """Minimal GRU for parallel training: a GRU whose gates do not look at its state.

        z, n = x W + b
        h' = (1 - σ(z)) g(n) + σ(z) h,   y = h'

    g(n) = n + 1/2 above 0 and σ(n) below ("positive") is the candidate of the paper's final model, which is computed
    there in logarithms; here no logarithm is needed. `activation="identity"` is its first model. As in every GRU here
    z keeps: the paper's z is 1 - z. Layers of it are stacked, as each gate sees one input only.

    L. Feng et al., Were RNNs all we needed?, arXiv:2410.01201, 2024.

    >>> cell = MinGRU(input_size=2, hidden_size=3)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("z", "n")
    keeps: ClassVar[tuple[str, ...]] = ("z",)

    hidden_size: int
    _: dataclasses.KW_ONLY
    activation: Activation = "positive"

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def coefficients(self, params: LinearParams, x: Array) -> tuple[Array, Array]:
        z, n = self.products(params, x)
        return jax.nn.sigmoid(z), jax.nn.sigmoid(-z) * activation(self.activation)(n)


class MinLSTM(GatedLinear):
    """Minimal LSTM for parallel training: gates that do not look at its state and share one whole.

        i, f, n = x W + b
        h' = (σ(f) h + σ(i) g(n)) / (σ(f) + σ(i)),   y = h'

    g is that of `MinGRU`. The shares are computed from the difference of logarithms, so both gates may underflow.

    L. Feng et al., Were RNNs all we needed?, arXiv:2410.01201, 2024.

    >>> cell = MinLSTM(input_size=2, hidden_size=3)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "n")

    hidden_size: int
    _: dataclasses.KW_ONLY
    activation: Activation = "positive"

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array) -> LinearParams:
        params = super().init(key)
        return params._replace(bias=params.bias.at[self.gates.index("f")].set(1.0))

    def coefficients(self, params: LinearParams, x: Array) -> tuple[Array, Array]:
        i, f, n = self.products(params, x)
        odds = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)
        return jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds) * activation(self.activation)(n)


class RGLRUParams(NamedTuple):
    """The parameters of a real-gated linear recurrent unit."""

    input_kernel: Float[Array, "input gate hidden"]
    bias: Float[Array, "gate hidden"]
    decay: Float[Array, "hidden"]


class RGLRU(GatedLinear):
    """Real-gated linear recurrent unit, the recurrence of Griffin and RecurrentGemma.

        r, i = x W + b
        log a = 8 σ(r) log σ(λ)
        h' = a h + √(1 - a²) (σ(i) x),   y = h'

    It has as many inputs as units. `decay`, λ, starts so that a^8 at an open gate is uniform in [0.9, 0.999].

    S. De et al., Griffin: mixing gated linear recurrences with local attention for efficient language models,
    arXiv:2402.19427, 2024.

    >>> cell = RGLRU(input_size=3)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 3)))[1].shape
    (5, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "i")
    keeps_size: ClassVar[bool] = True

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: Array) -> RGLRUParams:
        key, decay_key = jax.random.split(key)
        log_decay = jnp.log(jax.random.uniform(decay_key, (self.input_size,), minval=0.9, maxval=0.999)) / 8
        return RGLRUParams(*super().init(key), decay=log_decay - jnp.log(-jnp.expm1(log_decay)))

    def axes(self) -> Any:
        return RGLRUParams._make((*LINEAR_AXES, PartitionSpec("hidden")))

    def coefficients(self, params: Any, x: Array) -> tuple[Array, Array]:
        r, i = self.products(params, x)
        rate = 8 * jax.nn.log_sigmoid(widen(params.decay))
        log_decay = jax.nn.sigmoid(r) * jnp.broadcast_to(rate, r.shape)
        scale = safe_sqrt(-jnp.expm1(2 * log_decay))
        return jnp.exp(log_decay), scale * jax.nn.sigmoid(i) * widen(x)


def safe_sqrt(x: Array) -> Array:
    """√x of x >= 0, whose gradient at 0 is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
