"""The moving average against a loop over the last inputs of each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

BATCH, TIME = 3, 11
RANDOM = np.random.default_rng(0)
XS = RANDOM.normal(size=(BATCH, TIME, 2)).astype(np.float32)
MASK, RESET = RANDOM.random((BATCH, TIME)) < 0.7, RANDOM.random((BATCH, TIME)) < 0.2


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 30])
def test_moving_average_is_the_mean_of_the_last_inputs(window):
    expected = np.zeros_like(XS)
    for row in range(BATCH):
        seen = []
        for t in range(TIME):
            seen = [] if RESET[row, t] else seen
            if MASK[row, t]:
                seen.append(XS[row, t])
                expected[row, t] = np.mean(seen[-window:], axis=0)
    cell = js.MovingAverage(2, window)
    _, ys = cell.unroll((), XS, mask=MASK, reset=RESET)
    np.testing.assert_allclose(ys, expected, atol=1e-5)
    assert RESET.any() and not MASK.all()
    _, plain = cell.unroll((), XS)
    np.testing.assert_allclose(plain[:, -1], XS[:, -window:].mean(axis=1), atol=1e-5)


def test_it_is_computed_without_a_loop_over_time():
    cell = js.MovingAverage(2, 4)

    def loss(xs):
        return jnp.sum(jnp.cos(cell.unroll((), xs, mask=MASK, reset=RESET)[1]))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(XS))
    assert "scan[" not in jaxpr and "while[" not in jaxpr


def test_an_infinite_input_leaves_the_window():
    """As it would not leave a difference of two running sums."""
    xs = jnp.array([[1.0], [jnp.inf], [3.0], [5.0]])
    assert js.MovingAverage(1, 2).unroll((), xs)[1][:, 0].tolist() == [1, np.inf, np.inf, 4]


def test_it_takes_the_dtype_of_its_inputs():
    cell = js.Stack((js.Dense(2, 2), js.MovingAverage(2, 3)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), cell.init(jax.random.key(0)))
    state, ys = cell.unroll(params, jnp.asarray(XS, jnp.bfloat16))
    assert ys.dtype == jnp.bfloat16 and state[1].inputs.dtype == jnp.float32


def test_errors_of_averages():
    with pytest.raises(ValueError, match="window of at least one step, got 0"):
        js.MovingAverage(2, 0)
    with pytest.raises(TypeError, match="needs floating inputs, got int32"):
        js.MovingAverage(2, 3).step((), js.MovingAverage(2, 3).initial_state(()), jnp.arange(2))
