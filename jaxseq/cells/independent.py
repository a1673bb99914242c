"""The independently recurrent network."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.elman import Elman
from jaxseq.cells.gated import GATED_AXES
from jaxseq.core.activations import Activation


class IndRNNParams(NamedTuple):
    """The parameters of an independently recurrent network."""

    input_kernel: Float[Array, "input 1 hidden"]
    recurrent_weights: Float[Array, "hidden"]
    bias: Float[Array, "1 hidden"]


class IndRNN(Elman):
    """Independently recurrent network: each unit remembers itself alone.

        h' = relu(x W + u h + b),   y = h'

    Layers above mix the units. `recurrent_weights`, u, starts uniform in [0, 1). The paper keeps |u| <= 2^(1 / T)
    while it trains on sequences of T steps: clip it after each update.

    S. Li et al., Independently recurrent neural network (IndRNN): building a longer and deeper RNN, CVPR 2018.

    >>> cell = IndRNN(input_size=2, hidden_size=3)
    >>> params = cell.init(jax.random.key(0))
    >>> params.recurrent_weights.shape, cell.unroll(params, jnp.ones((5, 2)))[1].shape
    ((3,), (5, 3))
    """

    _: dataclasses.KW_ONLY
    activation: Activation = "relu"

    def init(self, key: Array) -> IndRNNParams:
        key, weights_key = jax.random.split(key)
        params = super().init(key)
        weights = jax.random.uniform(weights_key, (self.hidden_size,))
        return IndRNNParams(params.input_kernel, weights, params.bias)

    def axes(self) -> Any:
        return IndRNNParams(GATED_AXES.input_kernel, PartitionSpec("hidden"), GATED_AXES.bias)  # pyright: ignore

    def products(self, params: Any, hidden: Array, x: Array) -> tuple[Array, Array]:
        weights = jnp.broadcast_to(params.recurrent_weights, hidden.shape)
        return self.product(x, params.input_kernel, params.bias), weights * hidden
