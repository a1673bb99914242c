"""Cells that remember for longer: by changing slowly, or by reading what is several steps old."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.core import errors
from jaxseq.core.cell import Cell
from jaxseq.core.wrapper import Extended, Wrapper, follow


class LeakyParams(NamedTuple):
    """The parameters of a leaky cell: the logits of its rates if they are learned."""

    cell: Any
    rate_logits: Float[Array, "*units"] | None


class Leaky(Extended):
    """A cell of leaky units, which move only a part of the way at each step.

        h' = (1 - a) h + a f(h, x),   y = h'

    f is the cell, and h what it gives: the output has to be a part of the state, as it is in `Elman`, `LSTM` and
    `GRU`; the rest of the state is that of the cell. `rate`, a in (0, 1], is a number, or a tuple of one for each unit;
    1 / a is the number of steps over which a unit averages, and with a cell that just takes in its input this is the
    running average. If `learned` the rates are the sigmoid of parameters and start as given.

    M. C. Mozer, Induction of multiscale temporal structure, NeurIPS 1991; H. Jaeger et al., Optimization and
    applications of echo state networks with leaky-integrator neurons, Neural Networks 20, 2007.

    >>> import jaxseq as js
    >>> cell = js.Leaky(js.Elman(2, 3), rate=(0.5, 0.1, 0.02))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    cell: Cell
    rate: float | tuple[float, ...]
    _: dataclasses.KW_ONLY
    learned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate,)
        if not rates or not all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates):
            raise TypeError(f"Leaky needs a number, or a tuple of numbers, as rate, got {self.rate!r}.")
        if not all(0 < rate <= 1 for rate in rates):
            raise ValueError(f"Leaky needs 0 < rate <= 1, got {self.rate}.")
        if self.learned and 1 in rates:
            raise ValueError(f"Leaky cannot learn a rate that starts at 1, where its gradient is 0; got {self.rate}.")

    def init(self, key: Array) -> LeakyParams:
        return LeakyParams(self.cell.init(key), jax.scipy.special.logit(self._rates()) if self.learned else None)

    def axes(self) -> Any:
        spec = PartitionSpec("hidden") if isinstance(self.rate, tuple) else PartitionSpec()
        return LeakyParams._make((self.cell.axes(), spec if self.learned else None))

    def step(self, params: LeakyParams, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        moved, y = self.cell.step(params.cell, state, x, key)
        hidden = {id(leaf) for leaf in jax.tree.leaves(y)}
        if not hidden <= {id(leaf) for leaf in jax.tree.leaves(moved)}:
            raise TypeError(f"Leaky needs a cell whose output is a part of its state, but that of {self.cell} is not.")

        def leak(before, after):
            return self._mix(params, before, after) if id(after) in hidden else after

        leaky = jax.tree.map(leak, state, moved)
        return leaky, follow(y, moved, leaky)

    def _mix(self, params: LeakyParams, before: Array, after: Array) -> Array:
        rate = self._rates() if params.rate_logits is None else jax.nn.sigmoid(params.rate_logits)
        if rate.shape != after.shape[after.ndim - rate.ndim :]:
            raise ValueError(f"{self} has {rate.size} rates, but the output of its cell is {errors.shape_of(after)}.")
        rate = jnp.broadcast_to(rate, after.shape).astype(after.dtype)
        return (1 - rate) * before + rate * after

    def _rates(self) -> Array:
        return jnp.asarray(self.rate, float)


class Delay(Wrapper):
    """A cell whose recurrence reads the state `steps` ago: s_t = f(s_{t - steps}, x_t).

    That is `steps` interleaved sequences. A gradient passes `steps` steps at a time, so what fades by a factor r in
    each of its passages fades by r^(T / steps) over T of them. The state is that of the last `steps` steps, the oldest
    first; a state before the first one is the initial one.

    T. Lin et al., Learning long-term dependencies in NARX recurrent neural networks, IEEE Trans. Neural Networks 7,
    1996.

    >>> import jaxseq as js
    >>> cell = js.Delay(js.GRU(2, 3), steps=4)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape, len(state)
    ((5, 3), 4)
    """

    free_state = False

    cell: Cell
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self)

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> tuple[Any, ...]:
        return (self.cell.initial_state(params, batch_shape),) * self.steps

    def step(self, params: Any, state: tuple[Any, ...], x: Any, key: Array | None = None) -> tuple[tuple, Any]:
        new, y = self.cell.step(params, state[0], x, key)
        return (*state[1:], new), y


class TimeSkipState(NamedTuple):
    """The state of a skip connection through time: that of the cell and its last outputs, the oldest first."""

    cell: Any
    outputs: tuple[Float[Array, "*batch output"], ...]


class TimeSkip(Wrapper):
    """A cell that also reads its own output `steps` ago: s_t = f(s_{t-1}, [x_t; y_{t - steps}]).

    A connection from the distant past to the present, beside that from the step before. The cell reads both
    side by side; the outputs before the first one are zeros. `Feedback` is the connection over one step.

    T. Lin et al., Learning long-term dependencies in NARX recurrent neural networks, IEEE Trans. Neural Networks 7,
    1996.

    >>> import jaxseq as js
    >>> cell = js.TimeSkip(js.Elman(2 + 3, 3), steps=10)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((20, 2)))[1].shape
    (20, 3)
    """

    any_rank = False  # pyright: ignore[reportAssignmentType]
    free_state = False

    cell: Cell
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self)
        reads, gives = super().input_size, self.output_size
        if self.cell.input_rank != 1 or not isinstance(reads, int) or not isinstance(gives, int) or reads <= gives:
            raise ValueError(
                f"TimeSkip gives its cell inputs and outputs side by side, but {self.cell} reads {reads} features and "
                f"gives {gives}: its input_size has to be the size of both together."
            )

    @property
    def input_size(self) -> int:
        return super().input_size - self.output_size

    def zero_input(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Array:
        return super().zero_input(params, batch_shape)[..., : self.input_size]

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> TimeSkipState:
        zeros = self.cell.zero_input(params, batch_shape)[..., : self.output_size]
        return TimeSkipState(self.cell.initial_state(params, batch_shape), (zeros,) * self.steps)

    def step(self, params: Any, state: TimeSkipState, x: Array, key: Array | None = None) -> tuple[TimeSkipState, Any]:
        errors.check_features(self, x, self.input_size)
        x = jnp.concatenate([x, state.outputs[0]], axis=-1)
        cell, y = self.cell.step(params, state.cell, x, key)
        return TimeSkipState(cell, (*state.outputs[1:], y)), y


def _check_steps(layer: Delay | TimeSkip) -> None:
    if layer.steps < 1:
        raise ValueError(f"{type(layer).__name__} needs steps >= 1, got {layer.steps}.")
