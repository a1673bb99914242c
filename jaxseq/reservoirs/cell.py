"""The reservoir of an echo state network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.gated import GATED_AXES, Recurrent
from jaxseq.core import errors
from jaxseq.core.activations import Activation, activation
from jaxseq.core.sharding import spread
from jaxseq.reservoirs.spectrum import spectral_radius


class ReservoirParams(NamedTuple):
    """The parameters of a reservoir: random arrays, and the numbers that scale them, which are tuned.

    The kernels hold one gate. `input_scale` is one number, or one for each input.
    """

    input_kernel: Float[Array, "input gate hidden"]
    recurrent_kernel: Float[Array, "recurrent gate hidden"]
    bias: Float[Array, "gate hidden"]
    radius: Float[Array, ""]
    leak: Float[Array, ""]
    input_scale: Float[Array, "*input"]
    bias_scale: Float[Array, ""]


class ReservoirState(NamedTuple):
    """The state of a reservoir."""

    hidden: Float[Array, "*batch hidden"]


class Reservoir(Recurrent):
    """The random network of leaky units of an echo state network; only what reads it is trained.

        h' = (1 - a) h + a tanh((s x) W + ρ h R + c b + noise),   y = h'

    W and b are drawn from U(-1, 1). So is R where units are connected, each with `density` of the units, at least one,
    and then it is scaled to the spectral radius 1. `radius`, ρ, `leak`, a, `input_scale`, s, and `bias_scale`, c, are
    params of their own: `vmap` tries many of them, and gradients tune them. A tuple as `input_scale` has a number for
    each input. `noise` is the deviation of the noise that each unit gets with a key.

    A radius below 1 mostly lets the state forget where it began; `reservoirs.state_distances` measures it. Outputs fed
    back are inputs: `Feedback` closes the loop, and `reservoirs.fit_readout` fits the `Dense` that ends it. Products
    with R are dense, which is faster at all sizes and densities tried (`benchmarks/results/reservoirs-sparse-cpu.md`).

    H. Jaeger, The "echo state" approach to analysing and training recurrent neural networks, GMD report 148, 2001.

    >>> import jaxseq as js
    >>> model = js.Stack((js.Frozen(Reservoir(1, 100, radius=0.8)), js.Dense(100, 1)))
    >>> series = jnp.sin(jnp.arange(300) / 4)[:, None]
    >>> params = js.reservoirs.fit_readout(model, model.init(jax.random.key(0)), series[:-1], series[1:], washout=50)
    >>> state, ys = model.unroll(params, series[:-1])
    >>> bool(jnp.abs(ys - series[1:])[50:].max() < 0.001)
    True
    """

    gates: ClassVar[tuple[str, ...]] = ("h",)

    _: dataclasses.KW_ONLY
    radius: float = 0.9
    leak: float = 1.0
    input_scale: float | tuple[float, ...] = 1.0
    bias_scale: float = 0.0
    density: float = 0.1
    noise: float = 0.0
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("leak", "density"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Reservoir needs 0 < {name} <= 1, got {getattr(self, name)}.")
        for name in ("radius", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Reservoir needs a finite {name} >= 0, got {getattr(self, name)}.")
        scales = self.input_scale if isinstance(self.input_scale, tuple) else (self.input_scale,)
        if not all(isinstance(scale, int | float) and not isinstance(scale, bool) for scale in scales):
            raise TypeError(
                f"Reservoir needs a number, or a tuple of numbers, as input_scale, got {self.input_scale!r}."
            )
        if isinstance(self.input_scale, tuple) and len(scales) != self.input_size:
            raise ValueError(
                f"Reservoir needs one input_scale, or {self.input_size}, one for each input, got {len(scales)}."
            )

    def init(self, key: Array) -> ReservoirParams:
        errors.check_key(self, key)
        input_key, weight_key, choice_key, bias_key = jax.random.split(key, 4)
        units = self.hidden_size
        connections = max(1, round(self.density * units))
        ranks = jax.random.uniform(choice_key, (units, units)).argsort(axis=0).argsort(axis=0)
        kernel = jnp.where(ranks < connections, _uniform(weight_key, (units, units)), 0)
        return ReservoirParams(
            input_kernel=_uniform(input_key, (self.input_size, 1, units)),
            recurrent_kernel=(kernel / spectral_radius(kernel))[:, None],
            bias=_uniform(bias_key, (1, units)),
            radius=jnp.asarray(self.radius, float),
            leak=jnp.asarray(self.leak, float),
            input_scale=jnp.asarray(self.input_scale, float),
            bias_scale=jnp.asarray(self.bias_scale, float),
        )

    def axes(self) -> Any:
        scale = PartitionSpec(None) if isinstance(self.input_scale, tuple) else PartitionSpec()
        return ReservoirParams._make((*GATED_AXES, PartitionSpec(), PartitionSpec(), scale, PartitionSpec()))

    def initial_state(self, params: ReservoirParams, batch_shape: tuple[int, ...] = ()) -> ReservoirState:
        return ReservoirState(self.zeros(params, batch_shape))

    def step(
        self, params: ReservoirParams, state: ReservoirState, x: Float[Array, "*batch input"], key: Array | None = None
    ) -> tuple[ReservoirState, Float[Array, "*batch hidden"]]:
        self.check(params, state, x)
        z = self.product(x * spread(params.input_scale, x), params.input_kernel, params.bias_scale * params.bias)
        z = z + params.radius * self.product(state.hidden, params.recurrent_kernel)
        if key is not None and self.noise:
            z = z + self.noise * jax.random.normal(key, z.shape, z.dtype)
        hidden = (1 - params.leak) * state.hidden + params.leak * activation(self.activation)(z)
        return ReservoirState(hidden), hidden


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-1, maxval=1)
