"""Cells on the time scales of given segments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxseq.combinators.stack import Stack
from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell
from jaxseq.core.unroll import Run


class HierarchicalState(NamedTuple):
    """The state of a hierarchy: those of its cells, and what the cells above the lowest last gave."""

    layers: tuple[Any, ...]
    outputs: tuple[Float[Array, "*batch output"], ...]


class Hierarchical(Stack):
    """Cells one above another, of which the upper ones step only where a segment ends: letters, words, sentences.

    It reads pairs `(x, boundary)`, the boundary being an integer for each step: 0 within a word, 1 at its last letter,
    2 at the last letter of a sentence, ... Two cells may be given flags, True at the last letter of a word. The lowest
    cell steps each time. Cell number l steps where boundary >= l, reading what the cell below gives there, and what it
    gives stays until it steps again (zeros before it first does).
    After a boundary the cells below the one that it ends start afresh: each reads one segment, and what they read
    before reaches them no more. The output is that of all cells, side by side.

        s_l', y_l' = cell_l(s_l, y_{l-1}')  where boundary >= l, else s_l, y_l       (y_{-1}' = x, l = 0, 1, ...)
        s_l'       = initial state          where boundary > l, after that            (the topmost cell is never reset)

    S. El Hihi and Y. Bengio, Hierarchical recurrent neural networks for long-term dependencies, NeurIPS 1995; J. Chung
    et al., Hierarchical multiscale recurrent neural networks, ICLR 2017, with boundaries that are given.

    >>> import jaxseq as js
    >>> cell = js.Hierarchical((js.LSTM(2, 3), js.GRU(3, 4)))
    >>> ends = jnp.array([0, 0, 1, 0, 1])
    >>> cell.unroll(cell.init(jax.random.key(0)), (jnp.ones((5, 2)), ends))[1].shape
    (5, 7)
    """

    input_names = ("x", "boundary")  # pyright: ignore[reportAssignmentType]
    any_rank = False  # pyright: ignore[reportAssignmentType]
    output_rank = 1  # pyright: ignore[reportAssignmentType]
    keeps_size = False  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) < 2:
            raise ValueError(f"Hierarchical needs two cells or more, got {self.layers}.")
        if not all(isinstance(getattr(layer, "output_size", None), int) for layer in self.layers):
            raise TypeError(f"Hierarchical needs cells of known output_size, got {self.layers}.")

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layers[0].input_rank, 0

    @property
    def input_size(self) -> Any:
        return getattr(self.layers[0], "input_size", None), None

    @property
    def output_size(self) -> int:
        return sum(layer.output_size for layer in self.layers)  # pyright: ignore[reportAttributeAccessIssue]

    def zero_input(self, params: Any, batch_shape: tuple[int, ...] = ()) -> tuple[Any, Int[Array, "*batch"]]:
        return self.layers[0].zero_input(params[0], batch_shape), jnp.zeros(batch_shape, int)

    def initial_state(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> HierarchicalState:
        dtype = errors.float_dtype(params) or jnp.zeros(()).dtype
        sizes = [layer.output_size for layer in self.layers[1:]]  # pyright: ignore[reportAttributeAccessIssue]
        outputs = tuple(jnp.zeros((*batch_shape, size), dtype) for size in sizes)
        return HierarchicalState(super().initial_state(params, batch_shape), outputs)

    def step(self, params: Any, state: HierarchicalState, x: Any, key: Array | None = None) -> Any:
        self._check(params)
        x, boundary = x
        boundary = self._levels(boundary)
        keys = [None] * len(self.layers) if key is None else jax.random.split(key, len(self.layers))
        states, outputs = [], []
        for level, layer in enumerate(self.layers):
            after, y = layer.step(params[level], state.layers[level], x, keys[level])
            if level > 0:
                before = (state.layers[level], state.outputs[level - 1])
                after, y = masks.select(boundary >= level, (after, y), before)
            if level < len(self.layers) - 1:
                start = layer.initial_state(params[level], boundary.shape)
                after = masks.select(boundary > level, start, after)
            states.append(after)
            outputs.append(y)
            x = y
        return HierarchicalState(tuple(states), tuple(outputs[1:])), jnp.concatenate(outputs, axis=-1)

    def _levels(self, boundary: Array) -> Int[Array, "*batch"]:
        """The boundaries as integers."""
        boundary, top = jnp.asarray(boundary), len(self.layers) - 1
        if boundary.dtype == jnp.bool_ and top == 1:
            return boundary.astype(jnp.int32)
        if not jnp.issubdtype(boundary.dtype, jnp.integer):
            flags = " (flags are for two cells)" if boundary.dtype == jnp.bool_ else ": cast them with .astype(int)"
            raise TypeError(
                f"{self} reads boundaries of 0 within the lowest segments to {top} at the ends of the highest, integers"
                f"{flags}; got {errors.shape_of(boundary)}."
            )
        return boundary

    def _unroll(self, params: Any, xs: Any, state: HierarchicalState, run: Run) -> tuple[Any, Any]:
        return Cell._unroll(self, params, xs, state, run)
