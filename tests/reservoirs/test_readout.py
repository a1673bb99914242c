"""The readout: exact, in one pass and little memory, with derivatives."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.reservoirs import echo_state_conditions, fit_readout

ROWS, TIME, UNITS = 3, 60, 10
MODEL = js.Stack((js.Skip(js.Reservoir(2, UNITS, leak=0.7, bias_scale=0.3)), js.Dense(2 + UNITS, 2)))

pytestmark = pytest.mark.usefixtures("float64")


def problem(seed=0, time=TIME):
    random = np.random.default_rng(seed)
    xs = random.normal(size=(ROWS, time, 2))
    targets = np.stack([np.roll(xs[..., 0], 1, -1) + 3, xs[..., 0] * xs[..., 1]], axis=-1)
    return MODEL.init(jax.random.key(seed)), xs, targets + 0.1 * random.normal(size=targets.shape)


def by_normal_equations(features, targets, weights, ridge):
    """Kernel and bias of all rows with a weight, by sums of centred rows."""
    features, targets, weights = (np.asarray(a).reshape(weights.size, -1) for a in (features, targets, weights))
    features, targets, weights = (a[weights[:, 0] > 0] for a in (features, targets, weights))
    center = [(weights * a).sum(axis=0) / weights.sum() for a in (features, targets)]
    a, b = features - center[0], targets - center[1]
    kernel = np.linalg.solve(a.T @ (weights * a) + ridge * np.eye(a.shape[-1]), a.T @ (weights * b))
    return kernel, center[1] - center[0] @ kernel


def counted(mask, reset, washout):
    """Where more than `washout` steps were read since the start or the last reset, step by step."""
    counts = np.zeros(mask.shape, bool)
    for row in range(len(mask)):
        read = 0
        for time in range(mask.shape[1]):
            read = 0 if reset[row, time] else read
            read += mask[row, time]
            counts[row, time] = mask[row, time] and read > washout
    return counts


def assert_close(fitted, expected, tolerance=1e-9):
    for a, e in zip(fitted, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1, np.abs(e).max()))


@hypothesis.settings(deadline=None, derandomize=True, max_examples=15)
@hypothesis.given(
    seed=st.integers(0, 1000),
    washout=st.integers(0, 4),
    ridge=st.sampled_from([0.0, 1e-8, 1e-2, 100.0]),
    weighted=st.booleans(),
)
def test_equals_the_normal_equations_with_gaps_resets_weights_and_washout(seed, washout, ridge, weighted):
    params, xs, targets = problem(seed)
    random = np.random.default_rng(seed)
    mask, reset = random.random((ROWS, TIME)) < 0.8, random.random((ROWS, TIME)) < 0.08
    weights = random.random((ROWS, TIME)) * (random.random((ROWS, TIME)) < 0.8) if weighted else np.ones((ROWS, TIME))
    features = MODEL.layers[0].unroll(params[0], xs, mask=mask, reset=reset)[1]
    expected = by_normal_equations(features, targets, weights * counted(mask, reset, washout), ridge)
    spoilt = np.where(mask[..., None], xs, np.nan), np.where(mask[..., None], targets, np.nan)
    fitted = fit_readout(MODEL, params, *spoilt, ridge=ridge, washout=washout, weights=weights, mask=mask, reset=reset)
    assert jax.tree.structure(fitted) == jax.tree.structure(params)
    assert fitted[0] is params[0] or jax.tree.all(jax.tree.map(np.array_equal, fitted[0], params[0]))
    assert_close(fitted[-1], expected)


def test_chunks_and_batches_change_nothing():
    """Long sequences, of which the last chunk is short, without batch axes and with two; a state to start from."""
    params, xs, targets = problem(time=411)
    state = MODEL.unroll(params, xs[:, ::-1])[0]
    features = MODEL.layers[0].unroll(params[0], xs, state[0])[1]
    expected = by_normal_equations(features, targets, np.ones((ROWS, 411)), 0.01)
    assert_close(fit_readout(MODEL, params, xs, targets, state, ridge=0.01)[-1], expected)
    wide = [a[None, :, None] for a in (xs, targets)]
    wide_state = jax.tree.map(lambda leaf: leaf[None, :, None], state)
    assert_close(fit_readout(MODEL, params, *wide, wide_state, ridge=0.01)[-1], expected)
    alone = by_normal_equations(features[:1], targets[:1], np.ones((1, 411)), 0.01)
    state = jax.tree.map(lambda leaf: leaf[0], state)
    assert_close(fit_readout(MODEL, params, xs[0], targets[0], state, ridge=0.01)[-1], alone)


def test_without_ridge_it_is_lstsq_also_where_features_are_redundant():
    params, xs, targets = problem()
    same = params[0]._replace(**{name: getattr(params[0], name).at[..., 3].set(0) for name in ("input_kernel", "bias")})
    same = same._replace(recurrent_kernel=same.recurrent_kernel.at[..., 3].set(0))  # a unit that stays 0
    twice = np.concatenate([xs[..., :1]] * 2, axis=-1)  # an input twice
    model_params = (same, params[1])
    features = np.asarray(MODEL.layers[0].unroll(same, twice)[1]).reshape(-1, 2 + UNITS)
    ones = np.concatenate([np.ones_like(features[:, :1]), features], axis=-1)
    solution, _, rank, _ = np.linalg.lstsq(ones, targets.reshape(-1, 2), rcond=None)
    assert rank < ones.shape[1]
    fitted = fit_readout(MODEL, model_params, twice, targets)
    np.testing.assert_allclose(
        MODEL.unroll(fitted, twice)[1].reshape(-1, 2), ones @ solution, atol=1e-10 * np.abs(targets).max()
    )
    np.testing.assert_allclose(fitted[-1].kernel[0], fitted[-1].kernel[1], atol=1e-9)  # the shortest solution
    few = fit_readout(MODEL, params, xs[:1, :4], targets[:1, :4])  # fewer steps than features: no error
    np.testing.assert_allclose(MODEL.unroll(few, xs[:1, :4])[1], targets[:1, :4], atol=1e-9)


@pytest.mark.slow
def test_float32_loses_the_digits_of_the_condition_and_not_of_its_square():
    """Of smooth series states are nearly dependent: sums of products in float32 give no usable readout, this does."""
    model = js.Stack((js.Reservoir(1, 200, radius=0.8, bias_scale=0.2), js.Dense(200, 1)))
    series = np.sin(np.arange(1200) / 5)[:, None] * np.cos(np.arange(1200) / 23)[:, None]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.init(jax.random.key(0)))
    xs, targets = (jnp.asarray(a, jnp.float32) for a in (series[:-1], series[1:]))
    fitted = fit_readout(model, params, xs, targets, ridge=1e-8, washout=200)
    assert fitted[-1].kernel.dtype == jnp.float32
    h = model.layers[0].unroll(params[0], xs)[1][200:]
    a, b = h - h.mean(axis=0), targets[200:] - targets[200:].mean(axis=0)
    kernel = jnp.linalg.solve(a.T @ a + jnp.float32(1e-8) * jnp.eye(200, dtype=jnp.float32), a.T @ b)

    def error(kernel):  # in float64
        return float(jnp.sqrt(jnp.mean((np.asarray(a, float) @ np.asarray(kernel, float) - np.asarray(b, float)) ** 2)))

    assert error(fitted[-1].kernel) < 5e-5 < 1e-3 < error(kernel)


def arrays(jaxpr):
    """The shapes of all arrays that are made in a jaxpr and the ones inside."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("derivative", [False, True])
def test_states_are_not_stored(derivative):
    """Nothing is as large as the states of all steps; their number enters with the inputs and targets alone."""
    time, units = 3000, 36
    model = js.Stack((js.Skip(js.Reservoir(2, units)), js.Dense(2 + units, 2)))
    params = model.init(jax.random.key(0))
    xs, targets = (jax.ShapeDtypeStruct((time, 2), float),) * 2

    def fit(radius, xs, targets):
        changed = (params[0]._replace(radius=radius), params[1])
        return fit_readout(model, changed, xs, targets, ridge=0.1, washout=5)[-1].kernel.sum()

    fit = jax.grad(fit) if derivative else fit
    jaxpr = jax.make_jaxpr(fit)(0.5, xs, targets)
    assert max(math.prod(shape) for shape in arrays(jaxpr.jaxpr)) <= 2 * time < time * units
    # what grows with time is inputs, targets and flags, and a state a chunk where there is a gradient
    sizes = [
        jax.jit(fit).lower(0.5, *[jax.ShapeDtypeStruct((steps, 2), float)] * 2).compile().memory_analysis()
        for steps in (time, 2 * time)
    ]
    temporary = [size.temp_size_in_bytes for size in sizes]
    assert temporary[1] - temporary[0] < 0.2 * time * units * 8


def naive(params, xs, targets, ridge, weights):
    """The same by sums of products, for JAX to differentiate."""
    h = MODEL.layers[0].unroll(params[0], xs)[1]
    z = jnp.concatenate([jnp.ones_like(h[..., :1]), h], axis=-1).reshape(-1, 3 + UNITS)
    w = weights.reshape(-1, 1)
    penalty = ridge * jnp.eye(3 + UNITS).at[0, 0].set(0)
    solution = jnp.linalg.solve(z.T @ (w * z) + penalty, z.T @ (w * targets.reshape(-1, 2)))
    return (params[0], js.DenseParams(solution[1:], solution[0]))


@pytest.mark.slow
def test_derivatives_of_both_orders_are_those_of_the_solution():
    params, xs, targets = problem()

    def loss(fit, numbers):
        radius, leak, ridge, shift = numbers
        changed = (params[0]._replace(radius=radius, leak=leak), params[1])
        weights = 1 + shift * jnp.cos(jnp.arange(ROWS * TIME)).reshape(ROWS, TIME)
        fitted = fit(changed, xs + shift, targets * (1 + shift), ridge, weights)
        return jnp.mean((MODEL.unroll(fitted, xs[:, ::-1])[1] - targets[:, ::-1]) ** 2)

    def ours(params, xs, targets, ridge, weights):
        return fit_readout(MODEL, params, xs, targets, ridge=ridge, weights=weights)

    given = jnp.array([0.8, 0.6, 0.3, 0.1])
    for derivative in (lambda f: f, jax.grad, jax.jacfwd, jax.hessian):
        found, expected = (jax.jit(derivative(functools.partial(loss, fit)))(given) for fit in (ours, naive))
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)


def test_radius_and_leak_are_tuned_by_gradients():
    """To recall what is 4 steps old asks for another reservoir than the one that it begins with."""
    model = js.Stack((js.Reservoir(1, 20, radius=0.3, leak=0.5), js.Dense(20, 1)))
    xs = np.random.default_rng(0).uniform(-1, 1, size=(600, 1))
    params, targets = model.init(jax.random.key(0)), np.roll(xs, 4, axis=0)

    @jax.jit
    @jax.value_and_grad
    def error(numbers):
        changed = (params[0]._replace(radius=numbers[0], leak=numbers[1]), params[1])
        fitted = fit_readout(model, changed, xs[:300], targets[:300], ridge=1e-6, washout=20)
        return jnp.mean((model.unroll(fitted, xs)[1] - targets)[320:] ** 2)

    numbers = jnp.array([0.3, 0.5])
    first, _ = error(numbers)
    for _ in range(30):
        _, gradient = error(numbers)
        numbers = jnp.clip(numbers + 0.02 * jnp.sign(-gradient), 0.01, 1)
    assert error(numbers)[0] < 0.3 * first


def test_many_reservoirs_and_many_ridges_under_vmap():
    params, xs, targets = problem()
    many = jax.vmap(MODEL.init)(jax.random.split(jax.random.key(5), 3))
    fitted = jax.vmap(lambda params: fit_readout(MODEL, params, xs, targets, ridge=0.1))(many)
    for index in range(3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], many)
        assert_close(
            jax.tree.map(lambda leaf, index=index: leaf[index], fitted)[-1],
            fit_readout(MODEL, one, xs, targets, ridge=0.1)[-1],
        )
    ridges = jnp.array([0.0, 0.1, 10.0])

    def kernels(ridges):
        return jax.vmap(lambda ridge: fit_readout(MODEL, params, xs, targets, ridge=ridge)[-1].kernel)(ridges)

    for ridge, kernel in zip(ridges, kernels(ridges), strict=True):
        np.testing.assert_allclose(
            kernel, fit_readout(MODEL, params, xs, targets, ridge=ridge)[-1].kernel, rtol=1e-9, atol=1e-9
        )
    decompositions = [shape for shape in arrays(jax.make_jaxpr(kernels)(ridges).jaxpr) if shape == (3, 12, 12)]
    assert not decompositions  # one pass and one decomposition for all


@pytest.mark.parametrize(("name", "bounds"), [("tanh", (-1, 1)), ("sigmoid", (0, 1))])
def test_a_map_at_the_end_is_undone(name, bounds):
    plain = js.Stack((js.Skip(js.Reservoir(2, UNITS)), js.Dense(2 + UNITS, 2)))
    model = js.Stack((*plain.layers, js.Map(name)))
    params, xs, targets = problem()
    inside = np.array(js.Map(name).unroll((), targets)[1])
    fitted = fit_readout(model, (*params, ()), xs, inside, ridge=0.1)
    assert_close(fitted[1], fit_readout(plain, params, xs, targets, ridge=0.1)[1])
    inside[0, 3] = bounds[1]
    with pytest.raises(ValueError, match=f"finite targets between {bounds[0]}.0 and 1.0, the range of {name}"):
        fit_readout(model, (*params, ()), xs, inside)
    weights = np.ones((ROWS, TIME))
    weights[0, 3] = 0
    assert np.isfinite(fit_readout(model, (*params, ()), xs, inside, weights=weights)[1].kernel).all()
    inside[1, 2:] = np.nan
    mask = np.isfinite(inside).all(-1)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def traced(targets, params, xs):
        kernel = fit_readout(model, (*params, ()), xs, targets, ridge=jnp.asarray(0.1, targets.dtype), mask=mask)[1][0]
        return kernel.sum(), kernel

    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        given = jax.tree.map(lambda leaf, dtype=dtype: jnp.asarray(leaf, dtype), (inside, params, xs))
        for leaf in jax.tree.leaves(traced(*given)):
            assert jnp.isfinite(leaf).all()


def test_a_loop_is_fitted_open_and_runs_closed():
    """A chaotic series goes on by itself; what is fed back stands beside an input."""
    series = np.tanh(np.asarray(js.reservoirs.mackey_glass(1500)) - 1)
    xs, end = np.full((1500, 1), 0.2), 1400
    cell = js.Reservoir(2, 80, radius=0.85, leak=0.4, input_scale=(0.14, 0.56))
    model = js.Stack((js.Concatenate((1, 1)), js.Frozen(cell), js.Dense(80, 1), js.Map("tanh")))
    given = (xs[: end - 1], series[: end - 1])
    params = fit_readout(model, model.init(jax.random.key(1)), given, series[1:end], ridge=1e-9, washout=100)
    state, _ = model.unroll(params, given)
    _, forecast = js.Feedback(model).unroll(params, xs[end - 1 : -1], js.FeedbackState(state, series[end - 1]))
    assert np.abs(forecast - series[end:]).max() < 0.02 < 0.1 * np.ptp(series[end:])


LINES = js.Stack((js.Map("identity"), js.Dense(4, 1)))


@pytest.mark.parametrize("twice", [False, True])
def test_derivatives_of_the_shortest_solution(twice):
    """Of fewer rows than features, and of a feature that comes again in proportion; by differences of NumPy's."""
    random = np.random.default_rng(1)
    xs, targets = random.normal(size=(3 + 4 * twice, 4)), random.normal(size=(3 + 4 * twice, 1))
    turn, step = random.normal(size=xs.shape), random.normal(size=targets.shape)

    def problem(t):
        moved = xs + t * turn
        last = (1 + t) * moved[:, 1:2] if twice else moved[:, 3:]
        return jnp.concatenate([moved[:, :3], last], axis=1), targets + t * step

    def by_numpy(t):
        given, wanted = map(np.asarray, problem(t))
        kernel = np.linalg.lstsq(given - given.mean(0), wanted - wanted.mean(0), rcond=1e-12)[0]
        return np.append(kernel, wanted.mean(0) - given.mean(0) @ kernel)

    def ours(t):
        kernel, bias = fit_readout(LINES, LINES.init(jax.random.key(0)), *problem(t))[-1]
        return jnp.append(kernel, bias)

    np.testing.assert_allclose(ours(0.0), by_numpy(0.0), rtol=1e-10)
    expected = (by_numpy(1e-6) - by_numpy(-1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.jacrev(ours))(0.0), expected, rtol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("time", [0, 1, 5])
def test_nothing_to_fit_gives_zeros_and_finite_gradients(time, ridge):
    params, xs, targets = problem(time=max(time, 1))
    xs, targets, mask = xs[:, :time], targets[:, :time], np.zeros((ROWS, time), bool)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    def fit(params, xs, targets, weights, mask):
        readout = fit_readout(MODEL, params, xs, targets, ridge=ridge, mask=mask, weights=weights)[-1]
        return sum(map(jnp.sum, readout)), readout

    for keep in (mask, ~mask):
        (_, readout), gradients = fit(params, xs + np.where(keep, 0, np.nan)[..., None], targets, 1.0 * keep, keep)
        for leaf in jax.tree.leaves((readout, gradients)):
            assert np.isfinite(leaf).all()
        if not keep.any():
            assert not any(np.any(leaf) for leaf in readout)


@pytest.mark.slow
def test_other_cells_deep_reservoirs_and_noise():
    xs = np.random.default_rng(0).normal(size=(200, 1))
    targets = np.roll(xs, 2, axis=0)
    deep = js.Stack((js.Reservoir(1, 8), js.Skip(js.Reservoir(8, 6)), js.Dense(14, 1)))
    gated = js.Stack((js.LSTM(1, 14), js.Dense(14, 1)))
    for model in (deep, gated):
        params = model.init(jax.random.key(0))
        features = dataclasses.replace(model, layers=model.layers[:-1])
        expected = by_normal_equations(features.unroll(params[:-1], xs)[1], targets, np.ones(200), 1e-3)
        assert_close(fit_readout(model, params, xs, targets, ridge=1e-3)[-1], expected)
    noisy = js.Stack((js.Reservoir(1, 8, noise=0.5), js.Dense(8, 1)))
    params = noisy.init(jax.random.key(0))
    kernels = [fit_readout(noisy, params, xs, targets, key=key)[-1].kernel for key in (None, jax.random.key(1))]
    assert not np.allclose(*kernels)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_kept(dtype):
    params, xs, targets = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem())
    fitted = fit_readout(MODEL, params, xs, targets, ridge=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(fitted)} == {jnp.dtype(dtype)}
    wide, _, _ = problem()
    expected = fit_readout(MODEL, wide, *problem()[1:], ridge=0.1)[-1]
    assert_close(jax.tree.map(lambda leaf: np.asarray(leaf, float), fitted[-1]), expected, 0.1)


def test_no_promotion_is_implicit():
    given = problem()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        fit_readout(MODEL, *given, ridge=0.1, washout=2, mask=np.ones((ROWS, TIME), bool))


def test_errors():
    params, xs, targets = problem()
    with pytest.raises(TypeError, match=r"fits the Dense that ends a Stack.*got Reservoir\("):
        fit_readout(js.Reservoir(2, 3), params, xs, targets)
    with pytest.raises(TypeError, match="fits the Dense that ends a Stack"):
        fit_readout(js.Stack((js.Dense(2, 2),)), params, xs, targets)
    with pytest.raises(
        TypeError, match=r"knows the inverse of identity, sigmoid, tanh, but got Map\(function='relu'\)"
    ):
        fit_readout(js.Stack((*MODEL.layers, js.Map("relu"))), (*params, ()), xs, targets)
    for washout in (-1, 10.0, True):
        with pytest.raises(ValueError, match=f"a number of steps >= 0 as washout, got {washout}"):
            fit_readout(MODEL, params, xs, targets, washout=washout)
    keep = np.ones((ROWS, TIME), bool)
    with pytest.raises(
        ValueError, match=r"nothing to fit: washout 60 and the weights leave none of 60 .*targets' \(3, 60, 2\)"
    ):
        fit_readout(MODEL, params, xs, targets, washout=TIME)
    with pytest.raises(ValueError, match="nothing to fit: washout 0, the mask and the weights leave none of 60 steps"):
        fit_readout(MODEL, params, xs, targets, mask=~keep)
    with pytest.raises(ValueError, match="washout 2 and the weights leave none of 60 steps"):
        fit_readout(MODEL, params, xs, targets, washout=np.int64(2), reset=keep)
    with pytest.raises(ValueError, match=r"a mask of shape \(3, 59\); these inputs need \[\*batch, time\] = \(3, 60\)"):
        fit_readout(MODEL, params, xs, targets, mask=keep[:, 1:])
    with pytest.raises(ValueError, match="finite ridge >= 0, got -0.1"):
        fit_readout(MODEL, params, xs, targets, ridge=-0.1)
    with pytest.raises(ValueError, match=r"one number as ridge, got float64\[2\]: vmap tries several"):
        fit_readout(MODEL, params, xs, targets, ridge=jnp.ones(2))
    with pytest.raises(ValueError, match="targets with 1 features"):
        fit_readout(MODEL, params, xs, targets[..., :1])
    with pytest.raises(ValueError, match="axes differ"):
        fit_readout(MODEL, params, xs, targets[:, 1:])
    with pytest.raises(ValueError, match=r"needs weights \(3, 60\), as the targets, got \(60,\)"):
        fit_readout(MODEL, params, xs, targets, weights=jnp.ones(TIME))
    for weight, kind in ((-1.0, "negative"), (np.nan, "not finite"), (np.inf, "not finite")):
        with pytest.raises(ValueError, match=f"finite weights >= 0, got one that is {kind}"):
            fit_readout(MODEL, params, xs, targets, weights=np.where(keep.cumsum(1) > 3, weight, 1.0))
    with pytest.raises(ValueError, match="needs finite targets[.]"):
        fit_readout(MODEL, params, xs, np.where(targets > 3, np.nan, targets))
    with pytest.raises(TypeError, match="params of float64 but got targets of float32"):
        fit_readout(MODEL, params, xs, targets.astype(np.float32))
    with pytest.raises(TypeError, match="needs as many params in a tuple"):
        fit_readout(MODEL, params[:1], xs, targets)


def test_a_negative_ridge_that_is_traced_gives_nan():
    params, xs, targets = problem(time=5)
    fitted = jax.jit(lambda ridge: fit_readout(MODEL, params, xs, targets, ridge=ridge)[-1])(-0.1)
    assert all(np.isnan(leaf).all() for leaf in fitted)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_sharded_batch_is_fitted_as_another(kind):
    model = js.Stack((js.Reservoir(2, 6), js.Dense(6, 1)))
    params, xs = model.init(jax.random.key(0)), np.random.default_rng(0).normal(size=(4, 30, 2))
    expected = fit_readout(model, params, xs, xs[..., :1], ridge=0.1)[-1]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        over_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        given = jax.device_put((xs, xs[..., :1]), over_rows)
        mask, weights = jax.device_put(np.ones((4, 30), bool), over_rows), np.ones((4, 30))
        assert_close(fit_readout(model, params, *given, ridge=0.1, mask=mask, weights=weights)[-1], expected)
        over_units = jax.tree.map(
            lambda spec, leaf: jax.device_put(leaf, jax.NamedSharding(mesh, hidden_over_data(spec))),
            model.layers[0].axes(),
            params[0],
            is_leaf=lambda leaf: isinstance(leaf, jax.P),
        )
        assert_close(fit_readout(model, (over_units, params[1]), xs, xs[..., :1], ridge=0.1)[-1], expected)
        found = echo_state_conditions(model.layers[0], over_units)
        assert_close(found, echo_state_conditions(model.layers[0], params[0]))


def hidden_over_data(names):
    return jax.P(*("data" if name == "hidden" else None for name in names))
