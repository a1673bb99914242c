"""Long short-term memory and its published variants."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxseq.cells.gated import GATED_AXES, Gated, GatedParams, init_gated
from jaxseq.core.activations import Activation, activation
from jaxseq.core.sharding import out_sharding

_lecun = initializers.lecun_normal()


class LSTMState(NamedTuple):
    """The state of an LSTM: what it shows and what it keeps."""

    hidden: Float[Array, "*batch hidden"]
    cell: Float[Array, "*batch hidden"]


class LSTM(Gated):
    """Long short-term memory.

        i, f, g, o = x W + h R + b
        c' = σ(f) c + σ(i) tanh(g)
        h' = σ(o) tanh(c'),   y = h'

    The forget gate's bias starts at 1 (Jozefowicz et al. 2015). `gate_activation` stands for σ, `activation` for tanh.

    S. Hochreiter and J. Schmidhuber, Long short-term memory, Neural Computation 9, 1997; with the forget gate of
    F. A. Gers et al., Learning to forget, Neural Computation 12, 2000.

    >>> cell = LSTM(input_size=2, hidden_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((4, 5, 2)))
    >>> ys.shape, state.cell.shape
    ((4, 5, 3), (4, 3))
    """

    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o")

    _: dataclasses.KW_ONLY
    activation: Activation = "tanh"
    gate_activation: Activation = "sigmoid"

    def init(self, key: Array) -> Any:
        params = super().init(key)
        return params._replace(bias=params.bias.at[1].set(1))

    def initial_state(self, params: Any, batch_shape: tuple[int, ...] = ()) -> LSTMState:
        hidden = self.zeros(params, batch_shape, self.output_size)
        return LSTMState(hidden, cell=self.zeros(params, batch_shape))

    def update(self, params: Any, state: LSTMState, from_input: Array, from_recurrent: Array) -> LSTMState:
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        i, f, g, o = self.split_gates(from_input + from_recurrent)
        cell = sigma(f) * state.cell + sigma(i) * tanh(g)
        return LSTMState(hidden=sigma(o) * tanh(cell), cell=cell)


class PeepholeLSTMParams(NamedTuple):
    """The parameters of an LSTM whose gates i, f, o see the cell."""

    input_kernel: Float[Array, "input gate hidden"]
    recurrent_kernel: Float[Array, "recurrent gate hidden"]
    bias: Float[Array, "gate hidden"]
    peepholes: Float[Array, "3 hidden"]


class PeepholeLSTM(LSTM):
    """An LSTM whose gates see the memory cell, unit by unit.

        i, f, g, o = x W + h R + b
        c' = σ(f + p_f c) c + σ(i + p_i c) tanh(g)
        h' = σ(o + p_o c') tanh(c'),   y = h'

    `peepholes` holds p_i, p_f, p_o, which start at 0. With `output_gate_sees="previous"` the output gate is
    σ(o + p_o c), as some textbooks write it: all gates see the memory of the step before.

    F. A. Gers and J. Schmidhuber, Recurrent nets that time and count, IJCNN 2000.

    >>> cell = PeepholeLSTM(2, 3, output_gate_sees="previous")
    >>> cell.init(jax.random.key(0)).peepholes.shape
    (3, 3)
    """

    _: dataclasses.KW_ONLY
    output_gate_sees: Literal["new", "previous"] = "new"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_gate_sees not in ("new", "previous"):
            raise ValueError(f'output_gate_sees is "new" or "previous", got {self.output_gate_sees!r}.')

    def init(self, key: Array) -> PeepholeLSTMParams:
        return PeepholeLSTMParams(*super().init(key), peepholes=jnp.zeros((3, self.hidden_size)))

    def axes(self) -> Any:
        return PeepholeLSTMParams._make((*GATED_AXES, PartitionSpec("gate", "hidden")))

    def update(self, params: Any, state: LSTMState, from_input: Array, from_recurrent: Array) -> LSTMState:
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        p_i, p_f, p_o = (jnp.broadcast_to(weights, state.cell.shape) for weights in params.peepholes)
        i, f, g, o = self.split_gates(from_input + from_recurrent)
        cell = sigma(f + p_f * state.cell) * state.cell + sigma(i + p_i * state.cell) * tanh(g)
        seen = cell if self.output_gate_sees == "new" else state.cell
        return LSTMState(hidden=sigma(o + p_o * seen) * tanh(cell), cell=cell)


class CoupledLSTM(LSTM):
    """An LSTM that writes where it forgets: the input gate is 1 - the forget gate (CIFG).

        f, g, o = x W + h R + b
        c' = σ(f) c + (1 - σ(f)) tanh(g)
        h' = σ(o) tanh(c'),   y = h'

    K. Greff et al., LSTM: a search space odyssey, IEEE TNNLS 28, 2017.

    >>> CoupledLSTM(2, 3).init(jax.random.key(0)).bias.shape
    (3, 3)
    """

    gates: ClassVar[tuple[str, ...]] = ("f", "g", "o")

    def init(self, key: Array) -> GatedParams:
        params = Gated.init(self, key)
        return params._replace(bias=params.bias.at[0].set(1))

    def update(self, params: GatedParams, state: LSTMState, from_input: Array, from_recurrent: Array) -> LSTMState:
        sigma, tanh = activation(self.gate_activation), activation(self.activation)
        f, g, o = self.split_gates(from_input + from_recurrent)
        cell = sigma(f) * state.cell + (1 - sigma(f)) * tanh(g)
        return LSTMState(hidden=sigma(o) * tanh(cell), cell=cell)


class ProjectedLSTMParams(NamedTuple):
    """The parameters of an LSTM whose hidden state is projected."""

    input_kernel: Float[Array, "input gate hidden"]
    recurrent_kernel: Float[Array, "recurrent gate hidden"]
    bias: Float[Array, "gate hidden"]
    projection_kernel: Float[Array, "hidden recurrent"]


class ProjectedLSTM(LSTM):
    """An LSTM that feeds back, and gives out, a projection of its hidden units.

        i, f, g, o = x W + h R + b
        c' = σ(f) c + σ(i) tanh(g)
        h' = (σ(o) tanh(c')) P,   y = h'

    H. Sak et al., Long short-term memory recurrent neural network architectures, Interspeech 2014.

    >>> cell = ProjectedLSTM(2, 8, projection_size=3)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 2)))
    >>> ys.shape, state.cell.shape
    ((5, 3), (8,))
    """

    projection_size: int

    @property
    def output_size(self) -> int:
        return self.projection_size

    def init(self, key: Array) -> ProjectedLSTMParams:
        key, projection_key = jax.random.split(key)
        params = init_gated(key, self.input_size, self.gate_count, self.hidden_size, self.projection_size)
        kernel = _lecun(projection_key, (self.hidden_size, self.projection_size))
        return ProjectedLSTMParams(*params._replace(bias=params.bias.at[1].set(1)), projection_kernel=kernel)

    def axes(self) -> Any:
        return ProjectedLSTMParams._make((*GATED_AXES, PartitionSpec("hidden", "recurrent")))

    def update(self, params: Any, state: LSTMState, from_input: Array, from_recurrent: Array) -> LSTMState:
        hidden, cell = super().update(params, state, from_input, from_recurrent)
        kernel = params.projection_kernel
        spec = PartitionSpec(*jax.typeof(hidden).sharding.spec[:-1], jax.typeof(kernel).sharding.spec[-1])
        return LSTMState(jnp.matmul(hidden, kernel, out_sharding=out_sharding(spec, hidden, kernel)), cell)
