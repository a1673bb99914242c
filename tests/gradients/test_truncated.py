"""Truncated back-propagation is, window by window, what its definition says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.core.unroll import unroll_checked
from tests import zoo
from tests.test_laws import assert_same, with_gradients

CELL = js.Stack((js.LSTM(2, 3), js.Dropout(0.5)))
ROWS, TIME = 2, 9

pytestmark = pytest.mark.usefixtures("float64")


def problem():
    """Params, inputs and a state; and a mask, resets and a key."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = CELL.init(keys[0])
    state = jax.tree.map(lambda leaf: leaf + 0.3, CELL.initial_state(params, (ROWS,)))
    mask, reset = np.ones((ROWS, TIME), bool), np.zeros((ROWS, TIME), bool)
    mask[0, 4:6], mask[1, -2:], reset[1, 5] = False, False, True
    options = {"mask": jnp.array(mask), "reset": jnp.array(reset), "key": keys[2]}
    return (params, jax.random.normal(keys[1], (ROWS, TIME, 2)), state), options


def truncated(cell, **windows):
    return functools.partial(js.truncated_unroll, cell, **windows)


@jax.jit
def of_one_window(params, xs, state, mask, reset, key, cut, counts, last):
    """The gradient of the outputs at the steps that count, of a loop whose state becomes a constant at the cut."""
    draw_key, step_key = jax.random.split(key)
    shape = jax.eval_shape(CELL.unroll, params, xs)[1].shape
    weights = jnp.cos(1.0 + jnp.arange(np.prod(shape))).reshape(shape)

    def loss(params, xs, state):
        params = CELL.draw(params, draw_key)
        start = CELL.initial_state(params, (ROWS,))

        def where(rows, a, b):
            return jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(rows, range(rows.ndim, a.ndim)), a, b), a, b)

        def step(state, inputs):
            x, keep, reset, key, weight, is_cut, counts = inputs
            state = where(is_cut, jax.tree.map(jax.lax.stop_gradient, state), state)
            state = where(reset, start, state)
            after, y = CELL.step(params, state, x, key)
            return where(keep, after, state), counts * jnp.sum(weight * where(keep, y, jnp.zeros_like(y)))

        by_time = (jnp.moveaxis(leaf, 1, 0) for leaf in (xs, mask, reset))
        inputs = (*by_time, jax.random.split(step_key, TIME), jnp.moveaxis(weights, 1, 0), cut, counts)
        state, terms = jax.lax.scan(step, state, inputs)
        of_state = sum(
            jnp.sum(leaf * jnp.cos(1.0 + jnp.arange(leaf.size)).reshape(leaf.shape)) for leaf in jax.tree.leaves(state)
        )
        return terms.sum() + last * of_state

    return jax.grad(loss, argnums=(0, 1, 2))(params, xs, state)


def brute_force(window, reach, params, xs, state, options):
    """The sum of the gradients of all windows' outputs, each with its own cut."""
    steps, total = np.arange(TIME), None
    for begin in range(0, TIME, window):
        end = min(begin + window, TIME)
        cut = (steps == end - reach) & (end > reach)  # the given state is reached
        counts = ((steps >= begin) & (steps < end)).astype(float)
        part = of_one_window(params, xs, state, *options.values(), cut, counts, float(end == TIME))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


@pytest.mark.parametrize(
    ("window", "reach"),
    [(3, None), (2, 5), *[pytest.param(*each, marks=pytest.mark.slow) for each in [(4, 5), (3, 7)]]],
)
def test_gradient_is_that_of_its_definition(window, reach):
    args, options = problem()
    run = jax.jit(functools.partial(with_gradients, truncated(CELL, window=window, reach=reach)))
    found, (state, ys) = run(*args, **options), CELL.unroll(*args, **options)
    assert_same((found["state"], found["ys"]), (state, ys), 1e-12)
    expected = brute_force(window, reach or window, *args, options)
    assert_same((found["params"], found["xs"], found["initial"]), expected)


def test_a_reach_of_the_whole_sequence_is_full_back_propagation():
    args, options = problem()
    full = jax.jit(functools.partial(with_gradients, CELL.unroll))(*args, **options)
    found = jax.jit(functools.partial(with_gradients, truncated(CELL, window=3, reach=TIME)))(*args, **options)
    assert_same(found, full, 1e-12)
    short = brute_force(3, 5, *args, options)
    assert np.abs(short[0][0].recurrent_kernel - full["params"][0].recurrent_kernel).max() > 1e-6


@pytest.mark.parametrize(
    "cell",
    [
        js.Remat(js.Stack((js.GRU(2, 3), js.Dense(3, 2))), every=2),
        js.Plain(js.LSTM(2, 3)),
        js.MinGRU(2, 3),  # unrolls in parallel
        js.Stack((js.Dropout(0.5, variational=True), js.WeightDrop(js.Elman(2, 3), 0.5))),
        zoo.Orbit(),  # without inputs
        zoo.RunningMean(),  # trees, integers
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_any_cell_reads_as_ever(cell):
    """With two batch axes, masks, resets and a key."""
    params, key = cell.init(jax.random.key(0)), jax.random.key(1)
    xs = zoo.inputs(cell, np.random.default_rng(4), (2, ROWS, TIME))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (2, ROWS, TIME))
    reset = jax.random.bernoulli(jax.random.key(3), 0.2, (2, ROWS, TIME))
    options = {"mask": mask, "reset": reset, "key": key}
    found = jax.jit(truncated(cell, window=2, reach=3))(params, xs, **options)
    assert_same(found, jax.jit(cell.unroll)(params, xs, **options), 1e-12)


def test_one_sequence_vmap_no_inputs_and_no_steps():
    cell, orbit = js.Elman(2, 3), zoo.Orbit()
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (ROWS, TIME, 2))
    unroll = truncated(cell, window=2, reach=3)
    state, ys = cell.unroll(params, xs)
    assert_same(jax.jit(jax.vmap(unroll, (None, 0)))(params, xs), (state, ys))
    empty = unroll(params, xs[:, :0], state)
    assert_same(empty, (state, ys[:, :0]))
    params = orbit.init(jax.random.key(0))
    found = js.truncated_unroll(orbit, params, None, window=4, length=TIME)
    assert_same(found, orbit.unroll(params, None, length=TIME))


def test_a_sharded_batch():
    """Also where a first window is read in one piece, the other being of no steps."""
    args, options = problem()
    rows = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    run = functools.partial(truncated(CELL, window=3), **options)
    expected = jax.jit(run)(*args)
    with jax.set_mesh(rows):
        xs, state = jax.device_put(args[1:], jax.sharding.PartitionSpec("rows"))
        mask, reset = jax.device_put((options["mask"], options["reset"]), jax.sharding.PartitionSpec("rows"))
        out = jax.jit(functools.partial(run, mask=mask, reset=reset))(args[0], xs, state)
        assert_same(out, expected)
        assert CELL.unroll(args[0], xs[:, :0], state, key=options["key"])[1].shape == (ROWS, 0, 3)


def test_reverse_truncates_from_the_end():
    cell = js.Elman(2, 3)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (7, 2))
    unroll = truncated(cell, window=2, reach=3)
    weights = jnp.cos(jnp.arange(21.0)).reshape(7, 3)

    def gradient(xs, weights, **options):
        slopes = jax.grad(lambda xs, weights: jnp.sum(weights * unroll(params, xs, **options)[1]))
        return jax.jit(slopes)(xs, weights)

    backward = gradient(xs, weights, reverse=True)
    np.testing.assert_allclose(backward, gradient(xs[::-1], weights[::-1])[::-1], atol=1e-12)
    first = gradient(xs, jnp.zeros((7, 3)).at[0].set(1), reverse=True)
    assert (np.abs(first).max(1) > 0).tolist() == [True, True, True, False, False, False, False]


def test_second_derivatives_are_those_of_a_chunk():
    cell = js.Elman(1, 2)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((8, 1))
    half, _ = cell.unroll(params, xs[:4])

    def cube(unroll, xs, kernel):
        return jnp.sum(unroll(params._replace(recurrent_kernel=kernel), xs)[1] ** 3)

    def chunks(kernel):
        return cube(cell.unroll, xs[:4], kernel) + cube(lambda p, xs: cell.unroll(p, xs, half), xs[4:], kernel)

    whole = functools.partial(cube, truncated(cell, window=4), xs)
    found, expected = (jax.jit(jax.hessian(loss))(params.recurrent_kernel) for loss in (whole, chunks))
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_equal_cells_compile_once():
    params, xs = js.GRU(2, 3).init(jax.random.key(0)), jnp.ones((5, 2))
    js.truncated_unroll(js.GRU(2, 3), params, xs, window=2)
    traced = unroll_checked._cache_size()
    js.truncated_unroll(js.GRU(2, 3), params, 2 * xs, window=2)
    assert unroll_checked._cache_size() == traced


def test_errors_name_the_function_and_the_cell():
    cell = js.Elman(2, 3)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 2))
    with pytest.raises(ValueError, match="truncated_unroll needs window >= 1 step, got 0"):
        js.truncated_unroll(cell, params, xs, window=0)
    with pytest.raises(TypeError, match="truncated_unroll needs an integer window, got 2.5"):
        js.truncated_unroll(cell, params, xs, window=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a reach of at least its window of 5 steps, got 4"):
        js.truncated_unroll(cell, params, xs, window=5, reach=4)
    with pytest.raises(ValueError, match=r"^Elman\(input_size=2, hidden_size=3\) got inputs with 3 features"):
        js.truncated_unroll(cell, params, jnp.ones((4, 3)), window=2)
    both = js.Bidirectional(cell, cell)
    with pytest.raises(TypeError, match="truncated_unroll needs a cell, but Bidirectional.* has no step: it reads who"):
        js.truncated_unroll(both, both.init(jax.random.key(0)), xs, window=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="newton_unroll needs a cell, but Bidirectional.* has no step"):
        js.newton_unroll(both, both.init(jax.random.key(0)), xs)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^Elman\(input_size=2, hidden_size=3\) got inputs with 3 features"):
        js.newton_unroll(cell, params, jnp.ones((4, 3)))
