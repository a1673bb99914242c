"""The simple recurrent network."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Float

from jaxseq.cells.gated import Gated
from jaxseq.core.activations import Activation, activation


class ElmanState(NamedTuple):
    """The state of an Elman cell."""

    hidden: Float[Array, "*batch hidden"]


class Elman(Gated):
    """The simple recurrent network.

        h' = tanh(x W + h R + b),   y = h'

    The kernels hold one gate: `input_kernel [input, 1, hidden]`, `recurrent_kernel [hidden, 1, hidden]`. `activation`
    is a name such as "relu" or a function. The textbook's output o = h' V + c is a `Dense` after it.

    J. L. Elman, Finding structure in time, Cognitive Science 14, 1990.

    >>> import jax, jax.numpy as jnp
    >>> cell = Elman(input_size=2, hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape, state.hidden.shape
    ((5, 3), (3,))
    """

    gates: ClassVar[tuple[str, ...]] = ("h",)

    _: dataclasses.KW_ONLY
    activation: Activation = "tanh"

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> ElmanState:
        return ElmanState(self.zeros(params, batch_shape))

    def update(self, params: Any, state: ElmanState, from_input: Array, from_recurrent: Array) -> ElmanState:
        return ElmanState(activation(self.activation)(from_input + from_recurrent))
