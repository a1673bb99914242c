"""sLSTM and mLSTM against the equations of their paper without stabilizers, and the chunks against single steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import jaxseq as js
from tests.numbers import random_like, random_params

BATCH, TIME, INPUT, HEADS, SIZE = 2, 11, 3, 2, 3
HIDDEN = HEADS * SIZE
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures("float64")


def test_slstm_equals_its_paper():
    """Column vectors, with a block-diagonal R for each gate; what is stored is scaled by exp(-m)."""
    cell = js.SLSTM(INPUT, HIDDEN, heads=HEADS)
    params = random_params(RNG, cell)
    start = random_like(RNG, cell.initial_state(params, (BATCH,)))
    start = start._replace(normalizer=np.abs(start.normalizer))
    xs = RNG.normal(size=(BATCH, TIME, INPUT))
    last, ys = cell.unroll(params, xs, start)

    blocks = np.zeros((4, HIDDEN, HIDDEN))
    for head in range(HEADS):
        own = slice(head * SIZE, (head + 1) * SIZE)
        blocks[:, own, own] = params.recurrent_kernel[own].transpose(1, 2, 0)
    for row in range(BATCH):
        h, c, n, m = (leaf[row] for leaf in start)
        c, n = c * np.exp(m), n * np.exp(m)
        for t in range(TIME):
            i, f, z, o = (
                params.input_kernel[:, gate].T @ xs[row, t] + blocks[gate] @ h + params.bias[gate] for gate in range(4)
            )
            c = expit(f) * c + np.exp(i) * np.tanh(z)
            n = expit(f) * n + np.exp(i)
            h = expit(o) * c / n
            np.testing.assert_allclose(ys[row, t], h, rtol=1e-10)
        scale = np.exp(last.stabilizer[row])
        np.testing.assert_allclose(last.cell[row] * scale, c, rtol=1e-10)
        np.testing.assert_allclose(last.normalizer[row] * scale, n, rtol=1e-10)


def test_mlstm_equals_its_paper():
    cell = js.MLSTM(INPUT, HIDDEN, heads=HEADS, chunk_size=4)
    params = random_params(RNG, cell)
    start = random_like(RNG, cell.initial_state(params, (BATCH,)))
    xs = RNG.normal(size=(BATCH, TIME, INPUT))
    last, ys = cell.unroll(params, xs, start)

    for row in range(BATCH):
        for head in range(HEADS):
            own = slice(head * SIZE, (head + 1) * SIZE)
            scale = np.exp(start.stabilizer[row, head])
            memory, n = start.memory[row, head] * scale, start.normalizer[row, head] * scale
            for t in range(TIME):
                x = xs[row, t]
                q, k, v, o = (params.input_kernel[:, gate, own].T @ x + params.bias[gate, own] for gate in range(4))
                i, f = (params.gate_kernel[:, gate, head] @ x + params.gate_bias[gate, head] for gate in range(2))
                k = k / np.sqrt(SIZE)
                memory = expit(f) * memory + np.exp(i) * np.outer(v, k)
                n = expit(f) * n + np.exp(i) * k
                h = expit(o) * (memory @ q) / max(abs(n @ q), 1)
                np.testing.assert_allclose(ys[row, t, own], h, rtol=1e-10)
            scale = np.exp(last.stabilizer[row, head])
            np.testing.assert_allclose(last.memory[row, head] * scale, memory, rtol=1e-10)
            np.testing.assert_allclose(last.normalizer[row, head] * scale, n, rtol=1e-10)


@functools.cache
def problem():
    cell = js.MLSTM(INPUT, HIDDEN, heads=HEADS)
    params = random_params(RNG, cell)
    return params, RNG.normal(size=(BATCH, TIME, INPUT)), random_like(RNG, cell.initial_state(params, (BATCH,)))


def value_and_gradients(cell, **options):
    def loss(params, xs, state):
        state, ys = cell.unroll(params, xs, state, **options)
        return sum(jnp.sum(jnp.cos(jnp.arange(x.size)).reshape(x.shape) * x) for x in (ys, *state)), (state, ys)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*problem())


@pytest.mark.parametrize("options", ["none", "reverse", "mask and reset"])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_chunks_are_single_steps(chunk_size, options):
    flags = np.random.default_rng(1).random((2, BATCH, TIME))
    given = {
        "none": {},
        "reverse": {"reverse": True},
        "mask and reset": {"mask": flags[0] < 0.6, "reset": flags[1] < 0.3},
    }[options]
    cell = js.MLSTM(INPUT, HIDDEN, heads=HEADS, chunk_size=chunk_size)
    ours, expected = value_and_gradients(cell, **given), value_and_gradients(js.Plain(cell), **given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10 * max(1, np.abs(b).max())), ours, expected)


@pytest.mark.parametrize("size", [200.0, -200.0])
@pytest.mark.parametrize("kind", [js.SLSTM, js.MLSTM])
def test_gates_far_out_of_range_give_finite_values_and_gradients(kind, size):
    """exp(200) is infinite in float32, and so is exp(-(-200))."""
    cell = kind(INPUT, HIDDEN, heads=HEADS)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cell.init(jax.random.key(0)))
    if kind is js.SLSTM:
        params = params._replace(bias=params.bias.at[0].set(size))
    else:
        params = params._replace(gate_bias=params.gate_bias.at[0].set(size).at[1].set(-30.0))
    xs = jnp.stack([jnp.zeros((TIME, INPUT)), jnp.ones((TIME, INPUT))]).astype(jnp.float32)
    for way in (cell, js.Plain(cell)):
        out = jax.value_and_grad(lambda *given, way=way: way.unroll(*given)[1].sum(), argnums=(0, 1))(params, xs)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_no_loop_over_steps():
    """64 steps in chunks of 16 are a loop of 4."""
    cell = js.MLSTM(INPUT, HIDDEN, heads=HEADS, chunk_size=16)
    jaxpr = str(jax.make_jaxpr(cell.unroll)(cell.init(jax.random.key(0)), jnp.zeros((64, INPUT))))
    assert "length=4" in jaxpr and "length=64" not in jaxpr


@pytest.mark.parametrize("kind", [js.SLSTM, js.MLSTM])
@pytest.mark.parametrize("heads", [0, 4])
def test_heads_divide_the_units(kind, heads):
    with pytest.raises(ValueError, match=rf"{kind.__name__} needs heads that divide hidden_size=6: {heads}"):
        kind(2, 6, heads=heads)


@pytest.mark.parametrize("bias", [-100.0, -40.0, 0.0, 40.0])
def test_the_first_output_does_not_depend_on_the_input_gate(bias):
    """From an empty memory h = σ(o) tanh(g), whatever the input gate is."""
    cell = js.SLSTM(2, 4, heads=2)
    params = cell.init(jax.random.key(0))
    params = params._replace(bias=params.bias.at[0].set(bias))
    x = jnp.array([0.3, -1.0])
    _, y = cell.step(params, cell.initial_state(params), x)
    g, o = (x @ params.input_kernel[:, gate] + params.bias[gate] for gate in (2, 3))
    np.testing.assert_allclose(y, jax.nn.sigmoid(o) * jnp.tanh(g), rtol=1e-6)


def test_mlstm_in_bfloat16_is_near_float32_over_many_steps():
    cell = js.MLSTM(8, 8, heads=2)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), cell.init(jax.random.key(0)))
    xs = jax.random.normal(jax.random.key(1), (300, 8)).astype(jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, xs))
    expected = np.asarray(cell.unroll(*wide)[1])
    error = np.asarray(cell.unroll(params, xs)[1], np.float32) - expected
    assert np.sqrt((error**2).mean()) < 0.05 * np.sqrt((expected**2).mean())
