"""The series, against other ways to compute them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from jaxseq.reservoirs import mackey_glass, narma

pytestmark = pytest.mark.usefixtures("float64")


def test_mackey_glass_is_what_scipy_integrates():
    """While the delayed value is the constant start the solution is an exponential, and after it the past is known."""
    start, delay = 0.9, 17
    level = 2 * start / (1 + start**10)

    def first(t):
        return level + (start - level) * np.exp(-0.1 * t)

    def slope(t, x):
        past = first(t - delay)
        return 0.2 * past / (1 + past**10) - 0.1 * x

    times = np.arange(34)
    second = scipy.integrate.solve_ivp(slope, (17, 34), [first(17)], t_eval=np.arange(17, 34), rtol=1e-11, atol=1e-12)
    expected = np.concatenate([first(times[:17]), second.y[0]])
    found = mackey_glass(34, start=start, discard=0)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-9)


def test_mackey_glass_is_of_order_4():
    """Twice the steps, a 16th of the error, over all kinks that the constant past leaves behind."""
    exact = mackey_glass(60, discard=0, resolution=64)
    errors = [np.abs(mackey_glass(60, discard=0, resolution=steps) - exact).max() for steps in (4, 8, 16)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(slopes, 4, atol=0.2)


def test_mackey_glass_options():
    series = mackey_glass(50, discard=0)
    np.testing.assert_array_equal(mackey_glass(20, discard=30), series[30:])
    several = jax.vmap(lambda start: mackey_glass(5, start=start, discard=2, delay=30))(jnp.array([0.5, 1.2]))
    np.testing.assert_allclose(several[1], mackey_glass(5, discard=2, delay=30), rtol=1e-12)
    assert mackey_glass(0).shape == (0, 1)
    long = mackey_glass(3000)  # its range, as published in many plots
    assert 0.2 < long.min() < 0.5 and 1.2 < long.max() < 1.4
    with pytest.raises(ValueError, match="a delay of two or more steps of 1/10, got 17.05"):
        mackey_glass(5, delay=17.05)
    with pytest.raises(ValueError, match="a delay of two or more steps of 1/10, got nan"):
        mackey_glass(5, delay=float("nan"))
    with pytest.raises(ValueError, match=r"one number as start, got float64\[2\]: vmap gives several"):
        mackey_glass(5, start=jnp.ones(2))
    with pytest.raises(ValueError, match="needs length >= 0, discard >= 0 and resolution >= 1, got -1, 0, 10"):
        mackey_glass(-1, discard=0)


@pytest.mark.parametrize("order", [1, 10])
def test_narma_by_a_loop(order):
    xs = np.random.default_rng(0).uniform(0, 0.5, size=(3, 40, 1))
    expected = np.zeros((3, 41))
    for row in range(3):
        for t in range(40):
            recent = sum(expected[row, t - i] for i in range(order) if t - i >= 0)
            old = xs[row, t - order + 1, 0] if t - order + 1 >= 0 else 0.0
            y = expected[row, t]
            expected[row, t + 1] = 0.3 * y + 0.05 * y * recent + 1.5 * old * xs[row, t, 0] + 0.1
    np.testing.assert_allclose(narma(xs, order)[..., 0], expected[:, 1:], rtol=1e-12)
    assert narma(xs[:, :0]).shape == (3, 0, 1)


def test_narma_errors():
    with pytest.raises(ValueError, match=r"needs inputs \[\*batch, time, 1\], got \(5, 2\)"):
        narma(jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="order >= 1, got 0"):
        narma(jnp.ones((5, 1)), 0)
    with pytest.raises(TypeError, match=r"needs floating inputs, got int64\[5,1\]: cast them with .astype"):
        narma(jnp.ones((5, 1), int))


@pytest.mark.parametrize("spec", [("data",), (None, "data")])
def test_narma_of_sharded_inputs(spec):
    xs = np.random.default_rng(0).uniform(0, 0.5, size=(2, 4, 1))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        given = jax.device_put(xs, jax.NamedSharding(mesh, jax.P(*spec)))
        np.testing.assert_allclose(narma(given, 2), narma(xs, 2), rtol=1e-12)
