"""Diagnostics against closed forms, published figures, and derivatives written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq import diagnostics
from jaxseq.gradients.flow import stable_norm

pytestmark = pytest.mark.usefixtures("float64")


class Henon(js.Cell):
    """x' = 1 - 1.4 x^2 + y, y' = 0.3 x, and how often it was computed."""

    input_rank = None

    def init(self, key):
        return jnp.array([1.4, 0.3])

    def initial_state(self, params, batch_shape=()):
        return {"xy": jnp.full((*batch_shape, 2), 0.1, params.dtype), "count": jnp.zeros(batch_shape, int)}

    def step(self, params, state, x, key=None):
        x, y = state["xy"][..., 0], state["xy"][..., 1]
        xy = jnp.stack([1 - params[0] * x**2 + y, params[1] * x], axis=-1)
        return {"xy": xy, "count": state["count"] + 1}, xy


def elman(size=3, seed=0, activation="tanh"):
    cell = js.Elman(2, size, activation=activation)
    return cell, cell.init(jax.random.key(seed))


def test_state_gradients_of_a_stack_are_total_derivatives():
    """Written out for two Elman layers and a dense one: each gradient passes up, out and on."""
    lower, upper, top = js.Elman(2, 3), js.Elman(3, 4), js.Dense(4, 2)
    cell = js.Stack((lower, upper, top))
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (6, 2))
    weights = np.cos(np.arange(12.0)).reshape(6, 2)
    found = diagnostics.state_gradients(cell, params, xs, lambda ys: jnp.sum(ys * weights))

    (w1, r1, _), (w2, r2, _) = (jax.tree.map(np.asarray, p) for p in params[:2])
    w1, r1, w2, r2, v = w1[:, 0], r1[:, 0], w2[:, 0], r2[:, 0], np.asarray(params[2].kernel)
    h1, h2 = [np.zeros(3)], [np.zeros(4)]
    for x in np.asarray(xs):
        h1.append(np.tanh(x @ w1 + h1[-1] @ r1))
        h2.append(np.tanh(h1[-1] @ w2 + h2[-1] @ r2))
    g1, g2 = [np.zeros(3)], [np.zeros(4)]
    for t in reversed(range(6)):
        after = 1 - h2[t + 2] ** 2 if t < 5 else np.zeros(4)
        g2.insert(0, weights[t] @ v.T + (g2[0] * after) @ r2.T)
        after = 1 - h1[t + 2] ** 2 if t < 5 else np.zeros(3)
        g1.insert(0, (g2[0] * (1 - h2[t + 1] ** 2)) @ w2.T + (g1[0] * after) @ r1.T)
    np.testing.assert_allclose(found[0], g1[:-1], atol=1e-12)
    np.testing.assert_allclose(found[1], g2[:-1], atol=1e-12)
    norms = np.sqrt(np.sum(np.square(g1[:-1]), 1) + np.sum(np.square(g2[:-1]), 1))
    flow = diagnostics.gradient_flow(cell, params, xs, lambda ys: jnp.sum(ys * weights))
    np.testing.assert_allclose(flow, norms, rtol=1e-10)


@pytest.mark.parametrize("cell", [js.LRU(2, 3), js.S5(2, 6)])
def test_state_gradients_of_complex_units(cell):
    """h' = a h + b x, y = Re(c h) + d x: dL/dh_t = c w_t + a dL/dh_(t+1), the parts of the conjugate."""
    params = cell.init(jax.random.key(0))
    xs, weights = jax.random.normal(jax.random.key(1), (2, 5, 2))
    real, imag = diagnostics.state_gradients(cell, params, xs, lambda ys: jnp.sum(ys * weights))
    decay = np.asarray(cell.discretize(params)[0])
    output = np.asarray(params.output_kernel[:, 0] + 1j * params.output_kernel[:, 1])
    output = output * (2 if isinstance(cell, js.S5) else 1)
    gradient = np.zeros(decay.shape, complex)
    for t in reversed(range(5)):
        gradient = output @ np.asarray(weights[t]) + decay * gradient
        np.testing.assert_allclose(real[t] - 1j * imag[t], gradient, atol=1e-12)


def test_gradient_flow_of_batches_masks_and_resets():
    cell, params = elman()
    xs = jax.random.normal(jax.random.key(1), (2, 6, 2))
    mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]], bool)
    reset = jnp.zeros((2, 6), bool).at[0, 3].set(True)

    def loss(ys):
        return jnp.sum(ys**2)

    flow = np.asarray(diagnostics.gradient_flow(cell, params, xs, loss, mask=mask, reset=reset))
    parts = [
        diagnostics.gradient_flow(cell, params, xs[0, :3], loss),
        diagnostics.gradient_flow(cell, params, xs[0, 3:], loss),
    ]
    np.testing.assert_allclose(flow[0], np.concatenate(parts), rtol=1e-12)
    short = diagnostics.gradient_flow(cell, params, xs[1, jnp.array([0, 1, 3])], loss)
    np.testing.assert_allclose(flow[1], [short[0], short[1], 0, short[2], 0, 0], rtol=1e-12)


def test_gradient_flow_counts_what_no_square_can_hold():
    cell = js.Elman(1, 2, activation="identity")
    params = js.initializers.identity(cell, cell.init(jax.random.key(0)), scale=1e-3)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    flow = diagnostics.gradient_flow(cell, params, jnp.zeros((11, 1), jnp.float32), lambda ys: ys[-1, 0])
    np.testing.assert_allclose(flow, 1e-3 ** np.arange(10.0, -1, -1), rtol=1e-5)


def test_gradient_flow_of_an_explosion_is_not_0():
    cell = js.Elman(1, 2, activation="identity")
    params = js.initializers.identity(cell, cell.init(jax.random.key(0)), scale=1e200)
    flow = diagnostics.gradient_flow(cell, params, jnp.zeros((4, 1)), lambda ys: ys[-1].sum())
    assert jnp.isfinite(flow).tolist() == [False, False, True, True]
    vectors = jnp.array([[jnp.nan, 1.0], [jnp.inf, 1.0], [3e200, 4e200], [0.0, 0.0]])
    np.testing.assert_allclose(stable_norm(vectors), [jnp.nan, jnp.inf, 5e200, 0.0])


def test_singular_values_are_those_of_the_jacobians():
    cell, params = elman()
    xs = jax.random.normal(jax.random.key(1), (2, 5, 2))
    mask, reset = jnp.ones((2, 5), bool).at[0, 2].set(False), jnp.zeros((2, 5), bool).at[1, 4].set(True)
    found = diagnostics.jacobian_singular_values(cell, params, xs, mask=mask, reset=reset)
    hidden, kernel = np.zeros((2, 3)), np.asarray(params.recurrent_kernel[:, 0])
    for row in range(2):
        product = np.eye(3)
        for t in range(5):
            hidden[row] = 0 if reset[row, t] else hidden[row]
            new = np.tanh(xs[row, t] @ params.input_kernel[:, 0] + hidden[row] @ kernel)
            local = np.diag(1 - new**2) @ kernel.T * (0 if reset[row, t] else 1)
            if not mask[row, t]:
                new, local = hidden[row], np.eye(3)
            hidden[row], product = new, local @ product
            np.testing.assert_allclose(found.step[row, t], np.linalg.svd(local)[1], atol=1e-12)
            np.testing.assert_allclose(found.product[row, t], np.linalg.svd(product)[1], atol=1e-12)


def test_lyapunov_exponents_of_the_henon_map():
    """0.419 and -1.623 (J. C. Sprott, Chaos and Time-Series Analysis, 2003); their sum is ln 0.3."""
    cell = Henon()
    exponents = diagnostics.lyapunov_exponents(cell, cell.init(None), None, length=20000, discard=100)
    np.testing.assert_allclose(exponents, [0.419, -1.623], atol=0.01)
    np.testing.assert_allclose(exponents.sum(), np.log(0.3), atol=1e-9)
    largest = diagnostics.lyapunov_exponents(cell, cell.init(None), None, length=20000, discard=100, count=1)
    np.testing.assert_allclose(largest, exponents[:1], atol=1e-9)


def test_lyapunov_exponents_of_a_linear_map_are_logs_of_its_eigenvalues():
    cell, params = elman(activation="identity")
    values = np.linalg.eigvals(np.asarray([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0], [0.0, 0.0, 0.1]]))
    kernel = jnp.array([[2.0, 1.0, 0.0], [0.0, 0.5, 3.0], [0.0, 0.0, 0.1]])[:, None]
    params = params._replace(recurrent_kernel=kernel)
    exponents = diagnostics.lyapunov_exponents(cell, params, jnp.zeros((2, 200, 2)), discard=100)
    np.testing.assert_allclose(exponents, np.broadcast_to(np.log(np.sort(np.abs(values))[::-1]), (2, 3)), atol=1e-6)


def test_lyapunov_exponents_of_a_diagonal_map_are_logs_of_its_entries():
    """The first axis is an eigenvector, and not that of the largest exponent."""
    cell = js.Elman(1, 2, activation="identity")
    params = cell.init(jax.random.key(0))._replace(recurrent_kernel=jnp.diag(jnp.array([0.1, 2.0]))[:, None])
    exponents = diagnostics.lyapunov_exponents(cell, params, jnp.zeros((60, 1)), count=1, discard=40)
    np.testing.assert_allclose(exponents, [np.log(2)], atol=1e-9)


def test_bfloat16():
    cell = js.Elman(1, 2, activation="identity")
    params = js.initializers.identity(cell, cell.init(jax.random.key(0)), scale=0.5)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    xs = jnp.zeros((3, 4, 1), jnp.bfloat16)
    np.testing.assert_allclose(
        diagnostics.lyapunov_exponents(cell, params, xs), np.full((3, 2), np.log(0.5)), atol=1e-2
    )
    found = diagnostics.jacobian_singular_values(cell, params, xs[0])
    np.testing.assert_allclose(found.product[:, 0], 0.5 ** np.arange(1, 5), rtol=1e-2)


def test_fixed_points_of_three_units_are_all_found():
    """h = tanh(g h) of independent units: 0 and two others for g > 1, 0 alone for g < 1; the Jacobian is diagonal."""
    cell, params = elman()
    gains = jnp.array([2.0, 1.5, 0.5])
    params = params._replace(recurrent_kernel=jnp.diag(gains)[:, None], bias=jnp.zeros((1, 3)))
    starts = js.ElmanState(jax.random.uniform(jax.random.key(0), (60, 3), minval=-1, maxval=1))
    found = diagnostics.fixed_points(cell, params, jnp.zeros(2), starts)
    first = np.round(found.state.hidden, 4) + 0.0
    assert len(first) == len(np.unique(first, axis=0)) == 9
    np.testing.assert_allclose(np.tanh(found.state.hidden * gains), found.state.hidden, atol=1e-4)
    slopes = np.asarray(gains) * (1 - found.state.hidden**2)
    np.testing.assert_allclose(np.sort(found.eigenvalues.real), np.sort(slopes), atol=1e-3)
    assert (found.speed <= 1e-8).all() and 9 <= found.starts.sum() <= 60


def test_errors():
    cell, params = elman()
    with pytest.raises(TypeError, match=r"state of Map.* has no floating numbers, and so no gradients"):
        diagnostics.gradient_flow(js.Map("tanh"), (), jnp.ones((3, 2)), jnp.sum)
    with pytest.raises(ValueError, match=r"has 3 Lyapunov exponents: count is from 1 to 3, got 4"):
        diagnostics.lyapunov_exponents(cell, params, jnp.ones((5, 2)), count=4)
    with pytest.raises(ValueError, match="needs 0 <= discard < 5, the number of steps, got 5"):
        diagnostics.lyapunov_exponents(cell, params, jnp.ones((5, 2)), discard=5)
    with pytest.raises(ValueError, match="got a state.*of shape"):
        diagnostics.fixed_points(cell, params, jnp.ones(2), js.ElmanState(jnp.ones((5, 4))))


def at_the_start(name, size):
    """A cell of 8 one-hot symbols and its initialiser."""

    def initial(key):
        first, second = jax.random.split(key)
        params = cell.init(first)
        if name == "uniform":
            return js.initializers.uniform(cell, params, second)
        if name == "identity":
            return js.initializers.identity(cell, params)
        return js.initializers.forget_bias(cell, params, 0.0) if name == "forget 0" else params

    cell = (
        js.LSTM(8, size)
        if name.startswith("forget")
        else js.Elman(8, size, activation="relu" if name == "identity" else "tanh")
    )
    return cell, initial


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 100])
def test_gradients_at_the_start_order_as_the_textbooks_say(size):
    """T = 60: how much of the gradient at the last step is left at the first, median of 5 seeds, each 3x the last."""

    @functools.partial(jax.jit, static_argnums=0)
    def kept(name, key):
        cell, initial = at_the_start(name, size)
        keys = jax.random.split(key, 3)
        xs = jax.nn.one_hot(jax.random.randint(keys[0], (60,), 0, 8), 8)
        weights = jax.random.normal(keys[1], (size,))
        flow = diagnostics.gradient_flow(cell, initial(keys[2]), xs, lambda ys: ys[-1] @ weights)
        return flow[0] / flow[-1]

    names = ("uniform", "forget 0", "orthogonal", "forget 1", "identity")
    median = {n: np.median([kept(n, jax.random.key(seed)) for seed in range(5)]) for n in names}
    assert median["forget 0"] >= 3 * median["uniform"] > 0
    assert min(median["orthogonal"], median["forget 1"]) >= 3 * median["forget 0"]
    assert median["identity"] >= 3 * max(median["orthogonal"], median["forget 1"])


def test_plots_draw_what_diagnostics_give():
    pytest.importorskip("matplotlib")
    cell = js.LSTM(2, 3)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 8, 2))
    flow = diagnostics.gradient_flow(cell, params, xs, lambda ys: ys[:, 3].sum())
    figure = js.plots.gradient_flow({"LSTM": flow})
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), np.median(flow, axis=0)[:4])
    values = diagnostics.jacobian_singular_values(cell, params, xs[0])
    lines = js.plots.jacobian_singular_values(values).axes[1].lines
    np.testing.assert_allclose(lines[0].get_ydata(), values.product[:, 0])
    assert len(lines) == 7  # six units, and the line at 1
    exponents = diagnostics.lyapunov_exponents(cell, params, xs)
    figure = js.plots.lyapunov_exponents({"LSTM": exponents})
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), np.mean(exponents, axis=0), rtol=1e-6)
    starts = jax.tree.map(lambda leaf: leaf[0], js.States(cell).unroll(params, xs)[1][0])
    found = diagnostics.fixed_points(cell, params, jnp.zeros(2), starts)
    states = js.States(cell).unroll(params, xs)[1][0]
    figure = js.plots.fixed_points(found, states)
    assert len(figure.axes[0].lines) == 4 and js.plots.png(figure)[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no fixed point to draw"):
        js.plots.fixed_points(jax.tree.map(lambda leaf: leaf[:0], found))
