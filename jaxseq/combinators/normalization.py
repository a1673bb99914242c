"""Normalised and bounded weights, and normalised products, around layers."""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.clockwork import connected
from jaxseq.cells.gated import GATED_AXES, Gated, GatedWrapper
from jaxseq.cells.normalized import normalized_products
from jaxseq.core import errors
from jaxseq.core.kernels import Role, kernel_axes, map_kernels
from jaxseq.core.precision import widen
from jaxseq.core.wrapper import Extended, Wrapper

_TINY = 1e-30  # of a squared norm
_FEATURES = ("input", "recurrent", "depth", "height", "width")  # what a unit adds up: axes of kernels


class LayerNormParams(NamedTuple):
    """The parameters of a cell with normalised products: its own, and a scale for each product."""

    cell: Any
    input_scale: Float[Array, "gate hidden"]
    recurrent_scale: Float[Array, "gate hidden"]


class LayerNorm(GatedWrapper, Extended):
    """A gated cell whose two products are normalised, each over all its gates and units, before their biases.

        z_x = s_x (x W - mean) / sqrt(var + ε) + b,   z_h = s_h (h R - mean) / sqrt(var + ε) (+ a recurrent bias)

    It takes any `Gated` cell: LSTM and its variants, GRU, Elman. The scales start at 1. A memory cell is not
    normalised; `LayerNormLSTM` does that too. `FeatureNorm` normalises what stands between cells.

    J. L. Ba, J. R. Kiros and G. E. Hinton, Layer normalization, arXiv:1607.06450, 2016.

    >>> import jax, jaxseq as js
    >>> cell = LayerNorm(js.GRU(2, 3))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    cell: Gated
    _: dataclasses.KW_ONLY
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if isinstance(self.cell, int):
            raise TypeError(
                f"{type(self).__name__} normalises the products inside a gated cell, got {self.cell}: "
                "FeatureNorm(size) normalises features."
            )
        super().__post_init__()
        errors.check_epsilon(self, self.epsilon)
        if not isinstance(self.cell, Gated) or type(self.cell).products is not Gated.products:
            name, inner = type(self).__name__, type(self.cell).__name__
            wrapped = isinstance(self.cell, Wrapper)
            cure = f"{name} goes next to the cell, {inner}({name}(cell))" if wrapped else "they are not plain"
            raise TypeError(
                f"{name} normalises the plain products of a gated cell, but {self.cell} has others: {cure}."
            )

    def init(self, key: Array) -> LayerNormParams:
        params = self.cell.init(key)
        return LayerNormParams(params, jnp.ones_like(params.bias), jnp.ones_like(params.bias))

    def axes(self) -> Any:
        return LayerNormParams(self.cell.axes(), GATED_AXES.bias, GATED_AXES.bias)

    def products(self, params: LayerNormParams, hidden: Array, x: Array) -> tuple[Array, Array]:
        return normalized_products(self.cell, params.cell, params, hidden, x, self.epsilon)


class RMSNorm(LayerNorm):
    """A gated cell whose two products are divided by their root mean square, before their biases.

        z_x = s_x x W / sqrt(mean((x W)²) + ε) + b,   z_h = s_h h R / sqrt(mean((h R)²) + ε) (+ a recurrent bias)

    As `LayerNorm`, without the mean. B. Zhang and R. Sennrich, Root mean square layer normalization, NeurIPS 2019.

    >>> import jax, jaxseq as js
    >>> cell = RMSNorm(js.LSTM(2, 3))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    def products(self, params: LayerNormParams, hidden: Array, x: Array) -> tuple[Array, Array]:
        return normalized_products(self.cell, params.cell, params, hidden, x, self.epsilon, center=False)


class Multiplied(NamedTuple):
    """The params of a cell as it multiplies them, with noise or a memory, beside those that they are computed from."""

    cell: Any
    stored: Any


class MultipliedDrawn(Multiplied):
    """`Multiplied` whose cell holds the noise of a sequence, which a memory attached later leaves as it is."""


class Reparametrized(Wrapper):
    """A wrapper whose `kernels` computes the params of the cell; before it draws its noise, or attaches a memory."""

    @abc.abstractmethod
    def kernels(self, params: Any) -> Any:
        """The params of the cell."""

    def inner(self, params: Any) -> Any:
        return params.cell if isinstance(params, Multiplied) else self.kernels(params)

    def draw(self, params: Any, key: Array) -> MultipliedDrawn:
        return MultipliedDrawn(self.cell.draw(self.inner(params), key), _stored(params))

    def attach(self, params: Any, memory: Any, mask: Any = None) -> Any:
        if isinstance(params, MultipliedDrawn):
            return params._replace(cell=self.cell.attach(params.cell, memory, mask))
        stored = _stored(params)
        if memory is None:
            return stored
        before = self.kernels(stored)
        attached = self.cell.attach(before, memory, mask)
        known = {id(leaf) for leaf in jax.tree.leaves(before)}
        reads = any(id(leaf) not in known for leaf in jax.tree.leaves(attached))
        return Multiplied(attached, stored) if reads else stored


def _stored(params: Any) -> Any:
    return params.stored if isinstance(params, Multiplied) else params


class WeightNormParams(NamedTuple):
    """The parameters of a layer with normalised weights: directions in the place of its kernels, and their lengths."""

    cell: Any
    scales: tuple[Float[Array, "gate *units"], ...]


class WeightNorm(Reparametrized, Extended):
    """A layer whose kernels are a direction and a length for each unit: w = g v / |v|.

    It takes any layer, a Stack too, that has kernels: arrays whose first axis is "input" or "recurrent" in `axes()`.
    `scales` holds g for each of them, in the order of the params. They start at |v|, so the layer computes what it did.
    A unit whose weights start at 0 has no direction, and stays there: draw its kernel otherwise.

    T. Salimans and D. P. Kingma, Weight normalization, NeurIPS 2016.

    >>> import jax, jaxseq as js
    >>> cell = WeightNorm(js.LSTM(2, 3))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    changes_kernels = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kernel_axes(self.cell, "input", "recurrent")

    def init(self, key: Array) -> WeightNormParams:
        params = self.cell.init(key)
        return WeightNormParams(params, tuple(self._lengths(params)))

    def measured(self, params: WeightNormParams, *roles: Role) -> WeightNormParams:
        """The params with the lengths of the kernels of these roles as scales: the kernels are what they look like."""
        kernels = [names for names in kernel_axes(self.cell, "input", "recurrent") if names]
        each = zip(kernels, params.scales, self._lengths(params.cell), strict=True)
        return params._replace(scales=tuple(length if names[0] in roles else scale for names, scale, length in each))

    def axes(self) -> Any:
        kernels = [names for names in kernel_axes(self.cell, "input", "recurrent") if names]
        units = [[name for name in names if name not in ("gate", *_FEATURES)] for names in kernels]
        return WeightNormParams._make((self.cell.axes(), tuple(PartitionSpec("gate", *names) for names in units)))

    def kernels(self, params: WeightNormParams) -> Any:
        scales = iter(params.scales)

        def scale(index, kernel):
            axes = self._features[index]
            wide = widen(kernel)
            factor = widen(next(scales)) / _length(wide, axes)
            return (wide * jnp.broadcast_to(jnp.expand_dims(factor, axes), wide.shape)).astype(kernel.dtype)

        return map_kernels(self.cell, params.cell, scale, "input", "recurrent")

    def decayed(self, flags: WeightNormParams) -> WeightNormParams:
        """Flags for weight decay: those of directions moved to their scales."""
        leaves, tree = jax.tree.flatten(flags.cell)
        kernels = [names is not None for names in kernel_axes(self.cell, "input", "recurrent")]
        rest = [flag and not is_kernel for flag, is_kernel in zip(leaves, kernels, strict=True)]
        scales = tuple(flag for flag, is_kernel in zip(leaves, kernels, strict=True) if is_kernel)
        return WeightNormParams(jax.tree.unflatten(tree, rest), scales)

    def _lengths(self, params: Any) -> list[Array]:
        """The lengths of all units in each kernel."""
        lengths = []

        def measure(index, kernel):
            lengths.append(_length(widen(kernel), self._features[index]).astype(kernel.dtype))
            return kernel

        map_kernels(self.cell, params, measure, "input", "recurrent")
        return lengths

    @property
    def _features(self) -> list[tuple[int, ...]]:
        """The axes of the features in each kernel, with its gates first as `map_kernels` gives it."""
        rest = [
            [name for name in names or () if name != "gate"] for names in kernel_axes(self.cell, "input", "recurrent")
        ]
        return [tuple(1 + axis for axis, name in enumerate(names) if name in _FEATURES) for names in rest]


def _length(kernel: Array, axes: tuple[int, ...]) -> Float[Array, "gate *units"]:
    """The length of the weights of each unit."""
    return jnp.sqrt(jnp.maximum((kernel**2).sum(axes), _TINY))


class SpectralBound(Reparametrized):
    """A layer whose recurrent kernels have no singular value above `bound`.

        R' = R min(1, bound / σ_max(R)) for each gate

    It takes any layer, a Stack too, that has kernels whose first axis is "recurrent" in `axes()`. With bound <= 1 the
    gradient through h' = tanh(x W + h R' + b) cannot grow. A sequence costs one singular value decomposition a gate.
    Each block of an sLSTM is bounded for itself, and of a Clockwork kernel what is read. Of a convolution the places of
    the window are one matrix, whose bound the convolution may exceed by the root of their number.

    Y. Yoshida and T. Miyato, Spectral norm regularization, arXiv:1705.10941, 2017, penalise what is bounded here.

    >>> import jax, jaxseq as js
    >>> cell = SpectralBound(js.Elman(2, 3), bound=0.5)
    >>> kernel = cell.inner(cell.init(jax.random.key(0))).recurrent_kernel
    >>> print(f"{jnp.linalg.norm(kernel[:, 0], 2):.2f}")
    0.50
    """

    changes_kernels = True

    _: dataclasses.KW_ONLY
    bound: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kernel_axes(self.cell, "recurrent")
        if not self.bound > 0:
            raise ValueError(f"SpectralBound needs a bound > 0, got {self.bound}.")

    def kernels(self, params: Any) -> Any:
        params = self.cell.map_layers(connected, params)
        return map_kernels(self.cell, params, lambda _, kernel: self._bounded(kernel), "recurrent")

    def _bounded(self, kernel: Array) -> Array:
        wide = widen(kernel)  # there is no decomposition of bfloat16
        matrices = wide.reshape(len(wide), -1, wide.shape[-1])
        largest = jnp.linalg.svd(matrices, compute_uv=False).max(axis=-1)
        factor = self.bound / jnp.maximum(largest, self.bound)
        return (
            (matrices * jnp.broadcast_to(factor[:, None, None], matrices.shape))
            .reshape(wide.shape)
            .astype(kernel.dtype)
        )
