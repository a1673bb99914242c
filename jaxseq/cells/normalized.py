"""Normalised features, normalised products, and the layer-normalised LSTM."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.gated import GATED_AXES, Gated
from jaxseq.cells.lstm import LSTM, LSTMState
from jaxseq.cells.pointwise import Pointwise
from jaxseq.core import errors
from jaxseq.core.activations import activation
from jaxseq.core.precision import widen


def standardize(z: Array, scale: Array, epsilon: float, center: bool = True) -> Array:
    """`scale` times `z` by the mean and deviation (not centred: by the root mean square) of its last axes.

    They are the axes of `scale`, as they are or flat. Sums are in float32 at least.
    """
    axes = (-1,) if z.shape[-1] == scale.size else (-2, -1)
    wide = widen(z)
    if center:
        wide = wide - wide.mean(axes, keepdims=True)
    wide = wide * jax.lax.rsqrt((wide**2).mean(axes, keepdims=True) + epsilon)
    return wide.astype(z.dtype) * _along(z, scale)


def normalized_products(
    cell: Gated, params: Any, scales: Any, hidden: Array, x: Array, epsilon: float, center: bool = True
) -> tuple[Array, Array]:
    """The products of a gated cell, each normalised before its bias is added."""
    from_input = standardize(cell.product(x, params.input_kernel), scales.input_scale, epsilon, center)
    from_recurrent = standardize(cell.product(hidden, params.recurrent_kernel), scales.recurrent_scale, epsilon, center)
    from_input = from_input + _along(from_input, params.bias)
    if hasattr(params, "recurrent_bias"):
        from_recurrent = from_recurrent + _along(from_recurrent, params.recurrent_bias)
    return from_input, from_recurrent


def _along(z: Array, values: Array) -> Array:
    """Values of gates and units in the layout and shape of the product `z`."""
    values = values.reshape(-1) if z.shape[-1] == values.size else values
    return jnp.broadcast_to(values, z.shape)


class FeatureNormParams(NamedTuple):
    """The parameters of normalised features; `shift` is None where there is none, with "rms"."""

    scale: Float[Array, "size"]
    shift: Float[Array, "size"] | None


class FeatureNorm(Pointwise):
    """Each step's features, normalised over themselves.

        kind="layer":  y = s (x - mean(x)) / sqrt(var(x) + ε) + b
        kind="rms":    y = s x / sqrt(mean(x²) + ε)

    s starts at 1, b at 0. It stands before the cell in a block with a shortcut, in a `Stack` inside `Residual`.
    `LayerNorm` and `RMSNorm` normalise the products inside a gated cell instead.

    J. L. Ba, J. R. Kiros and G. E. Hinton, Layer normalization, arXiv:1607.06450, 2016; B. Zhang and R. Sennrich, Root
    mean square layer normalization, NeurIPS 2019; before each part of a block as R. Xiong et al., On layer
    normalization in the Transformer architecture, ICML 2020.

    >>> import jaxseq as js
    >>> block = js.Residual(js.Stack((FeatureNorm(4), js.LRU(4, 8), js.Map("gelu"), js.Dense(4, 4))))
    >>> cell = js.Stack((js.Dense(2, 4), block, block, FeatureNorm(4), js.Dense(4, 1)))
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 1)
    """

    any_rank = True

    size: int
    _: dataclasses.KW_ONLY
    kind: Literal["layer", "rms"] = "layer"
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("layer", "rms"):
            raise ValueError(f'FeatureNorm needs kind="layer" or "rms", got {self.kind!r}.')
        errors.check_epsilon(self, self.epsilon)

    @property
    def input_size(self) -> int:
        return self.size

    @property
    def output_size(self) -> int:
        return self.size

    def init(self, key: Array) -> FeatureNormParams:
        errors.check_key(self, key)
        return FeatureNormParams(jnp.ones(self.size), jnp.zeros(self.size) if self.kind == "layer" else None)

    def axes(self) -> Any:
        spec = PartitionSpec("size")
        return FeatureNormParams._make((spec, spec if self.kind == "layer" else None))

    def apply(
        self, params: FeatureNormParams, x: Float[Array, "*batch size"], key: Array | None = None
    ) -> Float[Array, "*batch size"]:
        errors.check_params(self, params)
        errors.check_features(self, x, self.size)
        errors.check_dtype(self, x, params.scale.dtype)
        y = standardize(x, params.scale, self.epsilon, center=self.kind == "layer")
        return y if params.shift is None else y + jnp.broadcast_to(params.shift, y.shape)


class LayerNormLSTMParams(NamedTuple):
    """The parameters of a layer-normalised LSTM."""

    input_kernel: Float[Array, "input gate hidden"]
    recurrent_kernel: Float[Array, "recurrent gate hidden"]
    bias: Float[Array, "gate hidden"]
    input_scale: Float[Array, "gate hidden"]
    recurrent_scale: Float[Array, "gate hidden"]
    cell_scale: Float[Array, "hidden"]
    cell_shift: Float[Array, "hidden"]


class LayerNormLSTM(LSTM):
    """An LSTM whose products and whose memory, where it is shown, are normalised over the units.

        i, f, g, o = LN(x W; s_x) + LN(h R; s_h) + b
        c' = σ(f) c + σ(i) tanh(g)
        h' = σ(o) tanh(LN(c'; s_c) + d),   y = h'
        LN(z; s) = s (z - mean(z)) / sqrt(var(z) + ε)

    The products are normalised over all gates at once, as in the authors' code; their two shifts are one, b.
    `LayerNorm` normalises the products of any gated cell.

    J. L. Ba, J. R. Kiros and G. E. Hinton, Layer normalization, arXiv:1607.06450, 2016, equations 20 to 22.

    >>> cell = LayerNormLSTM(2, 3)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    _: dataclasses.KW_ONLY
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.check_epsilon(self, self.epsilon)

    def init(self, key: Array) -> LayerNormLSTMParams:
        input_kernel, recurrent_kernel, bias = super().init(key)
        ones, units = jnp.ones_like(bias), jnp.ones(self.hidden_size)
        return LayerNormLSTMParams(input_kernel, recurrent_kernel, bias, ones, ones, units, jnp.zeros_like(units))

    def axes(self) -> Any:
        unit = PartitionSpec("hidden")
        return LayerNormLSTMParams._make((*GATED_AXES, GATED_AXES.bias, GATED_AXES.bias, unit, unit))

    def products(self, params: Any, hidden: Array, x: Array) -> tuple[Array, Array]:
        return normalized_products(self, params, params, hidden, x, self.epsilon)

    def update(self, params: Any, state: LSTMState, from_input: Array, from_recurrent: Array) -> LSTMState:
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        i, f, g, o = self.split_gates(from_input + from_recurrent)
        cell = sigma(f) * state.cell + sigma(i) * tanh(g)
        shown = standardize(cell, params.cell_scale, self.epsilon) + jnp.broadcast_to(params.cell_shift, cell.shape)
        return LSTMState(hidden=sigma(o) * tanh(shown), cell=cell)
