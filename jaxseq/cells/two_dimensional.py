"""Recurrences in two dimensions: a step reads a row, and all of them go by diagonals."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.elman import ElmanState
from jaxseq.cells.gated import init_gated
from jaxseq.cells.lstm import LSTMState
from jaxseq.core import errors, masks
from jaxseq.core.activations import Activation, activation
from jaxseq.core.cell import Cell, Run
from jaxseq.core.scan import scan
from jaxseq.core.sharding import leading_spec, placed
from jaxseq.core.unroll import scan_from_fresh


class Recurrent2DParams(NamedTuple):
    """The parameters of a two-dimensional recurrence."""

    input_kernel: Float[Array, "input gate hidden"]
    above_kernel: Float[Array, "recurrent gate hidden"]
    left_kernel: Float[Array, "recurrent gate hidden"]
    bias: Float[Array, "gate hidden"]


class Recurrent2D(Cell):
    """A cell whose step reads a row `[*batch, width, channels]` from the left, and sees the row above.

        z = x W + h_above A + h_left L + b,   state = update(above, left, z)

    The state holds the last row. `unroll` goes by diagonals, all of whose places are computed at once: height + width
    - 1 steps. A subclass gives `gates`, `update`, and `initial_state`, a NamedTuple with a field `hidden`. A masked row
    is as if it were not there.
    """

    gates: ClassVar[tuple[str, ...]]
    input_rank = 2
    output_rank = 2

    input_shape: tuple[int, int]
    hidden_size: int
    _: dataclasses.KW_ONLY
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.input_shape
        if not errors.are_sizes(shape) or len(shape) != 2:
            raise ValueError(
                f"{type(self).__name__} needs the shape of a row, (width, channels), as input_shape, got {shape!r}."
            )

    @property
    def input_size(self) -> int:
        return self.input_shape[-1]

    @property
    def output_size(self) -> int:
        return self.hidden_size

    @abc.abstractmethod
    def update(self, above: Any, left: Any, z: list[Array]) -> Any:
        """The state of a place from the states of its neighbours and the sums of its gates."""

    def init(self, key: Array) -> Recurrent2DParams:
        errors.check_key(self, key)
        above, left = (
            init_gated(key, self.input_size, len(self.gates), self.hidden_size) for key in jax.random.split(key)
        )
        return Recurrent2DParams(above.input_kernel, above.recurrent_kernel, left.recurrent_kernel, above.bias)

    def axes(self) -> Any:
        recurrent = PartitionSpec("recurrent", "gate", "hidden")
        return Recurrent2DParams._make(
            (PartitionSpec("input", "gate", "hidden"), recurrent, recurrent, PartitionSpec("gate", "hidden"))
        )

    def zeros(self, params: Any, batch_shape: tuple[int, ...]) -> Float[Array, "*batch width hidden"]:
        """The start of a state, in the dtype of the params."""
        errors.check_params(self, params)
        return jnp.zeros((*batch_shape, self.input_shape[0], self.hidden_size), params.bias.dtype)

    def zero_input(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Array:
        return jnp.zeros((*batch_shape, *self.input_shape), params.bias.dtype)

    def step(self, params: Any, state: Any, x: Float[Array, "*batch width input"], key: Any = None) -> Any:
        z = self._from_input(params, state, x, x.shape[:-2])

        def place(left, inputs):
            above, z = inputs
            new = self._advance(params, above, left, z)
            return new, new

        columns = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -2, 0), (state, z))
        edge = self._edge(params, state)
        _, new = scan_from_fresh(scan, place, edge, columns, self.input_shape[0], False)
        state = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -2), new)
        return state, state.hidden

    def _unroll(self, params: Any, xs: Array, state: Any, run: Run) -> tuple[Any, Array]:
        z = self._from_input(params, state, xs, run.batch_shape)
        height, width = run.length, self.input_shape[0]
        if height == 0:
            return state, jnp.zeros((*xs.shape[:-1], self.hidden_size), xs.dtype)
        keep, reset = run.keep, run.reset
        if run.reverse:
            z, keep, reset = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), (z, keep, reset))
        # one entry a diagonal: of all rows, and of the row above the first
        z = jnp.moveaxis(_skew(jnp.moveaxis(z, -2, 1)), 1, 0)
        top = jax.tree.map(lambda leaf: _padded(jnp.moveaxis(leaf, -2, 0), height - 1), state)
        edge = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (height, *leaf.shape)), self._edge(params, state))
        row = jax.lax.broadcasted_iota(jnp.int32, (height, *run.batch_shape), 0)

        def diagonal(before, inputs):
            number, z, top = inputs
            above = jax.tree.map(lambda first, leaf: jnp.concatenate([first[None], leaf[:-1]]), top, before)
            left = masks.select(row == number, edge, before)
            if reset is not None:
                above = masks.select(reset, edge, above)
            if keep is None:
                new = self._advance(params, above, left, z)
            else:  # as masks.hold
                read, beside = masks.select(keep, (above, left), (edge, edge))
                new = masks.select(keep, self._advance(params, read, beside, z), above)
            return new, (new.hidden, jax.tree.map(lambda leaf: leaf[-1], new))

        inputs = (jnp.arange(height + width - 1, dtype=jnp.int32), z, top)
        _, (ys, last) = scan_from_fresh(scan, diagonal, edge, inputs, height + width - 1, False)
        ys = jnp.moveaxis(_unskew(jnp.moveaxis(ys, 0, 1), width), 1, -2)
        if keep is not None:
            ys = masks.zero_unless(keep, ys)
        if run.reverse:
            ys = jnp.flip(ys, 0)
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf[height - 1 :], 0, -2), last), ys

    def _edge(self, params: Any, state: Any) -> Any:
        """What the first place of a row has to its left: the initial state of a place."""
        batch_shape = state.hidden.shape[:-2]
        edge = placed(self.initial_state(params, batch_shape), leading_spec(state, len(batch_shape)))
        return jax.tree.map(lambda leaf: leaf[..., 0, :], edge)

    def _from_input(self, params: Any, state: Any, x: Array, batch_shape: tuple[int, ...]) -> Array:
        errors.check_params(self, params)
        if x.shape[-2:] != self.input_shape:
            raise ValueError(f"{self} got rows of shape {x.shape[-2:]}; they need its input_shape {self.input_shape}.")
        errors.check_dtype(self, x, params.bias.dtype)
        errors.check_state(self, state, jax.eval_shape(lambda p: self.initial_state(p, batch_shape), params))
        z = jnp.tensordot(x, params.input_kernel.reshape(self.input_size, -1), 1)
        return z + jnp.broadcast_to(params.bias.reshape(-1), z.shape)

    def _advance(self, params: Any, above: Any, left: Any, z: Array) -> Any:
        for neighbour, kernel in ((above, params.above_kernel), (left, params.left_kernel)):
            z = z + jnp.tensordot(neighbour.hidden, kernel.reshape(self.hidden_size, -1), 1)
        return self.update(above, left, jnp.split(z, len(self.gates), axis=-1))


class Elman2D(Recurrent2D):
    """A simple recurrence in two dimensions, from the top left.

        h = tanh(x W + h_above A + h_left L + b),   y = h

    A. Graves et al., Multi-dimensional recurrent neural networks, ICANN 2007.

    >>> cell = Elman2D(input_shape=(5, 1), hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((2, 7, 5, 1)))
    >>> ys.shape, state.hidden.shape
    ((2, 7, 5, 3), (2, 5, 3))
    """

    gates: ClassVar[tuple[str, ...]] = ("h",)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> ElmanState:
        return ElmanState(self.zeros(params, batch_shape))

    def update(self, above: Any, left: Any, z: list[Array]) -> ElmanState:
        return ElmanState(activation(self.activation)(z[0]))


class LSTM2D(Recurrent2D):
    """Long short-term memory in two dimensions, from the top left, with a forget gate for each (MDLSTM).

        i, f_a, f_l, g, o = x W + h_above A + h_left L + b
        c = σ(f_a) c_above + σ(f_l) c_left + σ(i) tanh(g)
        h = σ(o) tanh(c),   y = h

    Biases start at 0, those of the forget gates too: the two then sum to 1, and what is remembered along all the ways
    through an image does not grow. The paper's peepholes are left out.

    A. Graves et al., Multi-dimensional recurrent neural networks, ICANN 2007.

    >>> cell = LSTM2D(input_shape=(5, 1), hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((7, 5, 1)))
    >>> ys.shape, state.cell.shape
    ((7, 5, 3), (5, 3))
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f_a", "f_l", "g", "o")
    keeps: ClassVar[tuple[str, ...]] = ("f_a", "f_l")

    _: dataclasses.KW_ONLY
    gate_activation: Activation = "sigmoid"

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> LSTMState:
        return LSTMState(self.zeros(params, batch_shape), self.zeros(params, batch_shape))

    def update(self, above: Any, left: Any, z: list[Array]) -> LSTMState:
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        i, f_a, f_l, g, o = z
        cell = sigma(f_a) * above.cell + sigma(f_l) * left.cell + sigma(i) * tanh(g)
        return LSTMState(hidden=sigma(o) * tanh(cell), cell=cell)


def _padded(leaf: Array, count: int) -> Array:
    return jnp.pad(leaf, [(0, count)] + [(0, 0)] * (leaf.ndim - 1))


def _skew(rows: Float[Array, "height width ..."]) -> Float[Array, "height diagonal ..."]:
    """Row i moved right by i places, with zeros around."""
    height, width, *rest = rows.shape
    wide = jnp.pad(rows, [(0, 0), (0, height)] + [(0, 0)] * len(rest))
    flat = wide.reshape(height * (width + height), *rest)[: height * (width + height - 1)]
    return flat.reshape(height, width + height - 1, *rest)


def _unskew(rows: Float[Array, "height diagonal ..."], width: int) -> Float[Array, "height width ..."]:
    """What `_skew` was given."""
    height, diagonals, *rest = rows.shape
    flat = _padded(rows.reshape(height * diagonals, *rest), height)
    return flat.reshape(height, diagonals + 1, *rest)[:, :width]
