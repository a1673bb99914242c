"""Shortcuts around a layer."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.core import errors
from jaxseq.core.unroll import Run
from jaxseq.core.wrapper import Extended, Wrapper

_lecun = initializers.lecun_normal()


class Shortcut(Wrapper):
    """A layer whose output is put together with its input, by `join`; the base of those that do."""

    @abc.abstractmethod
    def join(self, params: Any, x: Any, y: Any) -> Any:
        """The output, of one step or of all, from the input and what the layer makes of it."""

    def step(self, params: Any, state: Any, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        state, y = super().step(params, state, x, key)
        return state, self.join(params, x, y)

    def _unroll(self, params: Any, xs: Any, state: Any, run: Run) -> tuple[Any, Any]:
        state, ys = self.cell._unroll(self.inner(params), xs, state, run)
        return state, self.join(params, xs, ys)


class Residual(Shortcut):
    """A layer whose output is added to its input: y = x + cell(x). It takes any layer that keeps the shape.

    K. He et al., Deep residual learning for image recognition, CVPR 2016.

    >>> import jaxseq as js
    >>> js.Residual(js.Map("relu")).unroll((), jnp.array([[-1.0, 2.0]]))[1].tolist()
    [[-1.0, 4.0]]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if None not in (self.input_size, self.output_size) and self.input_size != self.output_size:
            raise ValueError(
                f"Residual adds input to output, but {self.cell} has {self.input_size} and {self.output_size}."
            )

    def join(self, params: Any, x: Any, y: Any) -> Any:
        if jax.tree.map(jnp.shape, x) != jax.tree.map(jnp.shape, y):
            raise ValueError(f"{self} cannot add its input {errors.shape_of(x)} to the output {errors.shape_of(y)}.")
        return jax.tree.map(jnp.add, x, y)


class Skip(Shortcut):
    """A layer whose output is its input and its output, side by side: y = [x; cell(x)].

    In a `Stack` of such cells every layer reads the input and all layers below it, and what follows the stack reads
    all of them.

    A. Graves, Generating sequences with recurrent neural networks, arXiv:1308.0850, 2013, connects its layers so.

    >>> import jaxseq as js
    >>> cell = js.Stack((js.Skip(js.LSTM(2, 8)), js.Skip(js.LSTM(2 + 8, 8)), js.Dense(2 + 8 + 8, 3)))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    keeps_size = False  # pyright: ignore[reportAssignmentType]

    @property
    def output_size(self) -> Any:
        sizes = self.input_size, super().output_size
        return sum(sizes) if all(isinstance(size, int) for size in sizes) else None

    def join(self, params: Any, x: Any, y: Any) -> Array:
        vectors = all(isinstance(part, jax.Array) and jnp.issubdtype(part.dtype, jnp.floating) for part in (x, y))
        if not vectors or x.shape[:-1] != y.shape[:-1]:
            raise ValueError(f"{self} cannot join its input {errors.shape_of(x)} and the output {errors.shape_of(y)}.")
        return jnp.concatenate([x, y], axis=-1)


class HighwayParams(NamedTuple):
    """The parameters of a highway around a layer: those of its gate."""

    cell: Any
    gate_kernel: Float[Array, "input output"]
    gate_bias: Float[Array, "output"]


class Highway(Shortcut, Extended):
    """A layer around which a gate lets its input pass.

        t = σ(x W + b)
        y = t cell(x) + (1 - t) x

    The bias b starts at `gate_bias`, below 0, so that at first most of the input passes. (`RecurrentHighway` is the
    same from step to step.)

    R. K. Srivastava et al., Training very deep networks, NeurIPS 2015.

    >>> import jaxseq as js
    >>> cell = js.Highway(js.LSTM(3, 3))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 3)))[1].shape
    (5, 3)
    """

    _: dataclasses.KW_ONLY
    gate_bias: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell.input_rank != 1 or not isinstance(self.input_size, int) or self.input_size != self.output_size:
            raise ValueError(
                f"Highway needs a layer that reads and gives vectors of one size, but {self.cell} reads "
                f"{self.input_size} and gives {self.output_size} features."
            )

    def init(self, key: Array) -> HighwayParams:
        cell_key, gate_key = jax.random.split(key)
        kernel = _lecun(gate_key, (self.input_size, self.output_size))
        return HighwayParams(self.cell.init(cell_key), kernel, jnp.full(self.output_size, self.gate_bias))

    def axes(self) -> Any:
        return HighwayParams._make((self.cell.axes(), PartitionSpec("input", "output"), PartitionSpec("output")))

    def join(self, params: HighwayParams, x: Array, y: Array) -> Array:
        errors.check_features(self, x, self.input_size)
        if x.shape != y.shape:
            raise ValueError(f"{self} cannot mix its input {errors.shape_of(x)} and the output {errors.shape_of(y)}.")
        z = x @ params.gate_kernel
        gate = jax.nn.sigmoid(z + jnp.broadcast_to(params.gate_bias, z.shape))
        return gate * y + (1 - gate) * x
