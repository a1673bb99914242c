"""Layers one after another."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxseq.cells.pointwise import Pointwise
from jaxseq.core import errors
from jaxseq.core.cell import Cell, Run, SequenceLayer
from jaxseq.core.layer import Layer
from jaxseq.core.wrapper import Wrapper


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

    def map_layers(self, function: Callable[[Layer, Any], Any], params: tuple[Any, ...]) -> tuple[Any, ...]:
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

    It only unrolls; `Stack` also steps. Where sizes and ranks are known the chain is checked when it is built. It reads
    inputs of the rank of its first layer that is made for one: before an image layer, `Dense`, `FeatureNorm`,
    `Dropout` and named activations read the channels of images.

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
        size, rank = None, None  # of what a layer is given
        for index, layer in enumerate(self.layers):
            if size is not None and layer.input_rank == 0:
                raise ValueError(f"{name}: {layer} (number {index}) reads tokens, but it is given {size} features.")
            self._check_rank(index, rank)
            needs = getattr(layer, "input_size", None)
            if not _fits(size, needs):
                raise ValueError(f"{name}: {layer} (number {index}) needs {needs} features, but it is given {size}.")
            if not layer.keeps_size or size is None:
                size = getattr(layer, "output_size", None)
            size = jax.tree.map(lambda size: size * self._joined, size)
            rank = _rank_after(layer, self._rank if index == 0 else rank)

    @property
    def _rank(self) -> Any:
        """The rank of what the first layer reads."""
        rank = self.layers[self._fixing].input_rank
        return rank if isinstance(rank, int) and rank else self.layers[0].input_rank

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._rank

    @property
    def any_rank(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(layer.any_rank for layer in self.layers)

    @property
    def output_rank(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return functools.reduce(lambda rank, layer: _rank_after(layer, rank), self.layers, self._rank)

    @property
    def _fixing(self) -> int:
        """Which layer fixes the rank of the inputs: the first one that does not read any."""
        return next((index for index, layer in enumerate(self.layers) if not layer.any_rank), 0)

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
        first, fixing = _telling(self.layers, "input_size"), self._fixing
        if first < fixing and self.input_rank != 1:  # the one knows the features, the other the places
            zero = self.layers[fixing].zero_input(params[fixing], batch_shape)
            zero = jnp.zeros((*zero.shape[:-1], self.input_size), zero.dtype)
        else:
            zero = self.layers[first].zero_input(params[first], batch_shape)
        dtype = errors.float_dtype(params)

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
            if index and hasattr(xs, "ndim"):
                self._check_rank(index, xs.ndim - 1 - len(run.batch_shape))
            with jax.named_scope(f"{index}_{type(layer).__name__}"):
                last, xs = layer._unroll(params[index], xs, state[index], own)
            run = layer.output_run(run)
            states.append(last)
        return tuple(states), xs

    def _check_rank(self, index: int, given: Any) -> None:
        """Raises ValueError if a layer is given inputs of another rank than it reads, as far as both are known."""
        layer = self.layers[index]
        reads = layer.input_rank
        known = isinstance(given, int) and isinstance(reads, int)
        if known and given != reads and not layer.any_rank and not (reads and _takes_all(layer)):
            raise ValueError(
                f"{type(self).__name__}: {layer} (number {index}) reads {_kind(reads)}, but it is given "
                f"{_kind(given)}: put Map(function, {given}) between, with a function from the one to the other; a "
                f'chain whose own inputs are {_kind(reads)} can begin with Map("identity", {reads}).'
            )

    def _between(self, xs: Any, run: Run) -> tuple[Any, Run]:
        """What the next layer reads, of the outputs of the one before."""
        return xs, run


def _rank_after(layer: SequenceLayer, given: Any) -> Any:
    """The rank of what a layer gives, given inputs of a rank; None where it is not known."""
    return given if layer.any_rank or layer.keeps_size else layer.output_rank


def _takes_all(layer: SequenceLayer) -> bool:
    """Whether a layer begins with a function of one's own, which takes what it takes."""
    if isinstance(layer, Sequential):
        return _takes_all(layer.layers[layer._fixing])
    return _takes_all(layer.cell) if isinstance(layer, Wrapper) else isinstance(layer, Pointwise)


def _kind(rank: int) -> str:
    return {0: "tokens", 1: "vectors", 2: "rows", 3: "images"}.get(rank, "arrays") + f" (rank {rank})"


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
