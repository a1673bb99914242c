"""Other ways to unroll a cell, and its loop closed or opened: the step computes the same."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxseq.core import errors
from jaxseq.core.cell import Cell
from jaxseq.core.unroll import Run, scan_chunks, unroll_steps
from jaxseq.core.wrapper import Wrapper


class Plain(Wrapper):
    """A cell that unrolls by `lax.scan` of its `step` and nothing else: the reference for every faster way.

    >>> import jaxseq as js
    >>> cell = js.Plain(js.Elman(2, 3))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    cell: Cell

    def _unroll(self, params: Any, xs: Any, state: Any, run: Run) -> tuple[Any, Any]:
        return unroll_steps(lax.scan, self.cell, params, xs, state, run)


class Remat(Wrapper):
    """A cell that saves for the gradient only its state at every `every`-th step and recomputes the rest.

    What the steps save for the gradient falls from O(T) to O(T / every + every), for one more forward pass; inputs and
    outputs stay O(T). By default `every` is the square root of the number of steps.

    T. Chen et al., Training deep nets with sublinear memory cost, arXiv:1604.06174, 2016.

    >>> import jaxseq as js
    >>> cell = js.Remat(js.Elman(2, 3), every=4)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((10, 2)))[1].shape
    (10, 3)
    """

    saves_memory = True

    cell: Cell
    every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and self.every < 1:
            raise ValueError(f"Remat needs every >= 1 step, or None, got {self.every}.")

    def _unroll(self, params: Any, xs: Any, state: Any, run: Run) -> tuple[Any, Any]:
        every = self.every or max(1, math.isqrt(run.length))

        @functools.partial(jax.checkpoint, static_argnums=3)
        def chunk(params, state, steps, length):
            xs, keep, reset, keys = steps
            part = run._replace(length=length, keep=keep, reset=reset, keys=keys)
            return self.cell._unroll(params, xs, state, part)

        steps = (xs, run.keep, run.reset, run.keys)
        return scan_chunks(functools.partial(chunk, params), state, steps, run.length, every, run.reverse)


class States(Wrapper):
    """A cell that outputs `(state, y)` at each step, to look at or to plot. `Remat` goes around it, not into it.

    >>> import jaxseq as js
    >>> cell = js.States(js.LSTM(2, 3))
    >>> state, (states, ys) = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> states.cell.shape, ys.shape
    ((5, 3), (5, 3))
    """

    keeps_size = False  # pyright: ignore[reportAssignmentType]
    output_rank = None  # pyright: ignore[reportAssignmentType]
    output_size = None  # pyright: ignore[reportAssignmentType]

    cell: Cell

    def step(self, params: Any, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        state, y = self.cell.step(params, state, x, key)
        return state, (state, y)


class FeedbackState(NamedTuple):
    """The state of a closed loop: that of the cell, and the output it reads next."""

    cell: Any
    output: Any


class Feedback(Wrapper):
    """A cell whose output is its next input.

    A cell that reads just its own output then has no inputs: `unroll(params, None, state, length=T)`. A cell that reads
    a pair `(x, output)` (its `input_rank` is a pair such as (1, 1), and so is its `input_size`) has the inputs x. The
    first input is zeros, or token 0; to start from another, give `FeedbackState(cell=..., output=...)` as the state.
    Without inputs the state says the batch: `initial_state(params, (2,))`. Tokens are fed back by `generate`.

    >>> import jaxseq as js
    >>> cell = js.Feedback(js.Dense(2, 2))
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), None, length=3)
    >>> ys.shape
    (3, 2)
    """

    any_rank = False  # pyright: ignore[reportAssignmentType]
    keeps_size = False  # pyright: ignore[reportAssignmentType]

    cell: Cell

    def __post_init__(self) -> None:
        super().__post_init__()
        fed, reads = super().output_size, super().input_size
        reads = reads[1] if self._reads_pairs and isinstance(reads, tuple) else reads
        if isinstance(fed, int) and isinstance(reads, int) and fed != reads:
            raise ValueError(f"Feedback gives {self.cell} its output of {fed} features, but it reads {reads}.")

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.cell.input_rank[0] if self._reads_pairs else None

    @property
    def input_size(self) -> Any:
        size = super().input_size
        return size[0] if self._reads_pairs and isinstance(size, tuple) else None

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> FeedbackState:
        x = self.cell.zero_input(params, batch_shape)
        return FeedbackState(self.cell.initial_state(params, batch_shape), x[1] if self._reads_pairs else x)

    def zero_input(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Any:
        return self.cell.zero_input(params, batch_shape)[0] if self._reads_pairs else None

    def step(self, params: Any, state: FeedbackState, x: Any, key: Array | None = None) -> tuple[FeedbackState, Any]:
        x = (x, state.output) if self._reads_pairs else state.output
        inner, y = self.cell.step(params, state.cell, x, key)
        if jax.tree.map(jnp.shape, y) != jax.tree.map(jnp.shape, state.output):
            raise ValueError(
                f"{self} cannot feed back its output {errors.shape_of(y)}: it reads {errors.shape_of(state.output)}."
            )
        return FeedbackState(inner, y), y

    @property
    def _reads_pairs(self) -> bool:
        return isinstance(self.cell.input_rank, tuple) and len(self.cell.input_rank) == 2
