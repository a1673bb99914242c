"""Gated linear attention and the gated delta rule against transcriptions of their papers, and chunks against steps."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import jaxseq as js
from jaxseq.cells import chunkwise
from tests.numbers import random_params

BATCH, TIME, INPUT, KEY, VALUE, HEADS = 2, 11, 3, 4, 5, 2
RNG = np.random.default_rng(0)
LAYERS = [js.GatedLinearAttention, js.GatedDeltaNet]

pytestmark = pytest.mark.usefixtures("float64")


def swish(a):
    return a * expit(a)


def gla(p, memories, x):
    """Row vectors, head by head."""
    heads, after = [], []
    for h, memory in enumerate(memories):
        q, k, v = x @ p.query_kernel[:, h] / 2, x @ p.key_kernel[:, h], x @ p.value_kernel[:, h]
        alpha = expit(x @ p.decay_down @ p.decay_up[:, h] + p.decay_bias[h]) ** (1 / 16)
        memory = np.diag(alpha) @ memory + np.outer(k, v)
        o = memory.T @ q
        heads.append((o - o.mean()) / np.sqrt(o.var() + 1e-5) * p.norm_scale[h])
        after.append(memory)
    gates = [swish(x @ p.gate_kernel[:, h] + p.gate_bias[h]) for h in range(HEADS)]
    return np.stack(after), np.concatenate(gates) * np.concatenate(heads) @ p.output_kernel


def delta(p, memories, x):
    """The paper's memory is the transpose, from keys on the right to values on the left."""
    heads, after = [], []
    for h, memory in enumerate(memories):
        q, k, v = (swish(x @ kernel[:, h]) for kernel in (p.query_kernel, p.key_kernel, p.value_kernel))
        q, k = (row / np.sqrt(row @ row + 1e-6) for row in (q, k))
        alpha = np.exp(-np.exp(p.log_rate[h]) * np.log1p(np.exp(x @ p.step_kernel[:, h] + p.step_bias[h])))
        beta = expit(x @ p.strength_kernel[:, h])
        paper = memory.T @ (alpha * (np.eye(KEY) - beta * np.outer(k, k))) + beta * np.outer(v, k)
        o = paper @ (q / 2)
        o = o / np.sqrt(np.mean(o**2) + 1e-5) * p.norm_scale[h]
        heads.append(o * swish(x @ p.gate_kernel[:, h]))
        after.append(paper.T)
    return np.stack(after), np.concatenate(heads) @ p.output_kernel


@pytest.mark.parametrize(("layer", "paper"), list(zip(LAYERS, [gla, delta], strict=True)))
def test_equals_the_paper(layer, paper):
    cell = layer(INPUT, KEY, VALUE, heads=HEADS, chunk_size=4)
    params, xs = random_params(RNG, cell), RNG.normal(size=(BATCH, TIME, INPUT))
    start = RNG.normal(size=(BATCH, HEADS, KEY, VALUE))
    state, ys = cell.unroll(params, xs, js.LinearAttentionState(start))
    for row in range(BATCH):
        memories = start[row]
        for t in range(TIME):
            memories, y = paper(params, memories, xs[row, t])
            np.testing.assert_allclose(ys[row, t], y, rtol=0, atol=1e-11 * np.abs(ys).max())
        np.testing.assert_allclose(state.memory[row], memories, rtol=0, atol=1e-12 * np.abs(memories).max())


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_chunks_of_any_size_are_the_steps(layer, size):
    """Also with decays that underflow within a chunk, and with resets in it."""
    cell = layer(INPUT, KEY, VALUE, heads=HEADS, chunk_size=size)
    params, xs = random_params(RNG, cell), RNG.normal(size=(BATCH, TIME, INPUT))
    if layer is js.GatedLinearAttention:
        params = params._replace(decay_bias=np.linspace(-2e4, 2e4, HEADS * KEY).reshape(HEADS, KEY))
    else:
        params = params._replace(log_rate=np.array([-1.0, 7.0]))
    start = js.LinearAttentionState(RNG.normal(size=(BATCH, HEADS, KEY, VALUE)))
    reset = RNG.uniform(size=(BATCH, TIME)) < 0.3

    def run(cell, params, xs):
        state, ys = cell.unroll(params, xs, start, reset=reset, reverse=True)
        return jnp.sum(ys * np.cos(np.arange(ys.size)).reshape(ys.shape)) + jnp.sum(state.memory**3), (state, ys)

    def of(cell):
        return jax.jit(jax.value_and_grad(functools.partial(run, cell), (0, 1), has_aux=True))(params, xs)

    for ours, expected in zip(jax.tree.leaves(of(cell)), jax.tree.leaves(of(js.Plain(cell))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("layer", "sizes", "largest"),  # for each step: what is projected to the rank of the decays, the values, q k v o
    [
        (js.GatedLinearAttention, (INPUT, KEY, VALUE), 16),
        (js.GatedDeltaNet, (INPUT, KEY, VALUE), HEADS * VALUE),
        (js.MLSTM, (INPUT, HEADS * KEY), 4 * HEADS * KEY),
    ],
)
def test_the_gradient_saves_nothing_of_each_pair_of_steps(layer, sizes, largest):
    """Its arrays are as large as inputs are or, within one chunk, smaller."""
    cell = layer(*sizes, heads=HEADS, chunk_size=32)
    time = 64 * cell.chunk_size
    flags = jnp.zeros(time, bool)

    def loss(params, xs):
        return cell.unroll(params, xs, mask=flags, reset=flags)[1].sum()

    params = jax.eval_shape(cell.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, jnp.zeros((time, INPUT)))
    assert max(map(math.prod, shapes(jaxpr.jaxpr))) == time * largest


def shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes(inner)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 64])
def test_the_inverse_of_a_unit_triangle(size):
    lower = np.tril(RNG.uniform(0.5, 1, size=(3, size, size)), -1)  # whose powers grow as binomials
    inverse = chunkwise._unit_triangular_inverse(jnp.asarray(lower))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(size) + lower), rtol=0, atol=1e-11)


def test_the_delta_rule_replaces_what_a_key_held():
    """Written twice under one key at full strength and without decay, only the second value is read."""
    terms = chunkwise.Terms(
        query=jnp.array([[[0.6, 0.8]]] * 2),
        key=jnp.array([[[0.6, 0.8]]] * 2),
        value=jnp.array([[[1.0, 2.0, 3.0]], [[-1.0, 5.0, 0.0]]]),
        log_decay=jnp.zeros((2, 1, 1)),
        strength=jnp.ones((2, 1, 1)),
    )
    _, readings = chunkwise.chunkwise(terms, jnp.zeros((1, 2, 3)), None, 2)
    np.testing.assert_allclose(readings, terms.value, atol=1e-15)


def test_hyperparameters_out_of_range():
    with pytest.raises(ValueError, match="GatedDeltaNet needs heads >= 1, got 0"):
        js.GatedDeltaNet(2, 2, 2, heads=0)
    with pytest.raises(ValueError, match="rank >= 1 and temperature > 0, got 16 and 0.0"):
        js.GatedLinearAttention(2, 2, 2, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size >= 1, got 0"):
        js.GatedDeltaNet(2, 2, 2, chunk_size=0)


def test_a_state_or_input_of_another_cell():
    cell = js.GatedDeltaNet(2, 3, 4)
    params = cell.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"inputs with 5 features.*needs 2"):
        cell.step(params, cell.initial_state(params), jnp.ones(5))
    with pytest.raises(ValueError, match=r"state.memory of shape \(1, 2, 2\)"):
        cell.unroll(params, jnp.ones((4, 2)), js.LinearAttentionState(jnp.ones((1, 2, 2))))
