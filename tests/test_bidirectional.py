"""Reading from both ends: against torch and flax, and packed sequences against the same ones apart."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests.cells.test_flax_and_haiku import linen
from tests.cells.test_torch import gated
from tests.numbers import close, random_params
from tests.peers import peer

BATCH, TIME, INPUT, HIDDEN = 3, 6, 4, 5
RNG = np.random.default_rng(0)


def of_torch(lengths, weigh):
    """Random weights and inputs of a two-layer bidirectional LSTM, and torch's outputs, states and gradients."""
    torch = peer("torch")
    torch.manual_seed(0)
    module = torch.nn.LSTM(INPUT, HIDDEN, 2, batch_first=True, bidirectional=True)
    weights = {name: torch.randn_like(weight).requires_grad_() for name, weight in module.named_parameters()}
    xs = torch.randn(BATCH, TIME, INPUT, requires_grad=True)
    rnn = torch.nn.utils.rnn
    packed = rnn.pack_padded_sequence(xs, lengths, batch_first=True, enforce_sorted=False)
    ys, states = torch.func.functional_call(module, weights, (packed,))
    ys, _ = rnn.pad_packed_sequence(ys, batch_first=True)
    loss = (ys * torch.tensor(weigh)).sum() + states[1].sum()
    gradients = torch.autograd.grad(loss, [*weights.values(), xs])
    gradients = dict(zip(weights, gradients, strict=False)), gradients[-1]
    return jax.tree.map(lambda leaf: leaf.detach().numpy(), ((weights, xs), (ys, states), gradients))


@pytest.mark.parametrize("lengths", [[TIME] * BATCH, [4, 6, 1]], ids=["full", "ragged"])
def test_a_stack_equals_torch(lengths):
    weigh = RNG.normal(size=(BATCH, TIME, 2 * HIDDEN)).astype(np.float32)
    (weights, xs), values, gradients = of_torch(lengths, weigh)
    sizes = (INPUT, 2 * HIDDEN)
    layer = js.Sequential([js.Bidirectional(js.LSTM(size, HIDDEN), js.LSTM(size, HIDDEN)) for size in sizes])
    mask = js.length_mask(jnp.array(lengths), TIME)

    def reader(weights, suffix):
        names = {name.removesuffix(suffix): weight for name, weight in weights.items() if name.endswith(suffix)}
        return gated(4, **names)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def ours(weights, xs):
        params = tuple(js.Both(reader(weights, f"_l{i}"), reader(weights, f"_l{i}_reverse")) for i in range(2))
        state, ys = layer.unroll(params, xs, mask=mask)
        readers = [reader for both in state for reader in both]
        states = tuple(jnp.stack([getattr(r, name) for r in readers]) for name in ("hidden", "cell"))
        return (ys * weigh).sum() + states[1].sum(), (ys, states)

    our_gradients, our_values = ours(weights, xs)
    close(our_values, values)
    close(our_gradients, gradients)


def test_equals_flax():
    layer = js.Bidirectional(js.LSTM(INPUT, HIDDEN), js.GRU(INPUT, HIDDEN))
    params = random_params(RNG, layer)
    xs = RNG.normal(size=(BATCH, TIME, INPUT)).astype(np.float32)
    lengths = np.array([4, 6, 1])
    module = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(HIDDEN)), nn.RNN(nn.GRUCell(HIDDEN)))
    weights = {f"{name}_rnn": {"cell": linen(getattr(layer, name), getattr(params, name))} for name in js.Both._fields}
    theirs = module.apply({"params": weights}, xs, seq_lengths=lengths)
    mask = np.arange(TIME) < lengths[:, None]
    _, ys = layer.unroll(params, xs, mask=mask)
    close(ys, np.where(mask[..., None], theirs, 0))


def segments(reset):
    starts = [0, *(t for t in np.flatnonzero(reset) if t), len(reset)]
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(reverse):
    """A row with resets equals its segments apart, both ways, in outputs and, for the last one, in the state."""
    pair = js.Bidirectional(js.LSTM(INPUT, HIDDEN), js.GRU(INPUT, 2))
    layer = js.Sequential((pair, js.Bidirectional(js.Elman(7, 3), js.GRU(7, 3), merge="sum")))
    params = random_params(RNG, layer)
    xs = RNG.normal(size=(TIME, INPUT)).astype(np.float32)
    mask = np.array([1, 1, 0, 0, 1, 1], bool)
    reset = np.array([1, 0, 1, 0, 1, 0], bool)  # the second segment is all masked

    def read(xs, mask, reset=None):
        given = (xs, mask, reset)
        xs, mask, reset = jax.tree.map(np.flip if reverse else np.asarray, given)
        xs = np.flip(xs, 1) if reverse else xs
        state, ys = layer.unroll(params, xs, mask=mask, reset=reset, reverse=reverse)
        return state, ys[::-1] if reverse else ys

    state, ys = read(xs, mask, reset)
    apart = [read(xs[part], mask[part]) for part in segments(reset)]
    close(ys, np.concatenate([ys for _, ys in apart]))
    close(state[0].forward, apart[-1][0][0].forward)
    close(state[0].backward, apart[0][0][0].backward)


@pytest.mark.parametrize(
    "merge, function",
    [
        ("concatenate", lambda a, b: np.concatenate([a, b], -1)),
        ("sum", np.add),
        ("mean", lambda a, b: (a + b) / 2),
        ("product", np.multiply),
        ("both", js.Both),
    ],
)
def test_merges(merge, function):
    readers = js.Elman(INPUT, HIDDEN), js.GRU(INPUT, HIDDEN)
    layer = js.Bidirectional(*readers, merge=merge)
    params = random_params(RNG, layer)
    xs = RNG.normal(size=(BATCH, TIME, INPUT)).astype(np.float32)
    _, forward = readers[0].unroll(params.forward, xs)
    _, backward = readers[1].unroll(params.backward, xs[:, ::-1])
    _, ys = layer.unroll(params, xs)
    expected = function(forward, backward[:, ::-1])
    close(ys, expected)
    sizes = jax.tree.map(lambda leaf: leaf.shape[-1], expected)
    assert layer.output_size == sizes and layer.input_size == INPUT


def test_each_direction_draws_noise_of_its_own():
    layer = js.Bidirectional(js.Dropout(0.5), js.Dropout(0.5), merge="both")
    _, (forward, backward) = layer.unroll(layer.init(jax.random.key(0)), jnp.ones((50, 2)), key=jax.random.key(1))
    assert set(np.unique(forward)) == set(np.unique(backward)) == {0, 2}
    assert (forward != backward).any()


def test_layers_are_mapped_and_params_named():
    layer = js.Bidirectional(js.Elman(2, 3), js.Stack((js.Dense(2, 2), js.Elman(2, 3))))
    params = layer.init(jax.random.key(0))
    seen = []
    layer.map_layers(lambda layer, params: seen.append(layer) or params, params)
    assert seen == [js.Elman(2, 3), js.Dense(2, 2), js.Elman(2, 3)]
    assert layer.axes().forward == js.Elman(2, 3).axes()


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    elman = js.Elman(2, 3)
    with says(TypeError, "Bidirectional needs a layer as backward, got 3"):
        js.Bidirectional(elman, 3)
    with says(ValueError, "Bidirectional merges by concatenate, sum, mean, product, both, got 'max'"):
        js.Bidirectional(elman, elman, merge="max")
    with says(ValueError, "its layers need 2 and 4 features"):
        js.Bidirectional(elman, js.Elman(4, 3))
    with says(ValueError, "reads rank 1 and Embed(vocab_size=5, size=3) rank 0"):
        js.Bidirectional(elman, js.Embed(5, 3))
    with says(ValueError, "cannot take the product of 3 and 4 features: make the sizes equal"):
        js.Bidirectional(elman, js.Elman(2, 4), merge="product")
    with says(ValueError, "(number 1) needs 3 features, but it is given 6"):
        js.Sequential((js.Bidirectional(elman, elman), js.Dense(3, 1)))
    with says(TypeError, "reads whole sequences: use Sequential"):
        js.Stack((js.Bidirectional(elman, elman), js.Dense(6, 1)))
    layer = js.Bidirectional(elman, js.States(elman))
    with says(
        ValueError, "cannot concatenate outputs float32[4,3] and (ElmanState(hidden=float32[4,3]), float32[4,3])"
    ):
        layer.unroll(layer.init(jax.random.key(0)), jnp.ones((4, 2)))
    layer = js.Bidirectional(js.Map(first_feature), js.Map("tanh"), merge="sum")
    with says(ValueError, "cannot sum outputs float32[4,1] and float32[4,2]: they need to have the same shape"):
        layer.unroll(layer.init(jax.random.key(0)), jnp.ones((4, 2)))
    with says(TypeError, "Bidirectional needs params Both(forward, backward), got ((), ())"):
        layer.unroll(((), ()), jnp.ones((4, 2)))


def first_feature(x):
    return x[..., :1]
