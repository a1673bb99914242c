"""The network whose only memory is its output."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.gated import GATED_AXES, init_gated
from jaxseq.cells.pointwise import Pointwise, check_parts
from jaxseq.core import errors
from jaxseq.core.activations import Activation, activation

_lecun = initializers.lecun_normal()


class JordanParams(NamedTuple):
    """The parameters of a Jordan network: the first three of its hidden units, the others of its output."""

    input_kernel: Float[Array, "features gate hidden"]
    recurrent_kernel: Float[Array, "output gate hidden"]
    bias: Float[Array, "gate hidden"]
    output_kernel: Float[Array, "hidden output"]
    output_bias: Float[Array, "output"]


class Jordan(Pointwise):
    """The network that recurs from its output to its hidden units only.

        h = tanh(x W + o R + b)
        o' = φ(h V + c),   y = o'

    It reads the pair `(x, o)` of an input and the output before it, and keeps no state. So over given outputs (teacher
    forcing) all steps are computed at once, and `Feedback` closes the loop. `output_activation`, φ, is by default the
    identity; what is fed back may so be a prediction, such as a softmax. The kernels of the hidden units hold one gate.

    M. I. Jordan, Serial order: a parallel distributed processing approach, 1986; I. Goodfellow et al., Deep learning,
    2016, figure 10.4.

    >>> from jaxseq import Feedback
    >>> cell = Jordan(feature_size=2, hidden_size=4, output_size=3)
    >>> params = cell.init(jax.random.key(0))
    >>> given = jnp.zeros((5, 3))
    >>> cell.unroll(params, (jnp.ones((5, 2)), given))[1].shape
    (5, 3)
    >>> state, ys = Feedback(cell).unroll(params, jnp.ones((5, 2)))
    >>> ys.shape
    (5, 3)
    """

    input_rank = (1, 1)
    input_names = ("x", "output")

    feature_size: int
    hidden_size: int
    output_size: int
    _: dataclasses.KW_ONLY
    activation: Activation = "tanh"
    output_activation: Activation = "identity"

    @property
    def input_size(self) -> tuple[int, int]:
        return self.feature_size, self.output_size

    def init(self, key: Array) -> JordanParams:
        errors.check_key(self, key)
        hidden_key, output_key = jax.random.split(key)
        hidden = init_gated(hidden_key, self.feature_size, 1, self.hidden_size, self.output_size)
        return JordanParams(
            *hidden,
            output_kernel=_lecun(output_key, (self.hidden_size, self.output_size)),
            output_bias=jnp.zeros(self.output_size),
        )

    def axes(self) -> Any:
        return JordanParams._make((*GATED_AXES, PartitionSpec("input", "output"), PartitionSpec("output")))

    def apply(
        self,
        params: JordanParams,
        x: tuple[Float[Array, "*batch features"], Float[Array, "*batch output"]],
        key: Array | None = None,
    ) -> Float[Array, "*batch output"]:
        errors.check_params(self, params)
        features, output = check_parts(self, x, self.input_size, params.bias.dtype)
        z = features @ params.input_kernel[:, 0] + output @ params.recurrent_kernel[:, 0]
        hidden = activation(self.activation)(z + jnp.broadcast_to(params.bias[0], z.shape))
        o = hidden @ params.output_kernel
        return activation(self.output_activation)(o + jnp.broadcast_to(params.output_bias, o.shape))
