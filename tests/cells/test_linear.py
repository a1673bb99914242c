"""Linear recurrences against transcriptions of their papers, and S5 against the dense system that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, special

import jaxseq as js
from jaxseq.cells import diagonal
from tests.numbers import random_params

BATCH, TIME, INPUT, HIDDEN = 2, 6, 3, 4
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures("float64")


def g(x):
    return np.where(x >= 0, x + 0.5, special.expit(x))


def min_gru(params, h, x):
    """With the sign of the z that the paper prints."""
    z = special.expit(-(x @ params.input_kernel[:, 0] + params.bias[0]))
    return (1 - z) * h + z * g(x @ params.input_kernel[:, 1] + params.bias[1])


def min_lstm(params, h, x):
    i, f = (special.expit(x @ params.input_kernel[:, gate] + params.bias[gate]) for gate in (0, 1))
    return f / (f + i) * h + i / (f + i) * g(x @ params.input_kernel[:, 2] + params.bias[2])


def rg_lru(params, h, x):
    r, i = (special.expit(x @ params.input_kernel[:, gate] + params.bias[gate]) for gate in (0, 1))
    a = special.expit(params.decay) ** (8 * r)
    return a * h + np.sqrt(1 - a**2) * (i * x)


CELLS = [(js.MinGRU(INPUT, HIDDEN), min_gru), (js.MinLSTM(INPUT, HIDDEN), min_lstm), (js.RGLRU(HIDDEN), rg_lru)]


@pytest.mark.parametrize(("cell", "paper"), CELLS, ids=lambda value: getattr(value, "__name__", ""))
def test_equals_the_paper(cell, paper):
    params, xs = random_params(RNG, cell), RNG.normal(size=(BATCH, TIME, cell.input_size))
    h = start = RNG.normal(size=(BATCH, HIDDEN))
    state, ys = cell.unroll(params, xs, js.LinearState(start))
    for t in range(TIME):
        h = paper(params, h, xs[:, t])
        np.testing.assert_allclose(ys[:, t], h, rtol=1e-12)
    np.testing.assert_allclose(state.hidden, h, rtol=1e-12)


def test_min_gru_in_logarithms():
    """The parallel form of the paper, Heinsen's scan: a cumulative log-sum-exp."""
    cell = js.MinGRU(INPUT, HIDDEN)
    params, xs, start = random_params(RNG, cell), RNG.normal(size=(TIME, INPUT)), RNG.uniform(0.1, 1, size=HIDDEN)
    k = -(xs @ params.input_kernel[:, 0] + params.bias[0])
    log_candidate = np.log(g(xs @ params.input_kernel[:, 1] + params.bias[1]))
    log_coefficients = np.concatenate([np.zeros((1, HIDDEN)), np.cumsum(-np.logaddexp(0, k), axis=0)])
    log_values = np.concatenate([np.log(start)[None], -np.logaddexp(0, -k) + log_candidate]) - log_coefficients
    sums = [special.logsumexp(log_values[: t + 1], axis=0) for t in range(1, TIME + 1)]
    _, ys = cell.unroll(params, xs, js.LinearState(start))
    np.testing.assert_allclose(ys, np.exp(log_coefficients[1:] + sums), rtol=1e-12)


def test_lru_equals_the_paper():
    cell = js.LRU(INPUT, HIDDEN, r_min=0.5, r_max=0.9, max_phase=1.0)
    params, xs = random_params(RNG, cell), RNG.normal(size=(TIME, INPUT))
    start = RNG.normal(size=(2, HIDDEN))
    eigenvalues = np.exp(-np.exp(params.log_decay) + 1j * np.exp(params.log_phase))
    inputs = np.exp(params.log_scale)[:, None] * (params.input_kernel[:, 0] + 1j * params.input_kernel[:, 1]).T
    readout = (params.output_kernel[:, 0] + 1j * params.output_kernel[:, 1]).T
    state, ys = cell.unroll(params, xs, js.DiagonalState(*start))
    for t in range(TIME):
        h = eigenvalues ** (t + 1) * (start[0] + 1j * start[1])
        h = h + sum(eigenvalues ** (t - s) * (inputs @ xs[s]) for s in range(t + 1))
        np.testing.assert_allclose(ys[t], (readout @ h).real + params.skip * xs[t], rtol=1e-11)
    np.testing.assert_allclose(state.real + 1j * state.imag, h, rtol=1e-11)


def test_lru_starts_on_its_ring():
    cell = js.LRU(1, 20000, r_min=0.5, r_max=0.9, max_phase=1.0)
    params = cell.init(jax.random.key(0))
    size, phase = np.exp(-np.exp(params.log_decay)), np.exp(params.log_phase)
    assert size.min() >= 0.5 and size.max() <= 0.9 and phase.max() <= 1 and abs(phase.mean() - 0.5) < 0.01
    assert abs(np.mean(size**2) - (0.25 + 0.81) / 2) < 0.01  # uniform in area
    np.testing.assert_allclose(np.exp(params.log_scale), np.sqrt(1 - size**2), rtol=1e-10)
    for leaf in jax.tree.leaves(js.LRU(1, 20000).init(jax.random.key(1))):
        assert np.isfinite(leaf).all()


def test_rg_lru_starts_with_slow_decays():
    params = jax.vmap(js.RGLRU(100).init)(jax.random.split(jax.random.key(0), 200))
    decay = special.expit(np.asarray(params.decay)) ** 8
    assert decay.min() >= 0.9 and decay.max() <= 0.999 and abs(decay.mean() - 0.9495) < 0.001


def hippo_normal(size):
    """A + p pᵀ of HiPPO-LegS, A written as its paper writes it, and p_n = √(n + 1/2)."""
    matrix = np.zeros((size, size))
    for n in range(size):
        for k in range(n + 1):
            matrix[n, k] = -(n + 1) if n == k else -np.sqrt((2 * n + 1) * (2 * k + 1))
    p = np.sqrt(np.arange(size) + 0.5)
    return matrix + np.outer(p, p)


@pytest.mark.parametrize("blocks", [1, 2])
def test_s5_is_a_dense_system_held_over_each_step(blocks):
    cell = js.S5(INPUT, 8, blocks=blocks, min_step=0.2, max_step=0.2)
    params = jax.tree.map(np.asarray, cell.init(jax.random.key(0)))
    _, vectors = diagonal._hippo(8 // blocks)
    basis = linalg.block_diag(*[vectors] * blocks)
    inputs = 2 * ((params.input_kernel[:, 0] + 1j * params.input_kernel[:, 1]) @ basis.T).real.T
    readout = 2 * (basis.conj() @ (params.output_kernel[:, 0] + 1j * params.output_kernel[:, 1])).real.T
    dense = linalg.block_diag(*[hippo_normal(8 // blocks)] * blocks)
    advance = linalg.expm(0.2 * dense)
    held = linalg.solve(dense, advance - np.eye(8)) @ inputs

    impulse = np.zeros((INPUT, TIME, INPUT))
    impulse[:, 0] = np.eye(INPUT)
    _, kernel = cell.unroll(params, impulse)  # [input, time, output]
    for t in range(TIME):
        expected = readout @ np.linalg.matrix_power(advance, t) @ held + (t == 0) * np.diag(params.skip)
        np.testing.assert_allclose(kernel[:, t].T, expected, rtol=0, atol=1e-12)


def test_s5_with_a_step_of_each_unit():
    """Each conjugate pair as a real block of two, discretised by the exponential of an augmented matrix."""
    cell = js.S5(INPUT, 4)
    params, xs = random_params(RNG, cell), RNG.normal(size=(TIME, INPUT))
    rates, steps = (-np.exp(params.log_decay), params.frequency), np.exp(params.log_step)
    expected = xs * params.skip
    for unit in range(2):
        dense = np.zeros((2 + INPUT, 2 + INPUT))
        real, imag = rates[0][unit], rates[1][unit]
        dense[:2, :2] = [[real, -imag], [imag, real]]
        dense[:2, 2:] = params.input_kernel[:, :, unit].T
        advance = linalg.expm(dense * steps[unit])[:2]
        h = np.zeros(2)
        for t in range(TIME):
            h = advance @ np.concatenate([h, xs[t]])
            expected[t] += 2 * (h[0] * params.output_kernel[unit, 0] - h[1] * params.output_kernel[unit, 1])
    np.testing.assert_allclose(cell.unroll(params, xs)[1], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cell", [js.MinLSTM(2, 3), js.RGLRU(2)], ids=repr)
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_saturated_gates_have_finite_gradients(cell, bias):
    params = cell.init(jax.random.key(0))
    params = params._replace(bias=jnp.full_like(params.bias, bias))
    gradients = jax.grad(lambda params: jnp.sum(cell.unroll(params, jnp.ones((4, 2)))[1] ** 2))(params)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()


def test_slow_decays_survive_bfloat16():
    cell = js.RGLRU(2)
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), cell.init(jax.random.key(0)))
    params = params._replace(decay=jnp.full(2, 8.0, jnp.bfloat16))  # decays of about 0.9987 a step
    state = js.LinearState(jnp.ones(2, jnp.bfloat16))
    state, _ = cell.unroll(params, jnp.zeros((1000, 2), jnp.bfloat16), state)
    expected = special.expit(8.0) ** (8 * 0.5 * 1000)
    np.testing.assert_allclose(state.hidden.astype(np.float64), expected, rtol=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: js.LRU(2, 3, r_min=0.9, r_max=0.5), r"0 <= r_min < r_max <= 1, got r_min=0.9 and r_max=0.5"),
        (lambda: js.LRU(2, 3, max_phase=0.0), "0 < max_phase <= 2π, got 0.0"),
        (lambda: js.S5(2, 6, blocks=2), "even number of units in each block, got hidden_size=6 and blocks=2"),
        (lambda: js.S5(2, 6, min_step=0.0), "0 < min_step <= max_step, got 0.0 and 0.1"),
    ],
)
def test_hyperparameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_or_input_of_another_cell():
    cell = js.MinGRU(2, 3)
    params = cell.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"MinGRU.*inputs with 4 features.*needs 2"):
        cell.step(params, cell.initial_state(params), jnp.ones(4))
    with pytest.raises(TypeError, match="state of another cell"):
        cell.step(params, (), jnp.ones(2))
    with pytest.raises(ValueError, match="params of another layer"):
        js.MinLSTM(2, 3).unroll(params, jnp.ones((5, 2)))
