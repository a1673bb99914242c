"""The Clockwork RNN: groups of units that update at their own periods."""

import dataclasses
import itertools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import initializers
from jaxtyping import Array, Float, Int

from jaxseq.cells.elman import Elman
from jaxseq.cells.gated import GatedParams
from jaxseq.core.activations import activation
from jaxseq.core.layer import Layer, Params
from jaxseq.core.scan import scan
from jaxseq.core.unroll import Run

_orthogonal = initializers.orthogonal()


class ClockworkState(NamedTuple):
    """The state of a Clockwork RNN: its units, and how many steps it has made since its clock was at 0."""

    hidden: Float[Array, "*batch hidden"]
    clock: Int[Array, "*batch"]


class ClockworkRNN(Elman):
    """A simple recurrent network whose units, in groups of one size, update every `periods[group]` steps.

        h'_k = tanh(x W_k + sum over j >= k of h_j R_jk + b_k)   if t mod T_k = 0,   else h_k;   y = h'

    The periods T_k increase, so that a group reads slower groups and itself. The clock t counts the steps of a row from
    0, where all groups update; padding does not advance it, and a reset sets it back. Before 2³¹ steps it returns to 0,
    at a multiple of all periods, so that no group misses a beat; their least common multiple must be less than 2³¹.
    `recurrent_kernel` is `[hidden, 1, hidden]`; what a group does not read has no effect.

    Without `mask` and `reset`, and from clocks at which all groups update, groups are unrolled one by one, slowest
    first, each only over its own steps: 1.3 to 4.5 times as fast on a CPU, but a loop to compile for each group.

    J. Koutnik et al., A Clockwork RNN, ICML 2014.

    >>> cell = ClockworkRNN(input_size=2, hidden_size=6, periods=(1, 2, 4))
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape, int(state.clock)
    ((5, 6), 5)
    """

    _: dataclasses.KW_ONLY
    periods: tuple[int, ...] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        periods: Any = self.periods
        if isinstance(periods, tuple) and all(isinstance(period, numbers.Integral) for period in periods):
            periods = tuple(period if isinstance(period, bool) else int(period) for period in periods)
            object.__setattr__(self, "periods", periods)
        whole = isinstance(periods, tuple) and periods and all(type(period) is int for period in periods)
        if not whole or periods[0] < 1 or any(a >= b for a, b in itertools.pairwise(periods)):
            raise ValueError(f"ClockworkRNN needs increasing periods of at least 1 step, (1, 2, 4), got {periods!r}.")
        if self.hidden_size % len(periods):
            raise ValueError(f"ClockworkRNN needs groups of one size: {len(periods)} do not divide {self.hidden_size}.")
        if math.lcm(*periods) >= 2**31:
            raise ValueError(
                f"ClockworkRNN counts steps up to a multiple of all periods, in int32: the least common multiple of "
                f"{periods} is {math.lcm(*periods)}, which needs to be less than 2**31. "
                "Take periods that share factors."
            )

    @property
    def group_size(self) -> int:
        """How many units a group has."""
        return self.hidden_size // len(self.periods)

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        columns = [
            jnp.pad(_orthogonal(key, (self.hidden_size - start, self.group_size)), ((start, 0), (0, 0)))
            for start, key in zip(
                range(0, self.hidden_size, self.group_size), jax.random.split(key, len(self.periods)), strict=True
            )
        ]
        return params._replace(recurrent_kernel=jnp.concatenate(columns, axis=1)[:, None])

    def initial_state(self, params: GatedParams, batch_shape: tuple[int, ...] = ()) -> ClockworkState:
        return ClockworkState(self.zeros(params, batch_shape), jnp.zeros(batch_shape, jnp.int32))

    def products(self, params: GatedParams, hidden: Array, x: Array) -> tuple[Array, Array]:
        kernel = self.connected(params).recurrent_kernel
        return self.product(x, params.input_kernel, params.bias), self.product(hidden, kernel)

    def connected(self, params: GatedParams) -> GatedParams:
        """The params with 0 where a group does not read another."""
        groups = jnp.arange(self.hidden_size) // self.group_size
        reads = (groups[:, None] >= groups[None])[:, None]
        return params._replace(recurrent_kernel=jnp.where(reads, params.recurrent_kernel, 0))

    def update(
        self, params: GatedParams, state: ClockworkState, from_input: Array, from_recurrent: Array
    ) -> ClockworkState:
        candidate = activation(self.activation)(from_input + from_recurrent)
        periods = jnp.repeat(jnp.array(self.periods, jnp.int32), self.group_size)
        phase = state.clock[..., None] % jnp.broadcast_to(periods, candidate.shape)
        # zeros sharded as the inputs are, which a fresh state is not
        due, hidden = phase + jnp.zeros_like(candidate, jnp.int32) == 0, state.hidden + jnp.zeros_like(candidate)
        return ClockworkState(jnp.where(due, candidate, hidden), self._later(state.clock, 1))

    def _later(self, clock: Int[Array, "*batch"], steps: int) -> Int[Array, "*batch"]:
        """The clock so many steps later, less than the last multiple of all periods that int32 holds."""
        common = math.lcm(*self.periods)
        last = (2**31 - 1) // common * common
        return (clock - last + steps) % last

    def _unroll(self, params: GatedParams, xs: Array, state: ClockworkState, run: Run) -> Any:
        by_step = super()._unroll
        known = isinstance(run.length, int) and run.length > 0  # not a symbol
        if not known or run.keep is not None or run.reset is not None:
            return by_step(params, xs, state, run)
        return lax.cond(
            jnp.all(state.clock % math.lcm(*self.periods) == 0),
            lambda params, xs, state: self._by_group(params, xs, state, run.reverse),
            lambda params, xs, state: by_step(params, xs, state, run),
            params,
            xs,
            state,
        )

    def _by_group(self, params: GatedParams, xs: Array, state: ClockworkState, reverse: bool) -> Any:
        """Groups one by one, slowest first: what one reads of slower ones leaves its loop."""
        xs = jnp.flip(xs, axis=0) if reverse else xs
        time = len(xs)
        hidden, before = xs[:, ..., :0], xs[:, ..., :0]  # of slower groups, at each step and before it
        for start, period in zip(range(0, self.hidden_size, self.group_size)[::-1], self.periods[::-1], strict=True):
            end = start + self.group_size
            from_input, from_units = params.input_kernel[:, 0, start:end], params.recurrent_kernel[:, 0, start:end]
            drive = xs[::period] @ from_input + before[::period] @ from_units[end:]
            drive = drive + jnp.broadcast_to(params.bias[0, start:end], drive.shape)

            def step(units, drive, kernel=from_units[start:end]):
                units = activation(self.activation)(drive + units @ kernel)
                return units, units

            first = state.hidden[..., start:end] + jnp.zeros_like(drive[0])  # sharded as the steps are
            _, updates = scan(step, first, drive)
            held = jnp.repeat(updates, period, axis=0)[:time]
            hidden = jnp.concatenate([held, hidden], axis=-1)
            before = jnp.concatenate([jnp.concatenate([first[None], held[:-1]]), before], axis=-1)
        last = ClockworkState(hidden[-1], self._later(state.clock, time))
        return last, jnp.flip(hidden, axis=0) if reverse else hidden


def connected(layer: Layer, params: Params) -> Params:
    """For `map_layers`: those of a Clockwork RNN with 0 where a group does not read another, others as they are."""
    return layer.connected(params) if isinstance(layer, ClockworkRNN) else params
