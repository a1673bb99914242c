"""The phased LSTM against its paper, and which cells it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import jaxseq as js
from tests.numbers import random_params

INPUT, HIDDEN, TIME = 2, 5, 40
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures("float64")


def time_gate(t, tau, s, r_on, alpha):
    """Equation 6 of the paper for one unit, by cases."""
    phase = ((t - s) % tau) / tau
    if phase < r_on / 2:
        return 2 * phase / r_on
    return 2 - 2 * phase / r_on if phase < r_on else alpha * phase


def random_rhythms(cell):
    params = random_params(RNG, cell)
    return params._replace(log_period=RNG.uniform(0, 2, HIDDEN), open_logit=RNG.uniform(-1, 1, HIDDEN))


def test_equals_its_paper():
    cell = js.Phased(js.LSTM(INPUT, HIDDEN), leak=0.1)
    params = random_rhythms(cell)
    xs, times = RNG.normal(size=(TIME, INPUT)), RNG.uniform(0, 2, (TIME, 1)).cumsum(axis=0)
    start = js.LSTMState(*RNG.normal(size=(2, HIDDEN)))
    state, ys = cell.unroll(params, (xs, times), start)

    h, c = start
    weights = params.cell
    opened = []
    for t in range(TIME):
        z = [
            weights.input_kernel[:, g].T @ xs[t] + weights.recurrent_kernel[:, g].T @ h + weights.bias[g]
            for g in range(4)
        ]
        rhythm = zip(np.exp(params.log_period), params.shift, expit(params.open_logit), strict=True)
        k = np.array([time_gate(times[t, 0], *unit, 0.1) for unit in rhythm])
        c_new = expit(z[1]) * c + expit(z[0]) * np.tanh(z[2])
        c_new, c_old = k * c_new + (1 - k) * c, c_new
        h = k * (expit(z[3]) * np.tanh(c_old)) + (1 - k) * h
        c = c_new
        opened.append(k)
        np.testing.assert_allclose(ys[t], h, atol=1e-12)
    np.testing.assert_allclose(state.cell, c, atol=1e-12)
    opened = np.array(opened)
    assert (opened < 0.1).any() and (opened > 0.5).any()  # all cases occurred


def test_what_comes_while_a_unit_is_closed_and_does_not_leak_is_not_seen():
    cell = js.Phased(js.GRU(INPUT, HIDDEN), leak=0)
    params = random_rhythms(cell)._replace(log_period=np.zeros(HIDDEN), shift=np.zeros(HIDDEN))
    state = js.GRUState(RNG.normal(size=HIDDEN))
    after, y = cell.step(params, state, (RNG.normal(size=INPUT), np.array([7.9])))  # φ = 0.9
    np.testing.assert_array_equal(after.hidden, state.hidden)
    np.testing.assert_array_equal(y, state.hidden)


def test_gradients_are_finite_at_every_edge():
    """At the start, the middle and the end of the open phase, and where the period begins again."""
    cell = js.Phased(js.LSTM(INPUT, HIDDEN))
    params = cell.init(jax.random.key(0))._replace(log_period=jnp.zeros(HIDDEN), shift=jnp.zeros(HIDDEN))
    params = params._replace(open_logit=jnp.zeros(HIDDEN))  # r = 1/2
    times = jnp.array([0.0, 0.25, 0.5, 1.0, 1e6, -3.0])[:, None]
    gradients = jax.grad(lambda *given: cell.unroll(*given)[1].sum(), argnums=(0, 1))(
        params, (jnp.zeros((6, 2)), times)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def phases(params, times):
    """Of each unit at each time, in float64, of the very numbers that the params hold."""
    period = np.asarray(jnp.exp(params.log_period.astype(jnp.float32)), np.float64)
    return (np.asarray(times, np.float64) - np.asarray(params.shift, np.float64)) % period / period


FAR = 2**30 + np.arange(50)[:, None]  # float32 holds one in 64 of such numbers


@pytest.mark.parametrize(
    "times",
    [FAR.astype(np.int32), -FAR.astype(np.int32), FAR.astype(np.uint32), (FAR % 97).astype(np.int8), FAR * 0.5, FAR],
    ids=["int32", "before 0", "uint32", "int8", "float64", "int64"],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_times_of_another_dtype_lose_nothing(dtype, times):
    cell = js.Phased(js.LSTM(INPUT, HIDDEN), leak=1.0)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), random_rhythms(cell))
    params = params._replace(open_logit=jnp.full(HIDDEN, -jnp.inf, dtype))  # never open: the gate is the phase
    expected = phases(params, times)
    if times.dtype.itemsize == 8:
        period = np.exp(np.asarray(params.log_period, np.float64))
        expected = (times - np.asarray(params.shift, np.float64)) % period / period
    distance = np.abs(np.asarray(cell.gate(params, times), np.float64) - expected)
    assert np.minimum(distance, 1 - distance).max() < 3e-5
    state, ys = cell.unroll(params, (jnp.ones((50, INPUT), dtype), jnp.asarray(times)))
    assert ys.dtype == state.cell.dtype == dtype and np.isfinite(ys.astype(np.float32)).all()


def test_times_pass_other_layers_in_their_dtype():
    phased = js.Phased(js.GRU(INPUT, HIDDEN))
    cell = js.Stack((js.Parallel((js.Dense(3, INPUT), js.Map("identity"))), phased))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), cell.init(jax.random.key(0)))
    xs, times = jnp.ones((50, 3), jnp.bfloat16), jnp.array(FAR, jnp.int32)
    (_, state), ys = cell.unroll(params, (xs, times))
    features = js.Dense(3, INPUT).unroll(params[0][0], xs)[1]
    expected_state, expected = phased.unroll(params[1], (features, times))
    np.testing.assert_array_equal(ys, expected)
    np.testing.assert_array_equal(state.hidden, expected_state.hidden)


@pytest.mark.parametrize("dtype", [bool, complex])
def test_times_that_are_no_real_numbers_are_refused(dtype):
    cell = js.Phased(js.LSTM(INPUT, HIDDEN))
    with pytest.raises(TypeError, match=r"reads times, integers or floating numbers, got (bool|complex128)\[1\]"):
        cell.unroll(cell.init(jax.random.key(0)), (jnp.ones((4, INPUT)), jnp.ones((4, 1), dtype)))


def test_rhythms_start_in_their_ranges():
    params = js.Phased(js.LSTM(2, 500), max_period=50).init(jax.random.key(0))
    period = np.exp(params.log_period)
    assert period.min() >= 1 and 45 < period.max() <= 50 and 6 < np.median(period) < 8.3  # median sqrt(50)
    assert (params.shift >= 0).all() and (params.shift <= period).all()
    np.testing.assert_allclose(jax.nn.sigmoid(params.open_logit), 0.05)


@pytest.mark.parametrize(
    "cell", [js.ProjectedLSTM(2, 4, 3), js.ClockworkRNN(2, 4), js.Dense(2, 3)], ids=lambda cell: type(cell).__name__
)
def test_a_state_of_other_arrays_is_refused(cell):
    with pytest.raises(TypeError, match=rf"Phased needs a cell .* of one size, but that of {type(cell).__name__}"):
        js.Phased(cell)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="Phased needs a finite max_period > 1, got 1.0"):
        js.Phased(js.LSTM(2, 3), max_period=1)
    with pytest.raises(ValueError, match="Phased needs a leak from 0 to 1, got -0.1"):
        js.Phased(js.LSTM(2, 3), leak=-0.1)


def test_times_of_another_size_are_refused():
    cell = js.Phased(js.LSTM(2, 3))
    params = cell.init(jax.random.key(0))
    with pytest.raises(ValueError, match="got times with 2 features"):
        cell.unroll(params, (jnp.ones((4, 2)), jnp.ones((4, 2))))


def test_a_step_without_its_time_is_refused():
    cell = js.Phased(js.LSTM(2, 3))
    params = cell.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"reads pairs \(x, time\), got float\d+\[2,2\]: give both"):
        cell.step(params, cell.initial_state(params, (2,)), jnp.ones((2, 2)))
