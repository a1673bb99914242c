"""The Clockwork RNN: its paper's equations, and that groups unrolled one by one are the steps of all."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

BATCH, TIME, PERIODS = 2, 13, (1, 2, 6)
CELL = js.ClockworkRNN(3, 6, periods=PERIODS)

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def problem():
    key, *keys = jax.random.split(jax.random.key(0), 4)
    params = jax.tree.map(lambda leaf: jax.random.normal(keys[0], leaf.shape), CELL.init(key))
    state = js.ClockworkState(jax.random.normal(keys[1], (BATCH, 6)), jnp.zeros(BATCH, jnp.int32))
    return params, jax.random.normal(keys[2], (BATCH, TIME, 3)), state


def test_equals_its_paper():
    """Column vectors; W_H is block-upper triangular, and only the rows of groups with t mod T = 0 are computed."""
    params, xs, state = jax.tree.map(np.asarray, problem())
    w_i, w_h, bias = params.input_kernel[:, 0].T, np.array(params.recurrent_kernel[:, 0].T), params.bias[0]
    w_h[2:, :2] = w_h[4:, :4] = 0
    last, ys = CELL.unroll(params, xs, state)
    for row in range(BATCH):
        y = state.hidden[row]
        for t in range(TIME):
            due = np.repeat([t % period == 0 for period in PERIODS], 2)
            y = np.where(due, np.tanh(w_h @ y + w_i @ xs[row, t] + bias), y)
            np.testing.assert_allclose(ys[row, t], y, atol=1e-12)
        np.testing.assert_allclose(last.hidden[row], y, atol=1e-12)
    assert last.clock.tolist() == [TIME, TIME]


def value_and_gradients(reverse, mask, clock):
    def loss(params, xs, hidden):
        state, ys = CELL.unroll(params, xs, js.ClockworkState(hidden, clock), mask=mask, reverse=reverse)
        return jnp.sum(ys * jnp.cos(jnp.arange(ys.size)).reshape(ys.shape)) + jnp.sum(state.hidden**2), (state, ys)

    params, xs, state = problem()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, xs, state.hidden)


@pytest.mark.parametrize("clock", [[0, 0], [6, 12], [0, 3], [4, 4]], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_groups_one_by_one_are_all_step_by_step(reverse, clock):
    """A mask, of which nothing is off, makes it go step by step."""
    clock = jnp.array(clock, jnp.int32)
    ours = value_and_gradients(reverse, None, clock)
    expected = value_and_gradients(reverse, jnp.ones((BATCH, TIME), bool), clock)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), ours, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["by group", "by step"])
@pytest.mark.parametrize("cell", [CELL, js.ClockworkRNN(3, 6, periods=(1, 2**30 - 1))], ids=["small", "large"])
def test_the_clock_goes_round_in_phase(cell, masked):
    """From 6 steps before the last multiple of all periods below 2^31, on which all groups update."""
    params, xs, state = problem()
    common = math.lcm(*cell.periods)
    clock = (2**31 - 1) // common * common - 6
    mask = jnp.ones((BATCH, TIME), bool) if masked else None
    last, ys = cell.unroll(params, xs, state._replace(clock=jnp.full(BATCH, clock, jnp.int32)), mask=mask)
    assert last.clock.tolist() == [TIME - 6] * BATCH
    hidden = state.hidden
    for t in range(TIME):
        now = jnp.full(BATCH, (clock + t) % common, jnp.int32)
        hidden = cell.step(params, js.ClockworkState(hidden, now), xs[:, t])[0].hidden
        np.testing.assert_allclose(ys[:, t], hidden, atol=1e-11)


def test_periods_have_a_common_multiple_that_the_clock_holds():
    with pytest.raises(ValueError, match=r"least common multiple of \(1, 65536, 65537\) is 4295032832, which needs"):
        js.ClockworkRNN(2, 6, periods=(1, 65536, 65537))


def test_resting_groups_are_skipped():
    """From clock 0 each group has a loop over its own steps: 13, 7 and 3 of them."""
    params, xs, _ = problem()
    jaxpr = str(jax.make_jaxpr(CELL.unroll)(params, xs))
    for length, what in ((13, "the fastest, or all"), (7, "the middle"), (3, "the slowest")):
        assert f"length={length}" in jaxpr, what


def test_a_step_after_an_unroll_goes_on_with_its_clock():
    params, xs, _ = problem()
    _, whole = CELL.unroll(params, xs)
    state, _ = CELL.unroll(params, xs[:, :7])
    for t in range(7, TIME):
        state, y = CELL.step(params, state, xs[:, t])
        np.testing.assert_allclose(y, whole[:, t], atol=1e-12)


def test_a_slow_group_reads_no_faster_one_and_rests():
    params, xs, _ = problem()
    _, ys = CELL.unroll(params, xs)
    np.testing.assert_array_equal(np.ptp(ys[:, 6:12, 4:], axis=1), 0)
    assert (np.ptp(ys[:, 6:12, :4], axis=1) > 0).all()

    def slowest(kernel):
        return CELL.unroll(params._replace(recurrent_kernel=kernel), xs)[1][..., 4:].sum()

    gradient = jax.grad(slowest)(params.recurrent_kernel)
    assert not gradient[:4].any() and gradient[4:, :, 4:].all()


def test_the_kernel_starts_as_it_is_read_with_columns_of_norm_1():
    kernel = CELL.init(jax.random.key(0)).recurrent_kernel[:, 0]
    assert not kernel[:4, 4:].any() and not kernel[:2, 2:].any()
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize("periods", [(), (0, 1), (2, 2), (4, 2), (1.0, 2.0), 2, (True, 2)], ids=str)
def test_periods_increase(periods):
    with pytest.raises(ValueError, match="ClockworkRNN needs increasing periods of at least 1 step"):
        js.ClockworkRNN(2, 4, periods=periods)


def test_groups_are_of_one_size():
    with pytest.raises(ValueError, match="ClockworkRNN needs groups of one size: 4 do not divide 6"):
        js.ClockworkRNN(2, 6)


def test_under_a_mesh_with_explicit_axes():
    params, xs, _ = problem()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(xs, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        state, ys = CELL.unroll(params, sharded)
    expected = CELL.unroll(params, xs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), (state, ys), expected)
