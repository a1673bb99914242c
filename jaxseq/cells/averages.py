"""Averages over time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell
from jaxseq.core.unroll import Run


class MovingAverageState(NamedTuple):
    """The last inputs, the oldest first and zeros where there were none yet, and how many there were."""

    inputs: Float[Array, "*batch window input"]
    count: Int[Array, "*batch"]


class MovingAverage(Cell):
    """The mean of the last `window` inputs, of fewer where there have not been as many.

        y_t = (x_t + x_{t-1} + ... + x_{t-n+1}) / n,   n = min(t, window)

    The finite form of the running average, which `Leaky` makes. All steps are computed at once, in log2(window) sums
    over the whole sequence. Without parameters its state is of JAX's default floating dtype, its outputs of that of the
    inputs.

    >>> cell = MovingAverage(input_size=1, window=2)
    >>> cell.unroll((), jnp.array([[1.0], [3.0], [7.0]]))[1].tolist()
    [[1.0], [2.0], [5.0]]
    """

    free_state = False

    keeps_size = True

    input_size: int
    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"MovingAverage needs a window of at least one step, got {self.window}.")

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: Array) -> tuple[()]:
        return ()

    def initial_state(self, params: tuple[()], batch_shape: tuple[int, ...] = ()) -> MovingAverageState:
        inputs = jnp.zeros((*batch_shape, self.window, self.input_size))
        return MovingAverageState(inputs, jnp.zeros(batch_shape, jnp.int32))

    def step(self, params: tuple[()], state: MovingAverageState, x: Array, key: Array | None = None) -> tuple:
        self._check(x)
        x_last = jnp.expand_dims(x, -2).astype(state.inputs.dtype)
        inputs = jnp.concatenate([state.inputs[..., 1:, :], x_last], axis=-2)
        count = jnp.minimum(state.count + 1, self.window)
        return MovingAverageState(inputs, count), _divide(inputs.sum(axis=-2), count).astype(x.dtype)

    def _unroll(self, params: tuple[()], xs: Array, state: MovingAverageState, run: Run) -> tuple:
        self._check(xs)
        rows, window = (run.length, *run.batch_shape), self.window
        keep = jnp.ones(rows, bool) if run.keep is None else run.keep
        reset = jnp.zeros(rows, bool) if run.reset is None else run.reset
        values = xs.astype(state.inputs.dtype)
        if run.reverse:
            values, keep, reset = values[::-1], keep[::-1], reset[::-1]

        # one line of inputs: those of the state, then the unmasked ones, with the segment to which each belongs
        segment = jnp.cumsum(reset, axis=0, dtype=jnp.int32)
        packed = (values, segment)
        if run.keep is not None:
            order = jnp.argsort(~keep, axis=0, stable=True)
            packed = (_take(values, order), _take(segment, order))
        line = jnp.concatenate([jnp.moveaxis(state.inputs, -2, 0), packed[0]])
        segments = jnp.pad(packed[1], [(window, 0)] + [(0, 0)] * len(run.batch_shape))

        # how many inputs of its segment there are up to each place of the line
        place = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 0)
        begins = segments != _later(segments, 1)
        age = place + 1 - jax.lax.cummax(jnp.where(begins, place, 0), axis=0)
        counted = age - jnp.where(segments == 0, window - jnp.broadcast_to(state.count, age.shape), 0)
        ys = _divide(_window_sums(line, age, window)[window:], jnp.minimum(counted, window)[window:]).astype(xs.dtype)
        if run.keep is not None:
            ys = masks.zero_unless(keep, _take(ys, jnp.maximum(jnp.cumsum(keep, axis=0) - 1, 0)))

        last = reset.sum(axis=0, keepdims=True, dtype=jnp.int32)
        latest = keep.sum(axis=0, keepdims=True, dtype=jnp.int32) + jax.lax.broadcasted_iota(
            jnp.int32, (window, *run.batch_shape), 0
        )
        inputs = masks.zero_unless(_take(segments, latest) == last, _take(line, latest))
        count = (keep & (segment == last)).sum(axis=0, dtype=jnp.int32) + jnp.where(last[0] == 0, state.count, 0)
        count = jnp.minimum(count, window)
        return MovingAverageState(jnp.moveaxis(inputs, 0, -2), count), ys[::-1] if run.reverse else ys

    def _check(self, x: Array) -> None:
        errors.check_features(self, x, self.input_size)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self} needs floating inputs, got {errors.shape_of(x)}: cast them with .astype(float).")


def _window_sums(line: Array, age: Array, window: int) -> Array:
    """The sum of the last min(age, window) values up to each place of `line` `[place, *batch, features]`.

    Sums of 1, 2, 4, ... values add up to those of `window`; a part that begins before the segment is left out.
    """
    total, offset, part, size = jnp.zeros_like(line), 0, line, 1
    while window:
        if window & size:
            total = total + masks.zero_unless(age > offset, _later(part, offset))
            offset, window = offset + size, window - size
        part, size = part + masks.zero_unless(age > size, _later(part, size)), 2 * size
    return total


def _later(values: Array, steps: int) -> Array:
    """`values` moved to later places, zeros before them."""
    return jnp.concatenate([jnp.zeros_like(values[:steps]), values[: len(values) - steps]])


def _take(values: Array, places: Array) -> Array:
    """The values `[time, *batch, ...]` at the places `[time, *batch]` of each row."""
    places = jnp.expand_dims(places, tuple(range(places.ndim, values.ndim)))
    return jnp.take_along_axis(values, places, axis=0)


def _divide(total: Array, count: Array) -> Array:
    return total / jnp.broadcast_to(jnp.expand_dims(count, -1), total.shape).astype(total.dtype)
