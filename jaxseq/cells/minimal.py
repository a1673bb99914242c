"""Gated recurrent units with fewer gates, and the three that a search over architectures found."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.cells.gated import Gated, GatedParams
from jaxseq.cells.gru import GRUBase, GRUState, MinimalGRU
from jaxseq.core.activations import Activation, activation


class MGU(GRUBase):
    """Minimal gated unit: one gate that resets and updates.

        u, n = x W + b
        n' = tanh(n + (σ(u + h R_u) h) R_n)
        h' = σ(u + h R_u) n' + (1 - σ(u + h R_u)) h,   y = h'

    The paper calls the gate f, "forget"; where it is 1 the state is forgotten, so its bias starts at 0 here.

    G.-B. Zhou et al., Minimal gated unit for recurrent neural networks, International Journal of Automation and
    Computing 13, 2016.

    >>> import jax
    >>> cell = MGU(input_size=2, hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape
    (5, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("u", "n")
    keeps: ClassVar[tuple[str, ...]] = ("-u",)

    def step(self, params: GatedParams, state: GRUState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        hidden, kernel = state.hidden, params.recurrent_kernel
        u, n = self.split_gates(self.product(x, params.input_kernel, params.bias))
        gate = activation(self.gate_activation)(u + self.product(hidden, kernel[:, :1]))
        candidate = activation(self.activation)(n + self.product(gate * hidden, kernel[:, 1:]))
        hidden = gate * candidate + (1 - gate) * hidden
        return GRUState(hidden), hidden


class JANET(GRUBase, Gated):
    """Just another network: an LSTM with nothing but a forget gate.

        f, n = x W + h R + b
        h' = σ(f) h + (1 - σ(f - β)) tanh(n),   y = h'

    `shift` is β; with β > 0 it writes more than it forgets. The forget gate's bias starts at 1.

    J. van der Westhuizen and J. Lasenby, The unreasonable effectiveness of the forget gate, arXiv:1804.04849, 2018.

    >>> import jax
    >>> JANET(2, 3, shift=0.5).init(jax.random.key(0)).bias.tolist()
    [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """

    gates: ClassVar[tuple[str, ...]] = ("f", "n")

    _: dataclasses.KW_ONLY
    shift: float = 1.0

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        return params._replace(bias=params.bias.at[0].set(1))

    def update(self, params: GatedParams, state: GRUState, from_input: Array, from_recurrent: Array) -> GRUState:
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        f, n = self.split_gates(from_input + from_recurrent)
        return GRUState(sigma(f) * state.hidden + (1 - sigma(f - self.shift)) * tanh(n))


class LiGRU(MinimalGRU):
    """Light gated recurrent unit, for speech: no reset gate, and a rectifier for tanh.

        z, n = x W + h R + b
        h' = (1 - σ(z)) relu(n) + σ(z) h,   y = h'

    The paper normalises x W over the batch, which no causal step can do; that is left out, and so there is a bias.

    M. Ravanelli et al., Light gated recurrent units for speech recognition, IEEE TETCI 2, 2018.

    >>> import jax
    >>> cell = LiGRU(2, 3)
    >>> bool((cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))[1] >= 0).all())
    True
    """

    _: dataclasses.KW_ONLY
    activation: Activation = "relu"


class UGRNN(MinimalGRU):
    """Update gate recurrent network: the equations of `MinimalGRU`, whose gate starts almost open to the past.

        z, n = x W + h R + b
        h' = (1 - σ(z)) tanh(n) + σ(z) h,   y = h'

    The update gate's bias starts at 1, as the forget gate's of an LSTM.

    J. Collins et al., Capacity and trainability in recurrent neural networks, ICLR 2017.

    >>> import jax
    >>> UGRNN(2, 3).init(jax.random.key(0)).bias.tolist()
    [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        return params._replace(bias=params.bias.at[0].set(1))


class Mutant(GRUBase):
    """What MUT1, MUT2 and MUT3 share: a reset gate r, an update gate u, which takes in the new, and a candidate n."""

    gates: ClassVar[tuple[str, ...]] = ("r", "u", "n")
    keeps: ClassVar[tuple[str, ...]] = ("-u",)
    adds_input: ClassVar[bool] = True  # x as it is

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adds_input and self.input_size != self.hidden_size:
            raise ValueError(
                f"{type(self).__name__} adds its inputs to its units, so it needs input_size == hidden_size, got "
                f"{self.input_size} and {self.hidden_size}: put a Dense({self.input_size}, {self.hidden_size}) before."
            )


class MUT1(Mutant):
    """The first of three cells found by evolution.

        r = σ(x W_r + h R_r + b_r)
        u = σ(x W_u + b_u)
        n = tanh(tanh(x) + (r h) R_n + b_n)
        h' = u n + (1 - u) h,   y = h'

    The input is added as it is, so `input_size` is `hidden_size`. `input_kernel` holds r, u, `recurrent_kernel` r, n.

    R. Jozefowicz et al., An empirical exploration of recurrent network architectures, ICML 2015.

    >>> import jax
    >>> params = MUT1(3, 3).init(jax.random.key(0))
    >>> params.input_kernel.shape, params.recurrent_kernel.shape
    ((3, 2, 3), (3, 2, 3))
    """

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        return params._replace(input_kernel=params.input_kernel[:, :2], recurrent_kernel=params.recurrent_kernel[:, 1:])

    def step(self, params: GatedParams, state: GRUState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        hidden, kernel = state.hidden, params.recurrent_kernel
        r, u = self.split_gates(self.product(x, params.input_kernel, params.bias[:2]), 2)
        reset, update = sigma(r + self.product(hidden, kernel[:, :1])), sigma(u)
        bias = jnp.broadcast_to(params.bias[2], hidden.shape)
        candidate = tanh(tanh(x) + self.product(reset * hidden, kernel[:, 1:]) + bias)
        hidden = update * candidate + (1 - update) * hidden
        return GRUState(hidden), hidden


class MUT2(Mutant):
    """The second of three cells found by evolution.

        r = σ(x + h R_r + b_r)
        u = σ(x W_u + h R_u + b_u)
        n = tanh(x W_n + (r h) R_n + b_n)
        h' = u n + (1 - u) h,   y = h'

    The input is added as it is, so `input_size` is `hidden_size`. `input_kernel` holds u, n.

    R. Jozefowicz et al., An empirical exploration of recurrent network architectures, ICML 2015.

    >>> import jax
    >>> params = MUT2(3, 3).init(jax.random.key(0))
    >>> params.input_kernel.shape, params.recurrent_kernel.shape
    ((3, 2, 3), (3, 3, 3))
    """

    def init(self, key: Array) -> GatedParams:
        params = super().init(key)
        return params._replace(input_kernel=params.input_kernel[:, 1:])

    def step(self, params: GatedParams, state: GRUState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        hidden, kernel = state.hidden, params.recurrent_kernel
        u, n = self.split_gates(self.product(x, params.input_kernel, params.bias[1:]), 2)
        from_r, from_u = self.split_gates(self.product(hidden, kernel[:, :2]), 2)
        reset = sigma(x + from_r + jnp.broadcast_to(params.bias[0], hidden.shape))
        update = sigma(u + from_u)
        candidate = tanh(n + self.product(reset * hidden, kernel[:, 2:]))
        hidden = update * candidate + (1 - update) * hidden
        return GRUState(hidden), hidden


class MUT3(Mutant):
    """The third of three cells found by evolution: a GRU whose update gate sees tanh(h).

        r = σ(x W_r + h R_r + b_r)
        u = σ(x W_u + tanh(h) R_u + b_u)
        n = tanh(x W_n + (r h) R_n + b_n)
        h' = u n + (1 - u) h,   y = h'

    R. Jozefowicz et al., An empirical exploration of recurrent network architectures, ICML 2015.

    >>> import jax
    >>> MUT3(2, 3).init(jax.random.key(0)).input_kernel.shape
    (2, 3, 3)
    """

    adds_input: ClassVar[bool] = False

    def step(self, params: GatedParams, state: GRUState, x: Float[Array, "*batch input"], key: Any = None) -> Any:
        self.check(params, state, x)
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        hidden, kernel = state.hidden, params.recurrent_kernel
        r, u, n = self.split_gates(self.product(x, params.input_kernel, params.bias))
        reset = sigma(r + self.product(hidden, kernel[:, :1]))
        update = sigma(u + self.product(tanh(hidden), kernel[:, 1:2]))
        candidate = tanh(n + self.product(reset * hidden, kernel[:, 2:]))
        hidden = update * candidate + (1 - update) * hidden
        return GRUState(hidden), hidden
