"""Recurrences over fields: lines, images and volumes, by convolutions in place of products."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.gru import GRUState
from jaxseq.cells.lstm import LSTMState
from jaxseq.core import errors
from jaxseq.core.activations import Activation, activation
from jaxseq.core.cell import Cell

_glorot = initializers.glorot_uniform(in_axis=0, out_axis=-1, batch_axis=-2)
_orthogonal = initializers.orthogonal()


class ConvolutionalParams(NamedTuple):
    """The parameters of a convolutional cell; `window` stands for one to three axes of places."""

    input_kernel: Float[Array, "input *window gate hidden"]
    recurrent_kernel: Float[Array, "recurrent *window gate hidden"]
    bias: Float[Array, "gate hidden"]


class Convolutional(Cell):
    """A cell whose input and hidden state are fields `[*batch, *places, channels]`, with one to three axes of places.

    `input_shape` is the shape of one step's input, such as (height, width, channels); `hidden_size` counts the channels
    of the state at each place; `kernel_size` is the window of both convolutions, one number or one for each axis.
    Places outside of the field count as zeros ("SAME" padding), so the state has the places of the input.

    A subclass gives `gates`, their names in the order of the kernels, `initial_state` and `step`.
    """

    gates: ClassVar[tuple[str, ...]]

    input_shape: tuple[int, ...]
    hidden_size: int
    kernel_size: int | tuple[int, ...] = 3
    _: dataclasses.KW_ONLY
    activation: Activation = "tanh"
    gate_activation: Activation = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not errors.are_sizes(self.input_shape) or not 2 <= len(self.input_shape) <= 4:
            raise ValueError(
                f"{name} needs an input_shape (*places, channels) with one to three axes of places, such as "
                f"(28, 28, 1), got {self.input_shape!r}."
            )
        if not errors.are_sizes(self.window) or len(self.window) != len(self.input_shape) - 1:
            raise ValueError(
                f"{name} needs a kernel_size that is one number, or one for each of the {len(self.input_shape) - 1} "
                f"axes of places, got {self.kernel_size!r}."
            )

    @property
    def input_rank(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.input_shape)

    @property
    def output_rank(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.input_rank

    @property
    def input_size(self) -> int:
        return self.input_shape[-1]

    @property
    def output_size(self) -> int:
        return self.hidden_size

    @property
    def window(self) -> tuple[int, ...]:
        """The size of the kernels along each axis of places."""
        size = self.kernel_size
        return size if isinstance(size, tuple) else (size,) * (len(self.input_shape) - 1)

    def init(self, key: Array) -> ConvolutionalParams:
        errors.check_key(self, key)
        input_key, recurrent_key = jax.random.split(key)
        gates, hidden = len(self.gates), self.hidden_size
        orthogonal = jax.vmap(lambda key: _orthogonal(key, (hidden, *self.window, hidden)), out_axes=-2)
        return ConvolutionalParams(
            input_kernel=_glorot(input_key, (self.input_size, *self.window, gates, hidden)),
            recurrent_kernel=orthogonal(jax.random.split(recurrent_key, gates)),
            bias=jnp.zeros((gates, hidden)),
        )

    def axes(self) -> Any:
        places = ("depth", "height", "width")[-len(self.window) :]
        kernels = (PartitionSpec(role, *places, "gate", "hidden") for role in ("input", "recurrent"))
        return ConvolutionalParams._make((*kernels, PartitionSpec("gate", "hidden")))

    def zero_input(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Array:
        return jnp.zeros((*batch_shape, *self.input_shape), params.bias.dtype)

    def zeros(self, params: Any, batch_shape: tuple[int, ...]) -> Float[Array, "*batch_places hidden"]:
        """The start of a state, in the dtype of the params."""
        errors.check_params(self, params)
        return jnp.zeros((*batch_shape, *self.input_shape[:-1], self.hidden_size), params.bias.dtype)

    def check(self, params: Any, state: Any, x: Array) -> None:
        """Raises unless params, state and input are those of this cell, with the same batch axes and one dtype."""
        errors.check_params(self, params)
        batch_shape = x.shape[: x.ndim - self.input_rank]
        if x.shape != (*batch_shape, *self.input_shape):
            raise ValueError(
                f"{self} got inputs whose steps have the shape {x.shape[len(batch_shape) :]}; they need its "
                f"input_shape {self.input_shape}."
            )
        errors.check_dtype(self, x, params.bias.dtype)
        errors.check_state(self, state, jax.eval_shape(lambda p: self.initial_state(p, batch_shape), params))

    def convolve(self, x: Array, kernel: Array, bias: Array | None = None) -> list[Array]:
        """The gates of `x` convolved with `kernel` `[input, *window, gate, hidden]`, plus `bias` `[gate, hidden]`."""
        *kept, gates, hidden = kernel.shape
        rank, batch_rank = self.input_rank, x.ndim - self.input_rank
        spec = jax.typeof(x).sharding.spec[:batch_rank]
        first = next((axis for axis, name in enumerate(spec) if name is not None), 0)
        x = jnp.moveaxis(x, first, 0) if first else x  # axes merge where the first alone is sharded
        places = "DHW"[1 - rank :]
        z = jax.lax.conv_general_dilated(
            x.reshape(math.prod(x.shape[:batch_rank]), *x.shape[batch_rank:]),
            jnp.moveaxis(kernel.reshape(*kept, gates * hidden), 0, -2),
            window_strides=(1,) * (rank - 1),
            padding="SAME",
            dimension_numbers=(f"N{places}C", f"{places}IO", f"N{places}C"),
        )
        z = z.reshape(*x.shape[:batch_rank], *z.shape[1:])
        z = jnp.moveaxis(z, 0, first) if first else z
        if bias is not None:
            z = z + jnp.broadcast_to(bias.reshape(-1), z.shape)
        return jnp.split(z, gates, axis=-1)


class ConvLSTM(Convolutional):
    """Long short-term memory over fields: `*` convolves.

        i, f, g, o = W * x + R * h + b
        c' = σ(f) c + σ(i) tanh(g)
        h' = σ(o) tanh(c'),   y = h'

    The forget gate's bias starts at 1. The paper's peepholes are left out, as flax, haiku and Keras do: they have a
    weight for each place, and so alone would tie the parameters to one size of the field.

    X. Shi et al., Convolutional LSTM network: a machine learning approach for precipitation nowcasting, NIPS 2015.

    >>> cell = ConvLSTM(input_shape=(8, 6, 1), hidden_size=4, kernel_size=(3, 3))
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((2, 5, 8, 6, 1)))
    >>> ys.shape, state.cell.shape
    ((2, 5, 8, 6, 4), (2, 8, 6, 4))
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")

    def init(self, key: Array) -> ConvolutionalParams:
        params = super().init(key)
        return params._replace(bias=params.bias.at[1].set(1))

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> LSTMState:
        return LSTMState(self.zeros(params, batch_shape), self.zeros(params, batch_shape))

    def step(self, params: Any, state: LSTMState, x: Float[Array, "*batch_places input"], key: Any = None) -> Any:
        self.check(params, state, x)
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        from_input = self.convolve(x, params.input_kernel, params.bias)
        from_hidden = self.convolve(state.hidden, params.recurrent_kernel)
        i, f, g, o = map(jnp.add, from_input, from_hidden)
        cell = sigma(f) * state.cell + sigma(i) * tanh(g)
        hidden = sigma(o) * tanh(cell)
        return LSTMState(hidden, cell), hidden


class ConvGRU(Convolutional):
    """Gated recurrent unit over fields, the reset gate before the recurrent convolution: `*` convolves.

        r, z, n = W * x + b
        n' = tanh(n + R_n * (σ(r + R_r * h) h))
        h' = (1 - σ(z + R_z * h)) n' + σ(z + R_z * h) h,   y = h'

    The gate z keeps, as in every GRU here; that of the paper lets in.

    N. Ballas et al., Delving deeper into convolutional networks for learning video representations, ICLR 2016.

    >>> cell = ConvGRU((8, 1), 4, kernel_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 8, 1)))
    >>> ys.shape
    (5, 8, 4)
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    keeps: ClassVar[tuple[str, ...]] = ("z",)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> GRUState:
        return GRUState(self.zeros(params, batch_shape))

    def step(self, params: Any, state: GRUState, x: Float[Array, "*batch_places input"], key: Any = None) -> Any:
        self.check(params, state, x)
        sigma, hidden = activation(self.gate_activation), state.hidden
        r, z, n = self.convolve(x, params.input_kernel, params.bias)
        u_r, u_z = self.convolve(hidden, params.recurrent_kernel[..., :2, :])
        (u_n,) = self.convolve(sigma(r + u_r) * hidden, params.recurrent_kernel[..., 2:, :])
        update = sigma(z + u_z)
        hidden = (1 - update) * activation(self.activation)(n + u_n) + update * hidden
        return GRUState(hidden), hidden
