"""Noise while training: `unroll` without a key, and `step` without one, has none."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxseq.cells.gated import GatedWrapper
from jaxseq.cells.pointwise import Pointwise
from jaxseq.core import masks
from jaxseq.core.cell import Cell
from jaxseq.core.kernels import kernel_axes, map_kernels
from jaxseq.core.wrapper import Wrapper, each_array, follow


class Drawn(NamedTuple):
    """The params of a cell with the key of the noise that lasts a whole sequence."""

    cell: Any
    key: Array


class Sampled(Wrapper):
    """A layer whose own noise lasts a whole sequence: `draw` puts a key beside the params, as `Drawn`."""

    def inner(self, params: Any) -> Any:
        return params.cell if isinstance(params, Drawn) else params

    def draw(self, params: Any, key: Array) -> Drawn:
        key, cell_key = jax.random.split(key)
        return Drawn(self.cell.draw(params, cell_key), key)

    def attach(self, params: Any, memory: Any, mask: Any = None) -> Any:
        attached = self.cell.attach(self.inner(params), memory, mask)
        return params._replace(cell=attached) if isinstance(params, Drawn) else attached


class Dropout(Pointwise):
    """Zeros each feature of each step with probability `rate` and scales the others by 1 / (1 - rate).

    With `variational=True` the same features of a sequence are zeroed at all its steps (Gal and Ghahramani 2016).
    Without a key it changes nothing.

    N. Srivastava et al., Dropout, JMLR 15, 2014; Y. Gal and Z. Ghahramani, A theoretically grounded application of
    dropout in recurrent neural networks, NeurIPS 2016.

    >>> Dropout(0.5).unroll((), jnp.ones((2, 3)))[1].tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    any_rank = True
    keeps_size = True

    rate: float
    _: dataclasses.KW_ONLY
    variational: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self, self.rate)

    def draw(self, params: Any, key: Array) -> Any:
        return Drawn(params, key) if self.variational else params

    def apply(self, params: Any, x: Array, key: Array | None = None) -> Array:
        if self.variational:
            key = params.key if isinstance(params, Drawn) else None
        return _drop(key, x, self.rate)


class RecurrentDropout(Sampled, GatedWrapper):
    """A gated cell whose recurrent product reads its hidden state with some units zeroed, the same at all steps.

        z_h = (m h / (1 - rate)) R,   m ~ Bernoulli(1 - rate) once a sequence

    What else the cell does with h, such as z h in a GRU, is as before. It takes any `Gated` cell.

    Y. Gal and Z. Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, NeurIPS
    2016.

    >>> import jaxseq as js
    >>> cell = RecurrentDropout(js.GRU(2, 3), rate=0.25)
    >>> params = cell.init(jax.random.key(0))
    >>> cell.unroll(params, jnp.ones((5, 2)), key=jax.random.key(1))[1].shape
    (5, 3)
    """

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self, self.rate)

    def products(self, params: Any, hidden: Array, x: Array) -> tuple[Array, Array]:
        hidden = _drop(params.key if isinstance(params, Drawn) else None, hidden, self.rate)
        return super().products(params, hidden, x)


class WeightDrop(Wrapper):
    """A layer with weights of its recurrent kernels zeroed, the same for a whole sequence and batch.

        R' = m R / (1 - rate),   m ~ Bernoulli(1 - rate) once an unroll

    It takes any layer, a Stack too, with kernels whose first axis is "recurrent" in `axes()`.

    S. Merity, N. S. Keskar and R. Socher, Regularizing and optimizing LSTM language models, ICLR 2018.

    >>> import jaxseq as js
    >>> cell = WeightDrop(js.LSTM(2, 3), rate=0.5)
    >>> params = cell.init(jax.random.key(0))
    >>> cell.unroll(params, jnp.ones((5, 2)), key=jax.random.key(1))[1].shape
    (5, 3)
    """

    changes_kernels = True

    rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rate(self, self.rate)
        kernel_axes(self.cell, "recurrent")

    def draw(self, params: Any, key: Array) -> Any:
        key, cell_key = jax.random.split(key)

        def drop(index, kernel):
            return _drop(jax.random.fold_in(key, index), kernel, self.rate)

        dropped = map_kernels(self.cell, params, drop, "recurrent")
        return self.cell.draw(dropped, cell_key)


class Zoneout(Wrapper):
    """A cell whose units keep their state from one step to the next with probability `rate`.

        s_t = m s_{t-1} + (1 - m) s'_t,   m ~ Bernoulli(rate) for each unit and step

    A tuple of rates has one for each array of the state in its order: the authors' (0.05, 0.5) for `LSTMState(hidden,
    cell)`. Without a key the state is the expected one: rate s_{t-1} + (1 - rate) s'_t. It takes cells whose output is
    the field `hidden` of their state; the output is what the unit then holds.

    D. Krueger et al., Zoneout, ICLR 2017.

    >>> import jaxseq as js
    >>> cell = Zoneout(js.LSTM(2, 3), rate=(0.05, 0.5))
    >>> params = cell.init(jax.random.key(0))
    >>> cell.unroll(params, jnp.ones((5, 2)), key=jax.random.key(1))[1].shape
    (5, 3)
    """

    changes_state = True

    cell: Cell
    rate: float | tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for rate in self.rate if isinstance(self.rate, tuple) else (self.rate,):
            _check_rate(self, rate)

    def step(self, params: Any, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        key, cell_key = (None, None) if key is None else jax.random.split(key)
        after, y = self.cell.step(self.inner(params), state, x, cell_key)
        if getattr(after, "hidden", None) is not y:
            raise TypeError(
                f"Zoneout needs a cell whose output is the hidden state it keeps, but {self.cell} has another."
            )
        counter = iter(range(len(jax.tree.leaves(after))))

        def keep(rate, before, after):
            if key is None:
                return rate * before + (1 - rate) * after
            kept = jax.random.bernoulli(jax.random.fold_in(key, next(counter)), rate, after.shape)
            return masks.select(kept, before, after)

        mixed = each_array(self, keep, self.rate, state, after)
        return mixed, follow(y, after, mixed)


def _check_rate(layer: Cell, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"{type(layer).__name__} needs 0 <= rate < 1, got {rate!r}.")


def _drop(key: Array | None, x: Array, rate: float) -> Array:
    """`x` with each number zeroed with probability `rate`, the others scaled up; unchanged without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, jnp.shape(x)), x / (1 - rate), 0)
