"""Cells on long time scales against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import jaxseq as js

BATCH, TIME = 2, 9
XS = np.random.default_rng(0).normal(size=(BATCH, TIME, 2))

pytestmark = pytest.mark.usefixtures("float64")


def elman(cell_params):
    """One step of a simple recurrent network in NumPy."""
    W, R, b = (np.asarray(leaf) for leaf in cell_params)
    return lambda h, x: np.tanh(x @ W[:, 0] + h @ R[:, 0] + b[0])


@pytest.mark.parametrize("rate", [0.3, (0.9, 0.5, 0.1)])
@pytest.mark.parametrize("learned", [False, True])
def test_leaky_units_are_their_equation(rate, learned):
    """u(t) = (1 - a) u(t-1) + a f(W x(t) + R u(t-1) + b), with a = sigmoid of a parameter if it is learned."""
    cell = js.Leaky(js.Elman(2, 3), rate, learned=learned)
    params, a = cell.init(jax.random.key(0)), np.asarray(rate)
    if learned:
        np.testing.assert_allclose(expit(np.asarray(params.rate_logits)), a, rtol=1e-12)
        a = expit(np.asarray(params.rate_logits) + 1)
        params = params._replace(rate_logits=params.rate_logits + 1)
    f, u, expected = elman(params.cell), np.zeros((BATCH, 3)), []
    for t in range(TIME):
        u = (1 - a) * u + a * f(u, XS[:, t])
        expected.append(u)
    state, ys = cell.unroll(params, jnp.asarray(XS))
    np.testing.assert_allclose(ys, np.stack(expected, 1), rtol=1e-12)
    np.testing.assert_allclose(state.hidden, u, rtol=1e-12)


def test_leaky_units_of_an_identity_are_the_running_average():
    """m(t) = Σ_k a (1 - a)^k x(t-k), by the closed form."""
    cell, rate = js.Leaky(js.Elman(2, 2, activation="identity"), 0.2), 0.2
    params = cell.init(jax.random.key(0))
    drive = js.GatedParams(jnp.eye(2)[:, None], jnp.zeros((2, 1, 2)), jnp.zeros((1, 2)))
    _, ys = cell.unroll(params._replace(cell=drive), jnp.asarray(XS))
    weights = rate * (1 - rate) ** np.subtract.outer(np.arange(TIME), np.arange(TIME))
    np.testing.assert_allclose(ys, np.einsum("ts,bsf->btf", np.tril(weights), XS), rtol=1e-12)


def test_a_rate_of_1_is_the_cell_itself():
    cell = js.LSTM(2, 3)
    params = cell.init(jax.random.key(0))
    leaky = js.Leaky(cell, 1)
    np.testing.assert_allclose(leaky.unroll(js.LeakyParams(params, None), XS)[1], cell.unroll(params, XS)[1])


def test_only_what_a_cell_shows_leaks():
    """An LSTM's hidden units; its memory is what its gates make of it."""
    cell = js.LSTM(2, 3)
    params = cell.init(jax.random.key(0))
    state = js.LSTMState(jnp.ones((BATCH, 3)), jnp.ones((BATCH, 3)))
    inner, y = cell.step(params, state, XS[:, 0])
    leaky, shown = js.Leaky(cell, 0.25).step(js.LeakyParams(params, None), state, XS[:, 0])
    np.testing.assert_allclose(leaky.hidden, 0.75 + 0.25 * y, rtol=1e-12)
    np.testing.assert_array_equal(leaky.cell, inner.cell)
    np.testing.assert_array_equal(shown, leaky.hidden)


def test_rates_are_learned():
    cell = js.Leaky(js.Elman(2, 3), (0.9, 0.5, 0.1), learned=True)
    params = cell.init(jax.random.key(0))
    gradient = jax.grad(lambda params: jnp.sum(jnp.cos(cell.unroll(params, XS)[1])))(params)
    assert jnp.all(gradient.rate_logits != 0)


def test_leaky_errors():
    with pytest.raises(ValueError, match="0 < rate <= 1, got 1.5"):
        js.Leaky(js.Elman(2, 3), 1.5)
    with pytest.raises(TypeError, match="number, or a tuple of numbers, as rate, got 'slow'"):
        js.Leaky(js.Elman(2, 3), "slow")  # type: ignore
    with pytest.raises(ValueError, match="cannot learn a rate that starts at 1"):
        js.Leaky(js.Elman(2, 3), (1, 0.5), learned=True)
    with pytest.raises(ValueError, match=r"has 2 rates, but the output of its cell is float64\[2,3\]"):
        cell = js.Leaky(js.Elman(2, 3), (0.1, 0.5))
        cell.unroll(cell.init(jax.random.key(0)), XS)
    with pytest.raises(TypeError, match="output is a part of its state"):
        cell = js.Leaky(js.Stack((js.Elman(2, 3), js.Dense(3, 2))), 0.5)
        cell.unroll(cell.init(jax.random.key(0)), XS)


def test_delay_is_interleaved_sequences():
    """h(t) = f(h(t-3), x(t)): every third step is a sequence of its own."""
    cell = js.Delay(js.Elman(2, 3), 3)
    params = cell.init(jax.random.key(0))
    f, h = elman(params), [np.zeros((BATCH, 3))] * 3
    for t in range(TIME):
        h.append(f(h[-3], XS[:, t]))
    state, ys = cell.unroll(params, jnp.asarray(XS))
    np.testing.assert_allclose(ys, np.stack(h[3:], 1), rtol=1e-12)
    np.testing.assert_allclose([s.hidden for s in state], h[-3:], rtol=1e-12)
    for start in range(3):
        np.testing.assert_allclose(ys[:, start::3], cell.cell.unroll(params, XS[:, start::3])[1], rtol=1e-12)


def test_a_gradient_passes_a_delay_in_one_passage():
    """With a linear recurrence of radius r, d h_T / d h_0 is r^(T / d)."""
    cell = js.Delay(js.Elman(1, 1, activation="identity"), 4)
    params = js.GatedParams(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 0.5), jnp.zeros((1, 1)))
    gradient = jax.grad(lambda xs: cell.unroll(params, xs)[1][-1, 0])(jnp.zeros((13, 1)))
    np.testing.assert_allclose(gradient[0, 0], 0.5**3, rtol=1e-12)


def test_time_skip_reads_the_last_step_and_a_distant_one():
    """h(t) = tanh(W x(t) + R h(t-1) + D h(t-4) + b)."""
    cell = js.TimeSkip(js.Elman(5, 3), 4)
    params = cell.init(jax.random.key(0))
    f, h = elman(params), [np.zeros((BATCH, 3))] * 4
    for t in range(TIME):
        h.append(f(h[-1], np.concatenate([XS[:, t], h[-4]], axis=-1)))
    state, ys = cell.unroll(params, jnp.asarray(XS))
    np.testing.assert_allclose(ys, np.stack(h[4:], 1), rtol=1e-12)
    np.testing.assert_allclose(state.outputs, h[-4:], rtol=1e-12)


def test_delayed_groups_see_only_their_delay():
    """Group g at t reads all units at t - d_g: tanh(W_g x(t) + R_g h(t - d_g) + b_g)."""
    cell = js.DelayedElman(2, 6, (1, 2, 4))
    params = cell.init(jax.random.key(0))
    params = params._replace(bias=jax.random.normal(jax.random.key(1), (1, 6)))
    W, R, b = (np.asarray(leaf) for leaf in params)
    h = [np.zeros((BATCH, 6))] * 4
    for t in range(TIME):
        new = np.zeros((BATCH, 6))
        for group, delay in ((slice(0, 2), 1), (slice(2, 4), 2), (slice(4, 6), 4)):
            new[:, group] = np.tanh(XS[:, t] @ W[:, 0, group] + h[-delay] @ R[:, 0, group] + b[0, group])
        h.append(new)
    state, ys = cell.unroll(params, jnp.asarray(XS))
    np.testing.assert_allclose(ys, np.stack(h[4:], 1), rtol=1e-12)
    np.testing.assert_allclose([state.hidden, *state.past], h[:-5:-1], rtol=1e-12)


def test_errors_of_delays():
    with pytest.raises(ValueError, match="Delay needs steps >= 1, got 0"):
        js.Delay(js.Elman(2, 3), 0)
    with pytest.raises(ValueError, match="TimeSkip needs steps >= 1, got 0"):
        js.TimeSkip(js.Elman(5, 3), 0)
    with pytest.raises(ValueError, match="reads 3 features and gives 3: its input_size"):
        js.TimeSkip(js.Elman(3, 3), 2)
    with pytest.raises(TypeError, match="tuple of delays"):
        js.DelayedElman(2, 4, 2)  # type: ignore
    with pytest.raises(ValueError, match="delays of at least one step"):
        js.DelayedElman(2, 4, (1, 0))
    with pytest.raises(ValueError, match="5 units do not divide by the 2 delays"):
        js.DelayedElman(2, 5, (1, 2))
