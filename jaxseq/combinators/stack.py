"""Layers one after another."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxseq.core import errors
from jaxseq.core.cell import Cell, Run, SequenceLayer


class Layers(SequenceLayer):
    """Several layers, read in a way that a subclass gives; params and states are tuples of theirs."""

    layers: tuple[SequenceLayer, ...]

    if not TYPE_CHECKING:

        def __new__(cls, *values: Any, **fields: Any) -> Any:
            if len(values) > 1 and isinstance(values[0], SequenceLayer):
                raise TypeError(f"{cls.__name__} takes its layers as one tuple: {cls.__name__}({values!r}).")
            return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not isinstance(self.layers, tuple) or not self.layers:
            cure = f": {name}(({self.layers!r},))" if isinstance(self.layers, SequenceLayer) else ""
            raise TypeError(f"{name} needs a tuple of at least one layer, got {self.layers!r}{cure}.")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, SequenceLayer):
                cure = "call it with its sizes" if isinstance(layer, type) else "Map(function) makes one of a function"
                raise TypeError(f"{name} needs layers; number {index} is {layer!r}: {cure}.")

    def init(self, key: Array) -> tuple[Any, ...]:
        errors.check_key(self, key)
        keys = jax.random.split(key, len(self.layers))
        return tuple(layer.init(key) for layer, key in zip(self.layers, keys, strict=True))

    def initial_state(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> tuple[Any, ...]:
        self._check(params)
        return tuple(layer.initial_state(p, batch_shape) for layer, p in zip(self.layers, params, strict=True))

    def draw(self, params: tuple[Any, ...], key: Array) -> tuple[Any, ...]:
        self._check(params)
        keys = jax.random.split(key, len(self.layers))
        return tuple(layer.draw(p, key) for layer, p, key in zip(self.layers, params, keys, strict=True))

    def attach(self, params: Any, memory: Any, mask: Bool[Array, "*batch memory"] | None = None) -> tuple[Any, ...]:
        self._check(params)
        return tuple(layer.attach(p, memory, mask) for layer, p in zip(self.layers, params, strict=True))

    def axes(self) -> tuple[Any, ...]:
        return tuple(layer.axes() for layer in self.layers)

    def map_layers(self, function: Callable[[SequenceLayer, Any], Any], params: tuple[Any, ...]) -> tuple[Any, ...]:
        self._check(params)
        return tuple(layer.map_layers(function, p) for layer, p in zip(self.layers, params, strict=True))

    def split_keys(self, run: Run) -> Run:
        """The run with keys `[time, layer]`, a column for each layer."""
        if run.keys is None:
            return run
        return run._replace(keys=jax.vmap(lambda key: jax.random.split(key, len(self.layers)))(run.keys))

    def _check(self, parts: Any, name: str = "params") -> None:
        if not isinstance(parts, tuple) or len(parts) != len(self.layers):
            raise TypeError(
                f"{type(self).__name__} of {len(self.layers)} layers needs as many {name} in a tuple, got "
                f"{len(parts) if isinstance(parts, tuple) else type(parts).__name__}."
            )


class Sequential(Layers):
    """Layers one after another, each reading what the one before gives; params and states are tuples.

    It only unrolls; `Stack` also steps. Where sizes are known the chain is checked when it is built.

    >>> import jax.numpy as jnp, jaxseq as js
    >>> layer = Sequential((js.LSTM(2, 3), js.Dense(3, 1)))
    >>> state, ys = layer.unroll(layer.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape
    (5, 1)
    """

    _joined: ClassVar[int] = 1  # how many steps that a layer gives are one step for the next

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        size = None  # of what a layer is given
        for index, layer in enumerate(self.layers):
            if size is not None and layer.input_rank == 0:
                raise ValueError(f"{name}: {layer} (number {index}) reads tokens, but it is given {size} features.")
            needs = getattr(layer, "input_size", None)
            if not _fits(size, needs):
                raise ValueError(f"{name}: {layer} (number {index}) needs {needs} features, but it is given {size}.")
            if not layer.keeps_size or size is None:
                size = getattr(layer, "output_size", None)
            size = jax.tree.map(lambda size: size * self._joined, size)

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layers[0].input_rank

    @property
    def input_names(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layers[0].input_names

    @property
    def input_size(self) -> Any:
        return getattr(self.layers[_telling(self.layers, "input_size")], "input_size", None)

    @property
    def output_size(self) -> Any:
        backward = self.layers[::-1]
        return getattr(backward[_telling(backward, "output_size")], "output_size", None)

    @property
    def keeps_size(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(layer.keeps_size for layer in self.layers)

    def zero_input(self, params: tuple[Any, ...], batch_shape: tuple[int, ...] = ()) -> Any:
        self._check(params)
        first = _telling(self.layers, "input_size")
        zero, dtype = self.layers[first].zero_input(params[first], batch_shape), errors.float_dtype(params)

        def cast(leaf):  # a first layer without params does not know the dtype
            return leaf.astype(dtype) if dtype and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(cast, zero)

    def output_run(self, run: Run) -> Run:
        for index, layer in enumerate(self.layers):
            run = layer.output_run(self._between(None, run)[1] if index else run)
        return run

    def _unroll(self, params: tuple[Any, ...], xs: Any, state: tuple[Any, ...], run: Run) -> Any:
        self._check(params)
        run = self.split_keys(run)
        states = []
        for index, layer in enumerate(self.layers):
            xs, run = self._between(xs, run) if index else (xs, run)
            own = run._replace(keys=None if run.keys is None else run.keys[:, index])
            with jax.named_scope(f"{index}_{type(layer).__name__}"):
                last, xs = layer._unroll(params[index], xs, state[index], own)
            run = layer.output_run(run)
            states.append(last)
        return tuple(states), xs

    def _between(self, xs: Any, run: Run) -> tuple[Any, Run]:
        """What the next layer reads, of the outputs of the one before."""
        return xs, run


def _fits(given: Any, needed: Any) -> bool:
    """Whether two sizes are equal where both are known, those of tuples part by part."""
    if isinstance(given, tuple) and isinstance(needed, tuple) and len(given) == len(needed):
        return all(map(_fits, given, needed))
    return given is None or needed is None or given == needed


class Stack(Sequential, Cell):
    """Cells one after another: a deep cell; params and states are tuples.

    >>> import jax.numpy as jnp, jaxseq as js
    >>> cell = Stack((js.Embed(65, 8), js.LSTM(8, 16), js.Dense(16, 65)))
    >>> params = cell.init(jax.random.key(0))
    >>> state, logits = cell.step(params, cell.initial_state(params), jnp.array(3))
    >>> logits.shape
    (65,)
    """

    layers: tuple[Cell, ...]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Cell):
                raise TypeError(f"Stack needs cells; {layer} (number {index}) reads whole sequences: use Sequential.")

    def step(self, params: tuple[Any, ...], state: tuple[Any, ...], x: Any, key: Array | None = None) -> Any:
        self._check(params)
        self._check(state, "states")
        keys = [None] * len(self.layers) if key is None else jax.random.split(key, len(self.layers))
        states = []
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"{index}_{type(layer).__name__}"):
                next_state, x = layer.step(params[index], state[index], x, keys[index])
            states.append(next_state)
        return tuple(states), x


def _telling(layers: tuple[SequenceLayer, ...], name: str) -> int:
    """Which layer tells a size: the first that knows it, or through which it is not kept."""
    tells = (getattr(layer, name, None) is not None or not layer.keeps_size for layer in layers)
    return next((index for index, here in enumerate(tells) if here), 0)
