"""A time gate around a cell, for events at irregular times: the phased LSTM."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Real

from jaxseq.core import errors
from jaxseq.core.cell import Cell
from jaxseq.core.wrapper import Extended, follow

_OPEN = 0.05  # of a period, at first


class PhasedParams(NamedTuple):
    """The parameters of a time gate: the rhythm of each unit, and the params of the cell."""

    cell: Any
    log_period: Float[Array, "hidden"]
    shift: Float[Array, "hidden"]
    open_logit: Float[Array, "hidden"]


class Phased(Extended):
    """A cell whose units are open for a part of their own periods only; `Phased(LSTM(n, h))` is the phased LSTM.

        φ = ((time - s) mod τ) / τ
        k = 2 φ / r          if φ < r / 2
            2 - 2 φ / r      if r / 2 <= φ < r
            α φ              otherwise
        state' = k step(state, x) + (1 - k) state

    It reads pairs `(x, time)` of the cell's input and the time `[*batch, 1]` at which it came, in any unit and at any
    distances. Times are integers or floating numbers, of any dtype whatever that of x: phases are computed in float32,
    which loses nothing of an int32, or in float64 where times or params have 64 bits.

    Each unit learns its period τ = exp(`log_period`), its `shift` s, and the part of the period for which it is open,
    r = σ(`open_logit`). Periods start log-uniform between 1 and `max_period`, in the unit of the times, shifts uniform
    over a period, r at 0.05. `leak` is α; the paper trains with 0.001 and sets it to 0 thereafter.

    The cell is one whose state holds arrays `[*batch, hidden]`, all of one size: LSTM, GRU, Elman and the like.

    D. Neil, M. Pfeiffer and S.-C. Liu, Phased LSTM: accelerating recurrent network training for long or event-based
    sequences, NeurIPS 2016.

    >>> import jaxseq as js
    >>> cell = Phased(js.LSTM(2, 3), max_period=20)
    >>> times = jnp.array([0.0, 0.3, 4.0, 4.1, 9.5])[:, None]
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), (jnp.ones((5, 2)), times))
    >>> ys.shape
    (5, 3)
    """

    changes_state = True
    input_names = ("x", "time")  # pyright: ignore[reportAssignmentType]

    cell: Cell
    _: dataclasses.KW_ONLY
    max_period: float = 1000.0
    leak: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.max_period < math.inf:
            raise ValueError(f"Phased needs a finite max_period > 1, got {self.max_period}.")
        if not 0 <= self.leak <= 1:
            raise ValueError(f"Phased needs a leak from 0 to 1, got {self.leak}.")
        state = self._state()
        if len({leaf.shape for leaf in state}) != 1 or any(
            leaf.ndim != 1 or not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in state
        ):
            raise TypeError(
                f"Phased needs a cell whose state holds floating arrays [*batch, hidden] of one size, but that of "
                f"{self.cell} holds {', '.join(map(errors.shape_of, state)) or 'none'}."
            )

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.cell.input_rank, 1)

    @property
    def keeps_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @property
    def input_size(self) -> Any:
        return (getattr(self.cell, "input_size", None), 1)

    def init(self, key: Array) -> PhasedParams:
        cell_key, period_key, shift_key = jax.random.split(key, 3)
        shape = self._state()[0].shape
        log_period = jax.random.uniform(period_key, shape, maxval=math.log(self.max_period))
        shift = jax.random.uniform(shift_key, shape) * jnp.exp(log_period)
        return PhasedParams(self.cell.init(cell_key), log_period, shift, jnp.full(shape, math.log(_OPEN / (1 - _OPEN))))

    def axes(self) -> Any:
        return PhasedParams(self.cell.axes(), *[PartitionSpec("hidden")] * 3)  # pyright: ignore[reportArgumentType]

    def zero_input(self, params: PhasedParams, batch_shape: tuple[int, ...] = ()) -> Any:
        x = self.cell.zero_input(params.cell, batch_shape)
        return x, jnp.zeros((*batch_shape, 1), params.log_period.dtype)

    def step(self, params: PhasedParams, state: Any, x: Any, key: Array | None = None) -> Any:
        if not isinstance(x, tuple) or len(x) != 2:
            raise ValueError(f"{self} reads pairs (x, time), got {errors.shape_of(x)}: give both.")
        x, time = x
        errors.check_features(self, time, 1, "times")
        gate = self.gate(params, time)
        after, y = self.cell.step(params.cell, state, x, key)

        def mix(new, old):
            new_part, old_part = gate * new.astype(gate.dtype), (1 - gate) * old.astype(gate.dtype)
            return (new_part + old_part).astype(old.dtype)

        mixed = jax.tree.map(mix, after, state)
        return mixed, follow(y, after, mixed)

    def gate(self, params: PhasedParams, time: Real[Array, "*batch 1"]) -> Float[Array, "*batch hidden"]:
        """How far each unit is open at a time, from 0 to 1; float32 or float64."""
        time = jnp.asarray(time)
        if not (jnp.issubdtype(time.dtype, jnp.integer) or jnp.issubdtype(time.dtype, jnp.floating)):
            raise TypeError(f"{self} reads times, integers or floating numbers, got {errors.shape_of(time)}.")
        wide = any(dtype.itemsize == 8 for dtype in (time.dtype, params.log_period.dtype))
        dtype = jnp.float64 if wide else jnp.float32
        log_period, shift, open_logit = (leaf.astype(dtype) for leaf in params[1:])
        shape = (*time.shape[:-1], shift.size)
        rhythm = (jnp.exp(log_period), shift, jax.nn.sigmoid(open_logit))
        period, shift, part = (jnp.broadcast_to(leaf, shape) for leaf in rhythm)
        rest = jnp.zeros_like(time)
        if jnp.issubdtype(time.dtype, jnp.integer) and time.dtype.itemsize >= 4:  # more bits than a float has
            time, rest = time & ~255, time & 255
        time, rest = (jnp.broadcast_to(leaf.astype(dtype), shape) for leaf in (time, rest))
        phase = jnp.mod(jnp.mod(time, period) + rest - shift, period) / period
        rise = 2 * phase / part
        return jnp.where(phase < part, jnp.minimum(rise, 2 - rise), self.leak * phase)

    def _state(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays of the state of one sequence, as shapes."""
        cell: Cell = self.cell
        return jax.tree.leaves(jax.eval_shape(lambda: cell.initial_state(cell.init(jax.random.key(0)))))
