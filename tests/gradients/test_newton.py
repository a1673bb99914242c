"""The parallel unroll equals the sequential one, in values and gradients, whether it converges or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.gradients.affine import affine_scan
from jaxseq.gradients.newton import newton_unroll
from tests.test_laws import assert_same, with_gradients
from tests.zoo import RunningMean

ROWS, TIME = 3, 20

pytestmark = pytest.mark.usefixtures("float64")


CELLS = {
    "lstm": js.LSTM(2, 3),
    "gru": js.GRU(2, 3),
    "stack": js.Stack((js.GRU(2, 3), js.Dropout(0.5), js.ProjectedLSTM(3, 3, 2), js.Dense(2, 2))),
}


def problem(cell, scale=1.0):
    """Params, inputs and a state; and a mask, resets and a key."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = jax.tree.map(lambda leaf: scale * leaf, cell.init(keys[0]))
    state = jax.tree.map(lambda leaf: leaf + 0.3, cell.initial_state(params, (ROWS,)))
    mask = jax.random.bernoulli(keys[2], 0.8, (ROWS, TIME))
    reset = jax.random.bernoulli(keys[3], 0.1, (ROWS, TIME))
    options = {"mask": mask, "reset": reset, "key": keys[3]}
    return (params, jax.random.normal(keys[1], (ROWS, TIME, 2)), state), options


def parallel(cell, *args, **options):
    return newton_unroll(cell, *args, **options)[:2]


@pytest.mark.parametrize("method", ["newton", pytest.param("quasi", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["lstm", pytest.param("gru", marks=pytest.mark.slow), pytest.param("stack", marks=pytest.mark.slow)]
)
def test_equals_unroll(name, method):
    cell = CELLS[name]
    args, options = problem(cell)
    run = functools.partial(with_gradients, functools.partial(parallel, cell, method=method))
    assert_same(jax.jit(run)(*args, **options), with_gradients(cell.unroll, *args, **options), 1e-9)
    info = newton_unroll(cell, *args, method=method, **options)[2]
    assert info.converged and 1 < info.iterations < TIME and info.residual < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("method", ["newton", "quasi"])
def test_without_convergence_the_loop_takes_over(method):
    cell = js.Elman(2, 3)
    args, options = problem(cell, scale=3.0)
    run = functools.partial(with_gradients, functools.partial(parallel, cell, method=method, max_iterations=1))
    assert_same(jax.jit(run)(*args, **options), with_gradients(cell.unroll, *args, **options), 1e-9)
    info = newton_unroll(cell, *args, method=method, max_iterations=1, **options)[2]
    assert not info.converged and info.iterations == 1 and info.residual > 1e-3


def test_no_recurrence_takes_more_iterations_than_steps():
    cell = js.Elman(2, 3)
    args, _ = problem(cell, scale=6.0)
    for damping in (0.0, 0.5, 1.0):
        _, ys, info = newton_unroll(cell, *args, damping=damping)
        assert info.converged and info.iterations <= TIME
        np.testing.assert_allclose(ys, cell.unroll(*args)[1], atol=1e-9)
    assert info.iterations >= TIME - 1  # without Jacobians an iteration makes one more state exact


def test_large_rows_and_units_hide_no_error_of_small_ones():
    cell = js.Stack((js.Elman(1, 1, activation="identity"), js.Elman(1, 8)))
    params = jax.tree.map(lambda leaf: 2 * leaf, cell.init(jax.random.key(0)))
    params = (params[0]._replace(recurrent_kernel=jnp.full((1, 1, 1), 0.9)), params[1])
    x = jax.random.normal(jax.random.key(1), (30, 1))
    xs = jnp.stack([x, x * 1e6])
    _, ys, info = newton_unroll(cell, params, xs, tolerance=1e-4)
    assert info.converged
    np.testing.assert_allclose(ys, cell.unroll(params, xs)[1], atol=1e-2)


def test_large_gradients_hide_no_error_of_small_ones():
    cell = js.Elman(1, 3)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 30, 1))
    xs = xs.at[1].add(5)  # the second row saturates: its equations are solved in fewer iterations
    weights = jnp.array([1.0, 1e10])[:, None, None]

    def slopes(unroll):
        return jax.grad(lambda xs: jnp.sum(weights * unroll(params, xs)[1]))(xs)

    found = slopes(functools.partial(parallel, cell, method="quasi"))
    np.testing.assert_allclose(found[0], slopes(cell.unroll)[0], rtol=0, atol=1e-9)


def test_no_batch_length_0_and_float32():
    cell = js.GRU(2, 3)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cell.init(jax.random.key(0)))
    xs = jax.random.normal(jax.random.key(1), (30, 2), jnp.float32)
    state, ys, info = newton_unroll(cell, params, xs)
    assert info.converged and ys.dtype == jnp.float32
    np.testing.assert_allclose(ys, cell.unroll(params, xs)[1], atol=1e-5)
    state, ys, info = newton_unroll(cell, params, xs[:0])
    assert ys.shape == (0, 3) and not state.hidden.any() and info.converged


def test_a_reset_discards_a_state_that_is_not_finite():
    cell = js.Elman(2, 3)
    (params, xs, state), _ = problem(cell)
    reset = jnp.zeros((ROWS, TIME), bool).at[:, 0].set(True)
    state = state._replace(hidden=state.hidden.at[1].set(jnp.nan))
    _, ys, info = newton_unroll(cell, params, xs, state, reset=reset, method="quasi")
    assert info.converged and info.iterations <= TIME
    np.testing.assert_allclose(ys, cell.unroll(params, xs)[1], atol=1e-9)


@pytest.mark.slow
def test_second_derivatives():
    cell = js.Elman(1, 2)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 1))

    def loss(unroll, kernel):
        return jnp.sum(unroll(params._replace(recurrent_kernel=kernel), xs)[1] ** 3)

    hessians = [
        jax.hessian(functools.partial(loss, unroll))(params.recurrent_kernel)
        for unroll in (cell.unroll, functools.partial(parallel, cell))
    ]
    np.testing.assert_allclose(hessians[1], hessians[0], atol=1e-9)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_affine_scan_is_a_loop(dense, transposed):
    a = np.asarray(jax.random.normal(jax.random.key(0), (5, 2, 3, 3)))
    b = np.asarray(jax.random.normal(jax.random.key(1), (5, 2, 3)))
    a = a if dense else a * np.eye(3)
    d, expected = np.zeros((2, 3)), np.zeros_like(b)
    for t in reversed(range(5)) if transposed else range(5):
        matrix = a[t] if not transposed else np.swapaxes(a[t + 1], -1, -2) if t < 4 else 0 * a[0]
        d = np.einsum("bij,bj->bi", matrix, d) + b[t]
        expected[t] = d
    given = a if dense else np.einsum("tbii->tbi", a)
    np.testing.assert_allclose(affine_scan(jnp.array(given), jnp.array(b), transposed=transposed), expected, atol=1e-9)


def test_errors():
    cell = js.Elman(2, 3)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="""method of newton_unroll is "newton" or "quasi", got 'full'"""):
        newton_unroll(cell, params, xs, method="full")
    with pytest.raises(ValueError, match="newton_unroll needs 0 <= damping <= 1, got 2.0"):
        newton_unroll(cell, params, xs, damping=2)
    with pytest.raises(ValueError, match="newton_unroll needs max_iterations >= 1, got 0"):
        newton_unroll(cell, params, xs, max_iterations=0)
    mean = RunningMean()
    inputs = {"token": jnp.ones(4, int), "vector": jnp.ones((4, 2))}
    with pytest.raises(TypeError, match=r"RunningMean\(\) holds other than floating numbers.*Use unroll"):
        newton_unroll(mean, mean.init(jax.random.key(0)), inputs)
