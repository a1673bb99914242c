"""Where a cell's state starts, and how far it goes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxseq.combinators.conditioning import Conditioned
from jaxseq.combinators.noise import Drawn, Sampled
from jaxseq.core.cell import Cell
from jaxseq.core.wrapper import Extended, Wrapper, each_array, follow, layers_within


class LearnedStateParams(NamedTuple):
    """The parameters of a cell with a learned start: its own, and the floating arrays of the state of one sequence."""

    cell: Any
    state: tuple[Array, ...]


class LearnedState(Extended):
    """A cell whose initial state is learned, from the cell's own; resets return to it.

    It takes any cell with a floating array in its state. Integers in a state start as the cell says.

    >>> import jaxseq as js
    >>> cell = LearnedState(js.LSTM(2, 3))
    >>> params = cell.init(jax.random.key(0))
    >>> params = params._replace(state=(jnp.ones(3), jnp.zeros(3)))
    >>> cell.initial_state(params, (1,)).hidden.tolist()
    [[1.0, 1.0, 1.0]]
    """

    changes_state = True

    cell: Cell

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in layers_within(self.cell):
            if isinstance(layer, RandomState) or (isinstance(layer, Conditioned) and layer.state):
                raise TypeError(
                    f"LearnedState and {type(layer).__name__} both say where the state starts: use one of them."
                )

    def init(self, key: Array) -> LearnedStateParams:
        params = self.cell.init(key)
        leaves = jax.tree.leaves(self.cell.initial_state(params))
        learned = tuple(jnp.asarray(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
        if not learned:
            raise TypeError(f"LearnedState needs a cell with a floating state to learn, but {self.cell} has none.")
        return LearnedStateParams(params, learned)

    def axes(self) -> Any:
        params = jax.eval_shape(self.init, jax.random.key(0))
        unnamed = tuple(jax.sharding.PartitionSpec(*[None] * leaf.ndim) for leaf in params.state)
        return LearnedStateParams(self.cell.axes(), unnamed)  # pyright: ignore[reportArgumentType]

    def initial_state(self, params: LearnedStateParams, batch_shape: tuple[int, ...] = ()) -> Any:
        learned = iter(params.state)

        def start(leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return jnp.broadcast_to(next(learned), leaf.shape)

        return jax.tree.map(start, self.cell.initial_state(params.cell, batch_shape))


class RandomState(Sampled):
    """A cell whose initial state is drawn from N(0, scale²) around the cell's own, once from the key of `unroll`.

    Without a key it is the cell's own. It takes any cell; only the floating arrays of its state are drawn.

    H.-G. Zimmermann, C. Tietz and R. Grothmann, Forecasting with recurrent neural networks: 12 tricks, in Neural
    networks: tricks of the trade, 2012, train with such a start to make a network forget it.

    >>> import jaxseq as js
    >>> cell = RandomState(js.GRU(2, 3), scale=0.1)
    >>> params = cell.init(jax.random.key(0))
    >>> cell.unroll(params, jnp.ones((5, 2)), key=jax.random.key(1))[1].shape
    (5, 3)
    """

    changes_state = True

    cell: Cell
    _: dataclasses.KW_ONLY
    scale: float = 1.0

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> Any:
        state = super().initial_state(params, batch_shape)
        if not isinstance(params, Drawn):
            return state
        leaves, tree = jax.tree.flatten(state)
        keys = jax.random.split(params.key, max(1, len(leaves)))

        def start(leaf, key):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return leaf + self.scale * jax.random.normal(key, leaf.shape, leaf.dtype)

        return jax.tree.unflatten(tree, [start(leaf, key) for leaf, key in zip(leaves, keys, strict=False)])


class Clip(Wrapper):
    """A cell whose state is held between -bound and bound after each step.

    A tuple of bounds has one for each floating array of the state, in its order, None to leave one alone. The output
    follows where it is a part of the state. It takes any cell with a floating state.

    >>> import jaxseq as js
    >>> cell = Clip(js.LSTM(2, 3), bound=(None, 3.0))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    changes_state = True

    cell: Cell
    bound: float | tuple[float | None, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for bound in self.bound if isinstance(self.bound, tuple) else (self.bound,):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0):
                raise ValueError(f"Clip needs a bound > 0, got {bound!r}.")

    def step(self, params: Any, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        state, y = self.cell.step(self.inner(params), state, x, key)
        clipped = each_array(
            self, lambda bound, leaf: leaf if bound is None else jnp.clip(leaf, -bound, bound), self.bound, state
        )
        return clipped, follow(y, state, clipped)
