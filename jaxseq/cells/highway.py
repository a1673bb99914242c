"""The recurrent highway network."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from jaxseq.cells.gated import GatedParams
from jaxseq.cells.gru import GRUBase, GRUState
from jaxseq.core.activations import activation


class RecurrentHighway(GRUBase):
    """Recurrent highway network: `depth` highway layers from one step to the next, the first of which sees the input.

        s_0 = h
        n_l = tanh([l = 1] x W_n + s_{l-1} R_{n,l} + b_{n,l})
        t_l = σ([l = 1] x W_t + s_{l-1} R_{t,l} + b_{t,l})
        s_l = t_l n_l + (1 - t_l) s_{l-1},   l = 1 ... depth
        h' = s_depth,   y = h'

    The carry gate is coupled, 1 - t. `input_kernel` holds n, t; `recurrent_kernel` and `bias` hold those of all layers,
    n_1, t_1, n_2, t_2, ... The biases of t start at -2, so that a layer carries at first.

    J. G. Zilly et al., Recurrent highway networks, ICML 2017.

    >>> import jax, jax.numpy as jnp
    >>> cell = RecurrentHighway(input_size=2, hidden_size=3, depth=4)
    >>> params = cell.init(jax.random.key(0))
    >>> params.input_kernel.shape, params.recurrent_kernel.shape
    ((2, 2, 3), (3, 8, 3))
    >>> cell.unroll(params, jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    _: dataclasses.KW_ONLY
    depth: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"RecurrentHighway needs depth >= 1, got {self.depth}.")

    @property
    def gates(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The names of all layers' gates."""
        return tuple(f"{gate}{layer}" for layer in range(1, self.depth + 1) for gate in "nt")

    @property
    def keeps(self) -> tuple[str, ...]:
        """The names of the gates that let in."""
        return tuple(f"-t{layer}" for layer in range(1, self.depth + 1))

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        return params._replace(input_kernel=params.input_kernel[:, :2], bias=params.bias.at[1::2].set(-2))

    def step(self, params: GatedParams, state: GRUState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        hidden = state.hidden
        from_input = self.product(x, params.input_kernel)
        for layer in range(self.depth):
            own = slice(2 * layer, 2 * layer + 2)
            z = self.product(hidden, params.recurrent_kernel[:, own], params.bias[own])
            n, t = self.split_gates(z if layer else z + from_input, 2)
            transform = activation(self.gate_activation)(t)
            hidden = transform * activation(self.activation)(n) + (1 - transform) * hidden
        return GRUState(hidden), hidden
