"""Layers side by side."""

from typing import Any

import jax
from jaxtyping import Array

from jaxseq.combinators.stack import Layers
from jaxseq.core.cell import Cell
from jaxseq.core.unroll import Run


class Parallel(Layers, Cell):
    """Reads a tuple, each part of it by a layer of its own, and gives the tuple of what they give.

        y = (layer_1(x_1), ..., layer_n(x_n))

    With it something stands before a cell that reads a tuple: `Map("identity")` passes a part on as it is,
    `Map("identity", 0)` one of integers without a feature axis, such as the boundaries of `Hierarchical`. It is a cell
    if all its layers are; params and states are tuples. The layers give as many steps as each other.

    >>> import jax.numpy as jnp, jaxseq as js
    >>> cell = js.Stack((Parallel((js.Embed(65, 8), js.Map("identity"))), js.Phased(js.LSTM(8, 16))))
    >>> tokens, times = jnp.array([3, 1, 4]), jnp.array([[0.0], [0.7], [5.2]])
    >>> cell.unroll(cell.init(jax.random.key(0)), (tokens, times))[1].shape
    (3, 16)
    """

    @property
    def _is_cell(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(isinstance(layer, Cell) for layer in self.layers)

    @property
    def input_rank(self) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(layer.input_rank for layer in self.layers)

    @property
    def input_size(self) -> tuple[Any, ...]:
        return tuple(getattr(layer, "input_size", None) for layer in self.layers)

    @property
    def output_size(self) -> tuple[Any, ...]:
        return tuple(getattr(layer, "output_size", None) for layer in self.layers)

    @property
    def keeps_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(layer.keeps_size for layer in self.layers)

    def zero_input(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> tuple[Any, ...]:
        self._check(params)
        return tuple(layer.zero_input(p, batch_shape) for layer, p in zip(self.layers, params, strict=True))

    def output_run(self, run: Run) -> Run:
        runs = [layer.output_run(run) for layer in self.layers]
        if len({run.length for run in runs}) > 1:
            raise ValueError(f"{self} needs layers that give as many steps as each other.")
        return runs[0]

    def step(self, params: tuple[Any, ...], state: tuple[Any, ...], x: Any, key: Array | None = None) -> Any:
        self._check(params)
        self._check(state, "states")
        self._check(x, "inputs")
        keys = [None] * len(self.layers) if key is None else jax.random.split(key, len(self.layers))
        layers: Any = self.layers
        results = [layer.step(*given) for layer, *given in zip(layers, params, state, x, keys, strict=True)]
        return tuple(state for state, _ in results), tuple(y for _, y in results)

    def _unroll(self, params: tuple[Any, ...], xs: Any, state: tuple[Any, ...], run: Run) -> Any:
        self._check(params)
        self.output_run(run)  # raises
        keys = self.split_keys(run).keys
        states, outputs = [], []
        for index, layer in enumerate(self.layers):
            own = run._replace(keys=None if keys is None else keys[:, index])
            with jax.named_scope(f"{index}_{type(layer).__name__}"):
                last, ys = layer._unroll(params[index], xs[index], state[index], own)
            states.append(last)
            outputs.append(ys)
        return tuple(states), tuple(outputs)
