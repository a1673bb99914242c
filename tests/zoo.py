"""Every cell and layer once, small: each line is put under all the laws of test_laws.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxseq as js


class Line(NamedTuple):
    """A layer under the laws.

    `noisy` if a key changes what it does, `frozen` if its params get no gradient, `memory` the size of a vector to
    attach, `pairs` if it joins pairs of steps: it takes no resets, and a gap is not as if the step were not there.
    """

    layer: js.SequenceLayer
    noisy: bool = False
    frozen: bool = False
    memory: int | None = None
    pairs: bool = False


class CounterState(NamedTuple):
    total: jax.Array
    count: jax.Array


class RunningMean(js.Cell):
    """A user's own cell: trees in and out, an integer in its state, no declared sizes."""

    input_rank = {"token": 0, "vector": 1}

    def init(self, key):
        return jax.random.normal(key, (2,))

    def initial_state(self, params, batch_shape=()):
        return CounterState(jnp.zeros((*batch_shape, 2), params.dtype), jnp.zeros(batch_shape, jnp.int32))

    def step(self, params, state, x, key=None):
        total = state.total + params * x["vector"] + jax.nn.one_hot(x["token"], 2, dtype=params.dtype)
        count = state.count + 1
        mean = total / jnp.expand_dims(count, -1).astype(total.dtype)
        return CounterState(total, count), {"mean": mean, "count": count}


class Blur(js.Cell):
    """A user's own cell over images `[*batch, height, width, channels]`, with a convolution in its recurrence."""

    input_rank = 3

    def init(self, key):
        return jax.random.normal(key, (3, 3, 1, 1)) / 3

    def initial_state(self, params, batch_shape=()):
        return jnp.zeros((*batch_shape, 4, 3, 1), params.dtype)

    def step(self, params, state, x, key=None):
        flat = state.reshape(-1, *state.shape[-3:])
        moved = jax.lax.conv_general_dilated(flat, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        state = jnp.tanh(moved.reshape(state.shape) + x)
        return state, state


class Orbit(js.Cell):
    """A user's own cell without inputs."""

    input_rank = None

    def init(self, key):
        return jax.random.normal(key, (3, 3)) / 2

    def initial_state(self, params, batch_shape=()):
        return jnp.ones((*batch_shape, 3), params.dtype)

    def step(self, params, state, x, key=None):
        state = jnp.tanh(state @ params)
        return state, state[..., :2]


class Noisy(js.Cell):
    """A user's own cell that draws noise at each step, and once for a sequence."""

    def init(self, key):
        return jnp.ones(2)

    def draw(self, params, key):
        return params + jax.random.normal(key, params.shape, params.dtype)

    def initial_state(self, params, batch_shape=()):
        return jnp.zeros((*batch_shape, 2), params.dtype)

    def step(self, params, state, x, key=None):
        state = 0.5 * state + params * x
        if key is not None:
            state = state + jax.random.normal(key, state.shape, state.dtype)
        return state, state


class Backward(js.SequenceLayer):
    """A layer that is no cell: a cell that reads from the end."""

    cell: js.Cell

    def init(self, key):
        return self.cell.init(key)

    def initial_state(self, params, batch_shape=()):
        return self.cell.initial_state(params, batch_shape)

    def _unroll(self, params, xs, state, run):
        return self.cell._unroll(params, xs, state, run._replace(reverse=not run.reverse))


ZOO: dict[str, Line] = {
    "elman": Line(js.Elman(2, 3)),
    "elman_softplus": Line(js.Elman(2, 3, activation="softplus")),
    "deep_transition": Line(js.DeepTransition(2, 3, 3)),
    "deep_transition_shortcut": Line(js.DeepTransition(2, 3, shortcut=True)),
    "lstm": Line(js.LSTM(2, 3)),
    "lstm_axis": Line(js.LSTM(2, 3, gate_layout="axis")),
    "lstm_activations": Line(js.LSTM(2, 3, activation="softsign", gate_activation="saturated_linear")),
    "peephole_lstm": Line(js.PeepholeLSTM(2, 3)),
    "peephole_lstm_previous": Line(js.PeepholeLSTM(2, 3, output_gate_sees="previous")),
    "coupled_lstm": Line(js.CoupledLSTM(2, 3)),
    "projected_lstm": Line(js.ProjectedLSTM(2, 4, 3)),
    "layer_norm_lstm": Line(js.LayerNormLSTM(2, 3)),
    "gru": Line(js.GRU(2, 3)),
    "gru_v1": Line(js.GRUv1(2, 3)),
    "gru_v1_axis": Line(js.GRUv1(2, 3, gate_layout="axis")),
    "minimal_gru": Line(js.MinimalGRU(2, 3)),
    "jordan": Line(js.Jordan(2, 4, 3)),
    "jordan_softmax": Line(js.Jordan(2, 4, 3, activation="sigmoid", output_activation="softmax")),
    "mgu": Line(js.MGU(2, 3)),
    "janet": Line(js.JANET(2, 3)),
    "ligru": Line(js.LiGRU(2, 3)),
    "ugrnn": Line(js.UGRNN(2, 3)),
    "mut1": Line(js.MUT1(3, 3)),
    "mut2": Line(js.MUT2(3, 3)),
    "mut2_axis": Line(js.MUT2(3, 3, gate_layout="axis")),
    "mut3": Line(js.MUT3(2, 3)),
    "ind_rnn": Line(js.IndRNN(2, 3)),
    "clockwork_rnn": Line(js.ClockworkRNN(2, 6, periods=(1, 2, 3))),
    "slstm": Line(js.SLSTM(2, 4, heads=2)),
    "slstm_axis": Line(js.SLSTM(2, 4, heads=2, gate_layout="axis")),
    "mlstm": Line(js.MLSTM(2, 4, heads=2, chunk_size=4)),
    "antisymmetric_rnn": Line(js.AntisymmetricRNN(2, 3, time_step=0.5)),
    "gated_antisymmetric_rnn": Line(js.GatedAntisymmetricRNN(2, 3, time_step=0.5)),
    "co_rnn": Line(js.CoRNN(2, 3, time_step=0.2)),
    "recurrent_highway": Line(js.RecurrentHighway(2, 3, depth=3)),
    "recurrent_highway_axis": Line(js.RecurrentHighway(2, 3, depth=3, gate_layout="axis")),
    "conv_lstm": Line(js.ConvLSTM((3, 2, 1), 2)),
    "conv_lstm_1d": Line(js.ConvLSTM((3, 2), 2, kernel_size=2)),
    "conv_gru": Line(js.ConvGRU((3, 2, 1), 2, kernel_size=(1, 3))),
    "conv_gru_3d": Line(js.ConvGRU((2, 3, 2, 1), 1, kernel_size=(2, 3, 1))),
    "conv_stack": Line(js.Feedback(js.Stack((js.ConvLSTM((3, 1), 2), js.ConvGRU((3, 2), 1, kernel_size=(3,)))))),
    "min_gru": Line(js.MinGRU(2, 3)),
    "min_lstm": Line(js.MinLSTM(2, 3)),
    "rg_lru": Line(js.RGLRU(2)),
    "lru": Line(js.LRU(2, 3, r_min=0.4, r_max=0.9)),
    "s5": Line(js.S5(2, 4, min_step=0.1, max_step=1.0)),
    "transformer": Line(js.TransformerBlock(4, 2, window=3, hidden_size=5)),
    "transformer_wide": Line(js.Stack((js.Embed(4, 4), js.TransformerBlock(4, 1, window=8), js.Dense(4, 4)))),
    "gated_linear_attention": Line(js.GatedLinearAttention(2, 2, 3, heads=2, rank=2, temperature=2.0, chunk_size=4)),
    "gated_delta_net": Line(js.GatedDeltaNet(2, 2, 3, heads=2, chunk_size=4)),
    "hmm": Line(js.HMM(js.CategoricalEmission(3, 4))),
    "hmm_gaussian": Line(js.HMM(js.GaussianEmission(3, 2))),
    "hmm_full_gaussian": Line(js.HMM(js.FullGaussianEmission(3, 2))),
    "hmm_varying": Line(js.VaryingHMM(js.GaussianEmission(3, 2))),
    "hmm_tokens": Line(js.TokenHMM(js.CategoricalEmission(3, 4))),
    "one_hot": Line(js.OneHot(4)),
    "embed": Line(js.Embed(4, 3)),
    "dense": Line(js.Dense(2, 3)),
    "pointwise_images": Line(
        js.Stack(
            (js.Dropout(0.5), js.Residual(js.Stack((js.FeatureNorm(2), js.Dense(2, 3), js.ConvGRU((2, 3, 3), 2)))))
        ),
        noisy=True,
    ),
    "feature_norm": Line(js.Residual(js.Stack((js.FeatureNorm(3), js.MinGRU(3, 3))))),
    "feature_norm_rms": Line(js.FeatureNorm(3, kind="rms")),
    "concatenate": Line(js.Concatenate((2, 3))),
    "map": Line(js.Map("tanh")),
    "dropout": Line(js.Dropout(0.5), noisy=True),
    "stack": Line(js.Stack((js.Embed(4, 2), js.LSTM(2, 3), js.Dropout(0.5), js.GRU(3, 3), js.Dense(3, 4))), noisy=True),
    "sequential": Line(js.Sequential((js.LSTM(2, 3), js.Dropout(0.5), Backward(js.GRU(3, 3)))), noisy=True),
    "parallel": Line(
        js.Stack(
            (
                js.Parallel((js.Stack((js.Embed(4, 2), js.Dropout(0.5))), js.Map("identity", 0))),
                js.Hierarchical((js.LSTM(2, 3), js.GRU(3, 2))),
            )
        ),
        noisy=True,
    ),
    "parallel_layer": Line(js.Parallel((Backward(js.Elman(2, 3)), js.Dense(2, 2)))),
    "residual": Line(js.Residual(js.GRU(2, 2))),
    "residual_layer": Line(
        js.Residual(js.Sequential((js.FeatureNorm(2), js.Bidirectional(js.LSTM(2, 1), js.GRU(2, 1)), js.Dropout(0.5)))),
        noisy=True,
    ),
    "highway_layer": Line(js.Highway(js.WeightNorm(js.Bidirectional(js.Elman(2, 2), js.GRU(2, 2), merge="mean")))),
    "frozen_layer": Line(
        js.Frozen(js.Skip(js.MixedPrecision(js.Bidirectional(js.SpectralBound(js.GRU(2, 3)), js.LSTM(2, 3))))),
        frozen=True,
    ),
    "weight_drop_layer": Line(
        js.Sequential((js.WeightDrop(js.Bidirectional(js.Elman(2, 1), js.LSTM(2, 1)), 0.5), Backward(js.GRU(2, 2)))),
        noisy=True,
    ),
    "conditioned_layer": Line(js.Conditioned(js.Bidirectional(js.Elman(2 + 3, 2), js.GRU(2 + 3, 2)), 3), memory=3),
    "bidirectional": Line(
        js.Bidirectional(js.Stack((js.Dropout(0.5), js.GRU(2, 3))), js.Elman(2, 3), merge="product"), noisy=True
    ),
    "bidirectional_stack": Line(
        js.Sequential((js.Bidirectional(js.LSTM(2, 3), js.GRU(2, 2)), js.Bidirectional(js.Elman(5, 3), js.Dense(5, 3))))
    ),
    "bidirectional_nested": Line(
        js.Bidirectional(Backward(js.Elman(2, 3)), js.Bidirectional(js.Elman(2, 3), js.GRU(2, 3)), merge="both")
    ),
    "variational_dropout": Line(js.Dropout(0.5, variational=True), noisy=True),
    "recurrent_dropout": Line(js.RecurrentDropout(js.LayerNorm(js.GRU(2, 3)), 0.5), noisy=True),
    "weight_drop": Line(js.WeightDrop(js.Stack((js.Elman(2, 3), js.LSTM(3, 2))), 0.5), noisy=True),
    "zoneout": Line(js.Zoneout(js.LSTM(2, 3), (0.1, 0.5)), noisy=True),
    "zoneout_inside": Line(js.Zoneout(js.WeightDrop(js.RMSNorm(js.GRU(2, 3)), 0.5), 0.5), noisy=True),
    "phased_lstm": Line(js.Phased(js.LSTM(2, 3), max_period=5)),
    "layer_norm": Line(js.LayerNorm(js.ProjectedLSTM(2, 4, 3))),
    "layer_norm_axis": Line(js.LayerNorm(js.LSTM(2, 3, gate_layout="axis"))),
    "rms_norm": Line(js.RMSNorm(js.Elman(2, 3))),
    "weight_norm": Line(js.WeightNorm(js.Stack((js.GRU(2, 3), js.Dense(3, 2))))),
    "spectral_bound": Line(js.SpectralBound(js.RecurrentDropout(js.LSTM(2, 3), 0.5), bound=2.0), noisy=True),
    "learned_state": Line(js.LearnedState(js.Stack((js.LSTM(2, 3), js.Elman(3, 2))))),
    "random_state": Line(js.RandomState(js.LSTM(2, 3)), noisy=True),
    "clip": Line(js.Clip(js.LSTM(2, 3), (None, 0.5))),
    "frozen": Line(js.Frozen(js.GRU(2, 3)), frozen=True),
    "mixed_precision": Line(js.MixedPrecision(js.LSTM(2, 3))),
    "skip": Line(js.Stack((js.Skip(js.Elman(2, 3)), js.Skip(js.GRU(5, 2))))),
    "highway": Line(js.Highway(js.LSTM(2, 2))),
    "pyramid": Line(js.Pyramid((js.Elman(2, 3), js.Stack((js.Dropout(0.5), js.GRU(6, 2))))), noisy=True, pairs=True),
    "elman_2d": Line(js.Elman2D((3, 2), 2, activation="softplus")),
    "lstm_2d": Line(js.LSTM2D((2, 1), 2)),
    "grid": Line(js.Grid((*[js.LSTM2D((3, 1), 1)] * 3, js.Elman2D((3, 1), 2)))),
    "renet": Line(
        js.ReNet(
            (js.Bidirectional(js.GRU(1, 2), js.Elman(1, 2), "product"), js.Bidirectional(js.GRU(2, 2), js.GRU(2, 1)))
        )
    ),
    "remat": Line(js.Remat(js.Stack((js.LSTM(2, 3), js.Dropout(0.5))), every=4), noisy=True),
    "remat_root": Line(js.Remat(js.Elman(2, 3))),
    "plain": Line(js.Plain(js.GRU(2, 3))),
    "states": Line(js.States(js.LSTM(2, 3))),
    "feedback": Line(js.Feedback(js.Stack((js.Elman(2, 3), js.Dense(3, 2))))),
    "feedback_pair": Line(js.Feedback(js.Jordan(2, 4, 3))),
    "feedback_concatenated": Line(js.Feedback(js.Stack((js.Concatenate((2, 3)), js.Elman(5, 4), js.Dense(4, 3))))),
    "leaky": Line(js.Leaky(js.LSTM(2, 3), (0.9, 0.5, 0.1))),
    "leaky_learned": Line(js.Leaky(js.GRU(2, 3), 0.3, learned=True)),
    "delay": Line(js.Delay(js.LSTM(2, 3), 2)),
    "reservoir": Line(
        js.Reservoir(2, 4, leak=0.6, input_scale=(0.5, 2.0), bias_scale=0.3, density=0.5, noise=0.1), noisy=True
    ),
    "reservoir_readout": Line(
        js.Feedback(js.Stack((js.Concatenate((2, 2)), js.Skip(js.Reservoir(4, 3)), js.Dense(7, 2))))
    ),
    "time_skip": Line(js.TimeSkip(js.Elman(5, 3), 2)),
    "delayed_elman": Line(js.DelayedElman(2, 4, (1, 3))),
    "moving_average": Line(js.MovingAverage(2, 3)),
    "moving_average_long": Line(js.MovingAverage(2, 7)),
    "hierarchical": Line(
        js.Hierarchical((js.Stack((js.LSTM(2, 3), js.Dropout(0.5))), js.GRU(3, 2), js.Elman(2, 2))), noisy=True
    ),
    "conditioned": Line(js.Conditioned(js.LSTM(2 + 3, 4), 3), memory=3),
    "conditioned_add": Line(js.Conditioned(js.Elman(2, 4), 3, input="add"), memory=3),
    "conditioned_state": Line(
        js.Conditioned(js.Stack((js.Embed(4, 2), js.LSTM(2, 3))), 3, input=None, state=True), memory=3
    ),
    "conditioned_both": Line(
        js.Feedback(js.Conditioned(js.Stack((js.GRU(5, 3), js.Dense(3, 2))), 3, state=True)), memory=3
    ),
    "markov_chain": Line(js.MarkovChain(3, (3, 6, 7))),
    "ntm": Line(js.NTM(js.LSTM(2 + 2 * 3, 4), 5, 3, read_heads=2)),
    "ntm_noisy": Line(
        js.NTM(js.Stack((js.WeightDrop(js.GRU(2 + 3, 4), 0.5), js.Dropout(0.5))), 4, 3, write_heads=2, shift=0),
        noisy=True,
    ),
    "dnc": Line(js.DNC(js.Conditioned(js.LSTM(2 + 2 * 3 + 3, 4), 3), 5, 3, read_heads=2), memory=3),
    "stack_rnn": Line(js.StackRNN(js.Elman(2 + 2 * 2, 4), 3, stacks=2, depth=2)),
    "own_trees": Line(RunningMean()),
    "own_images": Line(Blur()),
    "own_without_inputs": Line(Orbit()),
    "own_noisy": Line(Noisy(), noisy=True),
    "own_layer": Line(Backward(js.Elman(2, 3))),
}


def inputs(layer: js.SequenceLayer, random: np.random.Generator, leading: tuple[int, ...]) -> Any:
    """Random inputs `[*leading, ...]` of a layer: tokens below 4, else arrays of the shapes of its `zero_input`.

    A layer that does not tell them gets vectors of 2 features, and images of 4 x 3 x 1.
    """
    try:
        zero = jax.eval_shape(lambda key: layer.zero_input(layer.init(key)), jax.random.key(0))
        shapes = jax.tree.map(jnp.shape, zero)
    except TypeError:
        shapes = jax.tree.map({0: (), 1: (2,), 2: (3, 1), 3: (4, 3, 1)}.get, layer.input_rank)

    def draw(rank, shape):
        return random.integers(0, 4, leading) if rank == 0 else random.normal(size=(*leading, *shape))

    return jax.tree.map(draw, layer.input_rank, shapes)
