"""What cells with one recurrent product share: their parameters, their products, and the layout of their gates."""

import abc
import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.core import errors
from jaxseq.core.cell import Cell
from jaxseq.core.wrapper import Wrapper

_glorot = initializers.glorot_uniform(in_axis=0, out_axis=2, batch_axis=1)
_orthogonal = initializers.orthogonal()


class GatedParams(NamedTuple):
    """The parameters of a gated cell."""

    input_kernel: Float[Array, "input gate hidden"]
    recurrent_kernel: Float[Array, "recurrent gate hidden"]
    bias: Float[Array, "gate hidden"]


GATED_AXES: Any = GatedParams._make(  # specs stand where the arrays do
    (
        PartitionSpec("input", "gate", "hidden"),
        PartitionSpec("recurrent", "gate", "hidden"),
        PartitionSpec("gate", "hidden"),
    )
)


class Recurrent(Cell):
    """A cell that multiplies its input and its hidden state by kernels of several gates.

    A subclass gives `gates`, their names in the order of the kernels (the letters of its equations; "f" forgets),
    `initial_state` and `step`, and extends `init` and `axes` if it has more parameters. Where another gate than "f"
    keeps the state, `keeps` names it, as ("z",), or ("-u",) for one that lets in: initialisers go by it.

    `gate_layout` says how the products hold their gates: "flat" `[*batch, gate * hidden]` is the faster, "axis"
    `[*batch, gate, hidden]` keeps each unit whole where the params are sharded over `hidden`. None is flat unless the
    kernel's type says that its last axis is sharded.
    """

    gates: ClassVar[tuple[str, ...]]
    output_rank = 1

    input_size: int
    hidden_size: int
    _: dataclasses.KW_ONLY
    gate_layout: Literal["flat", "axis"] | None = dataclasses.field(default=None, metadata={"json": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_layout not in ("flat", "axis", None):
            raise ValueError(f'gate_layout is "flat", "axis" or None, got {self.gate_layout!r}.')

    @property
    def gate_count(self) -> int:
        """How many gates the kernels hold."""
        return len(self.gates)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: Array) -> Any:
        errors.check_key(self, key)
        return init_gated(key, self.input_size, self.gate_count, self.hidden_size)

    def axes(self) -> Any:
        return GATED_AXES

    def check(self, params: Any, state: Any, x: Array) -> None:
        """Raises unless params, state and input are those of this cell, with the same batch axes and one dtype."""
        errors.check_params(self, params)
        errors.check_features(self, x, self.input_size)
        errors.check_dtype(self, x, params.input_kernel.dtype)
        errors.check_state(self, state, jax.eval_shape(lambda p: self.initial_state(p, x.shape[:-1]), params))

    def zeros(self, params: Any, batch_shape: tuple[int, ...], size: int | None = None) -> Float[Array, "*batch size"]:
        """The start of a state of `size` units, by default `hidden_size`, in the dtype of the params."""
        errors.check_params(self, params)
        if not isinstance(batch_shape, tuple):
            raise TypeError(f"{self} needs a tuple of sizes as batch_shape, such as (2,), got {batch_shape!r}.")
        return jnp.zeros((*batch_shape, size or self.hidden_size), params.input_kernel.dtype)

    def product(self, x: Array, kernel: Array, bias: Array | None = None) -> Array:
        """`x` times `kernel` `[features, gate, hidden]`, plus `bias` `[gate, hidden]`, in the layout of the gates."""
        if not self._gates_stay_an_axis(kernel):
            kernel = kernel.reshape(kernel.shape[0], -1)
            bias = None if bias is None else bias.reshape(-1)
        z = jnp.tensordot(x, kernel, 1)
        return z if bias is None else z + jnp.broadcast_to(bias, z.shape)

    def split_gates(self, z: Array, count: int | None = None) -> list[Array]:
        """The gates `[*batch, hidden]` of a product, in the order of the cell; `count` of them if not all."""
        count = count or self.gate_count
        if z.shape[-1] == count * self.hidden_size:
            return jnp.split(z, count, axis=-1)
        return [z[..., gate, :] for gate in range(count)]

    def _gates_stay_an_axis(self, kernel: Array) -> bool:
        if kernel.shape[1] == 1:
            return False
        if self.gate_layout is None:
            return jax.typeof(kernel).sharding.spec[-1] is not None
        return self.gate_layout == "axis"


class Gated(Recurrent):
    """A cell whose step is one product of the input, one of the hidden state, and a pointwise `update`.

        z_x = x W + b,   z_h = h R (+ a recurrent bias),   state' = update(state, z_x, z_h),   y = h'

    A subclass gives `gates`, `update` and `initial_state`, a NamedTuple with a field `hidden`.
    """

    @abc.abstractmethod
    def update(self, params: Any, state: Any, from_input: Array, from_recurrent: Array) -> Any:
        """The next state from the two products, each unit by itself."""

    def step(self, params: Any, state: Any, x: Float[Array, "*batch input"], key: Array | None = None) -> Any:
        return gated_step(self, params, state, x)

    def products(self, params: Any, hidden: Array, x: Array) -> tuple[Array, Array]:
        """The two products of a step, of the input and of the hidden state."""
        from_input = self.product(x, params.input_kernel, params.bias)
        return from_input, self.product(hidden, params.recurrent_kernel, getattr(params, "recurrent_bias", None))


def gated_step(cell: Any, params: Any, state: Any, x: Array) -> Any:
    """One step of a cell with `check`, `products` and `update`."""
    cell.check(params, state, x)
    state = cell.update(params, state, *cell.products(params, state.hidden, x))
    return state, state.hidden


def init_gated(
    key: Array, input_size: int, gate_count: int, hidden_size: int, recurrent_size: int | None = None
) -> GatedParams:
    """Glorot input kernels and orthogonal recurrent kernels, each gate for itself, and biases of 0.

    `recurrent_size` is the number of features that are fed back, by default `hidden_size`.
    """
    input_key, recurrent_key = jax.random.split(key)
    orthogonal = jax.vmap(lambda key: _orthogonal(key, (recurrent_size or hidden_size, hidden_size)), out_axes=1)
    return GatedParams(
        input_kernel=_glorot(input_key, (input_size, gate_count, hidden_size)),
        recurrent_kernel=orthogonal(jax.random.split(recurrent_key, gate_count)),
        bias=jnp.zeros((gate_count, hidden_size)),
    )


class GatedWrapper(Wrapper):
    """A wrapper that changes the products of a gated cell; such wrappers go into each other."""

    cell: Cell

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.cell, (Gated, GatedWrapper)):
            name, inner = type(self).__name__, type(self.cell).__name__
            cure = "its products are not plain"
            if isinstance(self.cell, Wrapper):
                cure = f"{name} goes next to the cell, {inner}({name}(cell))"
            elif hasattr(self.cell, "layers"):
                cure = f"it goes around the cells inside of {inner}"
            raise TypeError(
                f"{name} works on the products of a gated cell (a subclass of Gated, such as LSTM or GRU), but "
                f"{self.cell} is none: {cure}."
            )

    def check(self, params: Any, state: Any, x: Array) -> None:
        """Raises unless params, state and input are those of the gated cell."""
        self._gated.check(self.inner(params), state, x)

    def products(self, params: Any, hidden: Array, x: Array) -> tuple[Array, Array]:
        """The two products of a step, of the input and of the hidden state."""
        return self._gated.products(self.inner(params), hidden, x)

    def update(self, params: Any, state: Any, from_input: Array, from_recurrent: Array) -> Any:
        """The next state from the two products."""
        return self._gated.update(self.inner(params), state, from_input, from_recurrent)

    def step(self, params: Any, state: Any, x: Float[Array, "*batch input"], key: Array | None = None) -> Any:
        return gated_step(self, params, state, x)

    @property
    def _gated(self) -> Any:
        return self.cell
