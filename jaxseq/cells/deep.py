"""Networks that are deep between one step and the next."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float

from jaxseq.cells.elman import ElmanState
from jaxseq.cells.gated import GATED_AXES, GatedParams, Recurrent, init_gated
from jaxseq.core import errors
from jaxseq.core.activations import Activation, activation


class DeepTransition(Recurrent):
    """A recurrent network whose transition from one hidden state to the next is a network of `depth` layers.

        z_1 = tanh(x W + h R_1 + b_1)
        z_l = tanh(z_{l-1} R_l + b_l)                    l = 2, ..., depth
        h'  = z_depth,   y = h'

    With `shortcut` the last layer also reads the state by a product of its own, z_depth = tanh(... + h S), so that
    a gradient passes each step by one layer, not by all. The gates of the recurrent kernel are R_1, R_2, ..., and S.

    The other deep networks of the paper are stacks: deep input-to-hidden `Stack((Dense(2, 8), Map("tanh"), Elman(8,
    3)))`, deep output `Stack((Elman(2, 3), Dense(3, 8), Map("tanh"), Dense(8, 2)))`, and stacked hidden states
    `Stack((Elman(2, 3), Elman(3, 3)))`.

    R. Pascanu et al., How to construct deep recurrent neural networks, ICLR 2014.

    >>> import jax, jax.numpy as jnp
    >>> cell = DeepTransition(input_size=2, hidden_size=3, depth=2)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape
    (5, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("h",)

    depth: int = 2
    _: dataclasses.KW_ONLY
    shortcut: bool = False
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1 + self.shortcut:
            raise ValueError(f"DeepTransition needs depth >= {1 + self.shortcut}, got {self.depth}.")

    def init(self, key: Array) -> GatedParams:
        errors.check_key(self, key)
        params = init_gated(key, self.input_size, self.depth + self.shortcut, self.hidden_size)
        return params._replace(input_kernel=params.input_kernel[:, :1], bias=params.bias[: self.depth])

    def axes(self) -> Any:
        return GATED_AXES

    def initial_state(self, params: GatedParams, batch_shape: tuple[int, ...] = ()) -> ElmanState:
        return ElmanState(self.zeros(params, batch_shape))

    def step(self, params: GatedParams, state: ElmanState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        kernels, tanh = params.recurrent_kernel, activation(self.activation)
        total = self.product(x, params.input_kernel) + self.product(state.hidden, kernels[:, :1], params.bias[:1])
        for layer in range(1, self.depth):
            total = self.product(tanh(total), kernels[:, layer : layer + 1], params.bias[layer : layer + 1])
        if self.shortcut:
            total = total + self.product(state.hidden, kernels[:, -1:])
        hidden = tanh(total)
        return ElmanState(hidden), hidden
