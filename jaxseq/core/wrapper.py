"""Layers around another layer."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxseq.core.cell import Cell, Params, SequenceLayer, State
from jaxseq.core.layer import Layer
from jaxseq.core.unroll import Run


class Wrapper(Cell):
    """A layer around another one, which it forwards to; subclasses change one thing.

    It is a cell if the inner layer is one: around another layer, such as `Bidirectional`, it only unrolls, and
    `isinstance(wrapper, Cell)` is False. A subclass that takes cells alone says `cell: Cell`.

    Its params are those of the cell; a subclass that computes the cell's params from its own overrides `inner`, and one
    that has more of them extends `Extended`.

    One that changes `step` unrolls by it, and so does, where there are resets, one that changes `initial_state`. What
    the inner cell does to save memory when it unrolls (`Remat`) therefore goes around such a wrapper, not into it.
    """

    cell: SequenceLayer

    changes_state: ClassVar[bool] = False  # draws, learns, mixes or clips the arrays of the cell's state
    changes_kernels: ClassVar[bool] = False
    saves_memory: ClassVar[bool] = False  # by how it unrolls

    def __post_init__(self) -> None:
        super().__post_init__()
        name, own = type(self).__name__, type(self)
        by_step = own._unroll is Wrapper._unroll and (own.step is not Wrapper.step or _starts_anew(own))
        fields = {field.name: field.type for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        if not isinstance(self.cell, SequenceLayer):
            raise TypeError(f"{name} needs a cell, but {self.cell!r} is not a cell.")
        if by_step or fields["cell"] is not SequenceLayer:
            check_steps(self, self.cell)
        for layer in layers_within(self.cell):
            inner = type(layer).__name__
            if by_step and getattr(layer, "saves_memory", False):
                raise TypeError(
                    f"{name} unrolls step by step, so that {inner} inside would do nothing: put {inner} around."
                )
            if self.changes_kernels and getattr(layer, "changes_kernels", False):
                raise TypeError(f"{name} and {inner} both change kernels and would undo each other: use one of them.")
        check_free(self, self.cell if self.changes_state else None)

    @property
    def _is_cell(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return isinstance(self.cell, Cell)

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.input_rank

    @property
    def any_rank(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.any_rank

    @property
    def output_rank(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.output_rank

    @property
    def input_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.input_names

    @property
    def keeps_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.keeps_size

    @property
    def input_size(self) -> Any:
        return getattr(self.cell, "input_size", None)

    @property
    def output_size(self) -> Any:
        return getattr(self.cell, "output_size", None)

    def inner(self, params: Params) -> Params:
        """The params of the cell, from those of the wrapper."""
        return params

    def init(self, key: Array) -> Params:
        return self.cell.init(key)

    def initial_state(self, params: Params, batch_shape: tuple[int, ...] = ()) -> State:
        return self.cell.initial_state(self.inner(params), batch_shape)

    def draw(self, params: Params, key: Array) -> Params:
        return self.cell.draw(params, key)

    def attach(self, params: Params, memory: Any, mask: Bool[Array, "*batch memory"] | None = None) -> Params:
        return self.cell.attach(params, memory, mask)

    def axes(self) -> Any:
        return self.cell.axes()

    def map_layers(self, function: Callable[[Layer, Params], Params], params: Params) -> Params:
        return function(self, self.cell.map_layers(function, params))

    def zero_input(self, params: Params, batch_shape: tuple[int, ...] = ()) -> Any:
        return self.cell.zero_input(self.inner(params), batch_shape)

    def step(self, params: Params, state: State, x: Any, key: Array | None = None) -> tuple[State, Any]:
        cell: Any = self.cell
        return cell.step(self.inner(params), state, x, key)

    def output_run(self, run: Run) -> Run:
        return self.cell.output_run(run)

    def _unroll(self, params: Params, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        starts = run.reset is None or not _starts_anew(type(self))  # as the cell's resets do
        if starts and type(self).step is Wrapper.step:
            return self.cell._unroll(self.inner(params), xs, state, run)
        return super()._unroll(params, xs, state, run)


class Extended(Wrapper):
    """A wrapper with params of its own: a NamedTuple whose field `cell` holds those of the cell.

    A subclass gives `init` and `axes`, which make that tuple, and changes one thing.
    """

    def inner(self, params: Any) -> Params:
        return params.cell

    def draw(self, params: Any, key: Array) -> Params:
        return params._replace(cell=self.cell.draw(params.cell, key))

    def attach(self, params: Any, memory: Any, mask: Bool[Array, "*batch memory"] | None = None) -> Params:
        return params._replace(cell=self.cell.attach(params.cell, memory, mask))

    def map_layers(self, function: Callable[[Layer, Params], Params], params: Any) -> Params:
        return function(self, params._replace(cell=self.cell.map_layers(function, params.cell)))


class Reader(Wrapper):
    """A cell as a function of this library reads it; errors and profiles name that function, and the cell."""

    cell: Cell

    def __init_subclass__(cls, function: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__name__ = function or cls.__name__

    def __repr__(self) -> str:
        return repr(self.cell)


def check_steps(wrapper: SequenceLayer, layer: SequenceLayer) -> None:
    """Raises TypeError unless the layer is a cell, for a wrapper that needs its steps."""
    if not isinstance(layer, Cell):
        raise TypeError(
            f"{type(wrapper).__name__} needs a cell, but {layer} has no step: it reads whole sequences; give it the "
            "cells inside."
        )


def check_free(wrapper: SequenceLayer, cell: SequenceLayer | None) -> None:
    """Raises TypeError if the wrapper may not change the arrays of the cell's state one by one."""
    for layer in layers_within(cell) if cell is not None else ():
        if isinstance(layer, Cell) and not layer.free_state:
            name = type(wrapper).__name__
            raise TypeError(f"{name} changes arrays of the state one by one, but those of {layer} belong together.")


def _starts_anew(wrapper: type[Wrapper]) -> bool:
    return wrapper.initial_state is not Wrapper.initial_state


def layers_within(layer: SequenceLayer) -> Iterator[SequenceLayer]:
    """A layer, and all that it holds in its fields."""
    yield layer
    for field in dataclasses.fields(layer):  # pyright: ignore[reportArgumentType]
        value = getattr(layer, field.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, SequenceLayer):
                yield from layers_within(inner)


def follow(y: Any, state: State, changed: State) -> Any:
    """The output of a step whose new `state` was `changed`: what is a part of the state stays that part."""
    parts = zip(jax.tree.leaves(state), jax.tree.leaves(changed), strict=True)
    now = {id(before): after for before, after in parts}
    return jax.tree.map(lambda leaf: now.get(id(leaf), leaf), y)


def each_array(layer: Cell, function: Callable[..., Any], numbers: Any, *states: State) -> State:
    """`function(number, *arrays)` of the floating arrays of states of one tree; other arrays are those of the last.

    `numbers` is one for all arrays or a tuple with one for each floating one.
    """
    *others, last = states
    leaves, tree = jax.tree.flatten(last)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    if not isinstance(numbers, tuple):
        numbers = (numbers,) * sum(floating)
    if not floating or len(numbers) != sum(floating):
        raise ValueError(f"{layer} has {len(numbers)} numbers for a state of {sum(floating)} floating arrays.")
    rest = [jax.tree.leaves(other) for other in others]
    each = iter(numbers)
    changed = [
        function(next(each), *leaves) if is_floating else leaves[-1]
        for is_floating, *leaves in zip(floating, *rest, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, changed)
