"""Recurrences that are steps of a differential equation: antisymmetric networks and coupled oscillators."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.cells.elman import Elman, ElmanState
from jaxseq.cells.gated import GatedParams, Recurrent, init_gated
from jaxseq.core.activations import Activation, activation


class AntisymmetricRNN(Elman):
    """Antisymmetric network: a step of an equation that neither forgets nor explodes.

        h' = h + ε tanh(x W + h (R - Rᵀ - γ I) + b),   y = h'

    `time_step` is ε. `damping`, γ, makes up for what Euler's method adds to the antisymmetric part.

    B. Chang et al., AntisymmetricRNN: a dynamical system view on recurrent neural networks, ICLR 2019.

    >>> import jax
    >>> cell = AntisymmetricRNN(input_size=2, hidden_size=3)
    >>> cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1].shape
    (5, 3)
    """

    _: dataclasses.KW_ONLY
    time_step: float = 0.01
    damping: float = 0.01

    def products(self, params: Any, hidden: Array, x: Array) -> tuple[Array, Array]:
        kernel = params.recurrent_kernel
        kernel = kernel - kernel.transpose(2, 1, 0) - self.damping * jnp.eye(len(kernel), dtype=kernel.dtype)[:, None]
        return self.product(x, params.input_kernel, params.bias), self.product(hidden, kernel)

    def update(self, params: GatedParams, state: ElmanState, from_input: Array, from_recurrent: Array) -> ElmanState:
        return ElmanState(state.hidden + self.time_step * activation(self.activation)(from_input + from_recurrent))


class GatedAntisymmetricRNN(AntisymmetricRNN):
    """Antisymmetric network with a gate for the speed of each unit, which sees the same recurrent product.

        z, n = x W + b;   u = h (R - Rᵀ - γ I)
        h' = h + ε σ(z + u) tanh(n + u),   y = h'

    `recurrent_kernel` holds the one R.

    B. Chang et al., AntisymmetricRNN: a dynamical system view on recurrent neural networks, ICLR 2019.

    >>> import jax
    >>> params = GatedAntisymmetricRNN(2, 3).init(jax.random.key(0))
    >>> params.input_kernel.shape, params.recurrent_kernel.shape
    ((2, 2, 3), (3, 1, 3))
    """

    gates: ClassVar[tuple[str, ...]] = ("z", "n")

    _: dataclasses.KW_ONLY
    gate_activation: Activation = "sigmoid"

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        return params._replace(recurrent_kernel=params.recurrent_kernel[:, :1])

    def update(self, params: GatedParams, state: ElmanState, from_input: Array, from_recurrent: Array) -> ElmanState:
        z, n = self.split_gates(from_input)
        speed = activation(self.gate_activation)(z + from_recurrent)
        return ElmanState(state.hidden + self.time_step * speed * activation(self.activation)(n + from_recurrent))


class CoRNNState(NamedTuple):
    """The state of coupled oscillators: where they are and how fast they move."""

    hidden: Float[Array, "*batch hidden"]
    velocity: Float[Array, "*batch hidden"]


class CoRNN(Recurrent):
    """Coupled oscillatory network: driven, damped oscillators.

        v' = v + Δt (tanh(x W + [h, v] R + b) - γ h - ε v)
        h' = h + Δt v',   y = h'

    `time_step` is Δt, `frequency` γ, `damping` ε; they start as the paper has them for sequential MNIST.
    `recurrent_kernel` is [2 hidden, 1, hidden].

    T. K. Rusch and S. Mishra, Coupled oscillatory recurrent neural network (coRNN): an accurate and (gradient) stable
    architecture for learning long time dependencies, ICLR 2021.

    >>> import jax
    >>> cell = CoRNN(input_size=2, hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape, state.velocity.shape
    ((5, 3), (3,))
    """

    gates: ClassVar[tuple[str, ...]] = ("v",)

    _: dataclasses.KW_ONLY
    time_step: float = 0.042
    frequency: float = 2.7
    damping: float = 4.7
    activation: Activation = "tanh"

    def init(self, key: Array) -> GatedParams:
        return init_gated(key, self.input_size, self.gate_count, self.hidden_size, 2 * self.hidden_size)

    def initial_state(self, params: GatedParams, batch_shape: tuple[int, ...] = ()) -> CoRNNState:
        return CoRNNState(self.zeros(params, batch_shape), self.zeros(params, batch_shape))

    def step(self, params: GatedParams, state: CoRNNState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        hidden, velocity = state
        recurrent = self.product(jnp.concatenate(state, axis=-1), params.recurrent_kernel)
        drive = activation(self.activation)(self.product(x, params.input_kernel, params.bias) + recurrent)
        velocity = velocity + self.time_step * (drive - self.frequency * hidden - self.damping * velocity)
        hidden = hidden + self.time_step * velocity
        return CoRNNState(hidden, velocity), hidden
