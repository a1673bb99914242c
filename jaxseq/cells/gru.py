"""Gated recurrent units: with the reset after the recurrent product, before it, or without one."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.cells.gated import GATED_AXES, Gated, GatedParams, Recurrent
from jaxseq.core.activations import Activation, activation


class GRUState(NamedTuple):
    """The state of a gated recurrent unit."""

    hidden: Float[Array, "*batch hidden"]


class GRUParams(NamedTuple):
    """The parameters of a GRU, with a bias for each of its products."""

    input_kernel: Float[Array, "input gate hidden"]
    recurrent_kernel: Float[Array, "recurrent gate hidden"]
    bias: Float[Array, "gate hidden"]
    recurrent_bias: Float[Array, "gate hidden"]


class GRUBase(Recurrent):
    """What every GRU has: activations, and a hidden state that starts at 0."""

    _: dataclasses.KW_ONLY
    activation: Activation = "tanh"
    gate_activation: Activation = "sigmoid"

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> GRUState:
        return GRUState(self.zeros(params, batch_shape))


class GRU(GRUBase, Gated):
    """Gated recurrent unit, the reset gate after the recurrent product: the form of cuDNN, torch and Keras.

        r, z, n = x W + b;   u_r, u_z, u_n = h R + d
        n' = tanh(n + σ(r + u_r) u_n)
        h' = (1 - σ(z + u_z)) n' + σ(z + u_z) h,   y = h'

    K. Cho et al., Learning phrase representations using RNN encoder-decoder, EMNLP 2014 (revision 3 of
    arXiv:1406.1078; `GRUv1` is the first form).

    >>> import jax
    >>> cell = GRU(input_size=2, hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape
    (5, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    keeps: ClassVar[tuple[str, ...]] = ("z",)

    def init(self, key: Array) -> GRUParams:
        params = super().init(key)
        return GRUParams(*params, recurrent_bias=jnp.zeros_like(params.bias))

    def axes(self) -> Any:
        return GRUParams(*GATED_AXES, recurrent_bias=GATED_AXES.bias)

    def update(self, params: Any, state: GRUState, from_input: Array, from_recurrent: Array) -> GRUState:
        sigma = activation(self.gate_activation)
        (r, z, n), (u_r, u_z, u_n) = self.split_gates(from_input), self.split_gates(from_recurrent)
        update = sigma(z + u_z)
        candidate = activation(self.activation)(n + sigma(r + u_r) * u_n)
        return GRUState((1 - update) * candidate + update * state.hidden)


class GRUv1(GRUBase):
    """Gated recurrent unit as first published: the reset gate before the recurrent product.

        r, z, n = x W + b
        n' = tanh(n + (σ(r + h R_r) h) R_n)
        h' = (1 - σ(z + h R_z)) n' + σ(z + h R_z) h,   y = h'

    It takes two recurrent products a step, one after the other.

    K. Cho et al., Learning phrase representations using RNN encoder-decoder, EMNLP 2014 (arXiv:1406.1078v1).

    >>> import jax
    >>> GRUv1(2, 3).init(jax.random.key(0)).recurrent_kernel.shape
    (3, 3, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("r", "z", "n")
    keeps: ClassVar[tuple[str, ...]] = ("z",)

    def step(self, params: GatedParams, state: GRUState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        sigma, hidden = activation(self.gate_activation), state.hidden
        r, z, n = self.split_gates(self.product(x, params.input_kernel, params.bias))
        u_r, u_z = self.split_gates(self.product(hidden, params.recurrent_kernel[:, :2]), 2)
        update = sigma(z + u_z)
        (u_n,) = self.split_gates(self.product(sigma(r + u_r) * hidden, params.recurrent_kernel[:, 2:]), 1)
        hidden = (1 - update) * activation(self.activation)(n + u_n) + update * hidden
        return GRUState(hidden), hidden


class MinimalGRU(GRUBase, Gated):
    """Gated recurrent unit with an update gate and no reset: the simplified form that textbooks begin with.

        z, n = x W + h R + b
        n' = tanh(n)
        h' = (1 - σ(z)) n' + σ(z) h,   y = h'

    It is the GRU with its reset gate held open, r = 1. (The "minimal gated unit" of Zhou et al. 2016 resets too, by
    the same gate.)

    R. Dey and F. M. Salem, Gate-variants of gated recurrent unit neural networks, MWSCAS 2017, discuss such reductions.

    >>> import jax
    >>> MinimalGRU(2, 3).init(jax.random.key(0)).bias.shape
    (2, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("z", "n")
    keeps: ClassVar[tuple[str, ...]] = ("z",)

    def update(self, params: GatedParams, state: GRUState, from_input: Array, from_recurrent: Array) -> GRUState:
        z, n = self.split_gates(from_input + from_recurrent)
        update = activation(self.gate_activation)(z)
        return GRUState((1 - update) * activation(self.activation)(n) + update * state.hidden)
