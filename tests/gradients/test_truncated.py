"""Truncated back-propagation is, window by window, what its definition says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

CELL = js.Stack((js.LSTM(2, 3), js.Dropout(0.5), js.Elman(3, 2)))
ROWS = 2

pytestmark = pytest.mark.usefixtures("float64")


def problem(time):
    """Params, inputs, state, mask, reset and key."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = CELL.init(keys[0])
    state = jax.tree.map(lambda leaf: leaf + 0.3, CELL.initial_state(params, (ROWS,)))
    mask, reset = np.ones((ROWS, time), bool), np.zeros((ROWS, time), bool)
    mask[0, 4:6], mask[1, -2:], reset[1, 5] = False, False, True
    return params, jax.random.normal(keys[1], (ROWS, time, 2)), state, jnp.array(mask), jnp.array(reset), keys[2]


def weigh(ys):
    return jnp.sum(ys * jnp.cos(jnp.arange(ys.size)).reshape(ys.shape))


def brute_force(window, reach, params, xs, state, mask, reset, key):
    """The sum over windows of the gradients of a loop in which the state is constant `reach` steps before their end."""
    time = xs.shape[1]
    draw_key, step_key = jax.random.split(key)
    keys = jax.random.split(step_key, time)
    weights = jnp.cos(jnp.arange(ROWS * time * 2)).reshape(ROWS, time, 2)

    def window_loss(params, xs, state, begin, end, last):
        params, total = CELL.draw(params, draw_key), 0.0
        start = CELL.initial_state(params, (ROWS,))
        where = lambda rows, a, b: jax.tree.map(lambda a, b: jnp.where(rows[:, None], a, b), a, b)  # noqa: E731
        for t in range(end):
            if 0 < t == end - reach:  # the given state is reached
                state = jax.lax.stop_gradient(state)
            state = where(reset[:, t], start, state)
            after, y = CELL.step(params, state, xs[:, t], keys[t])
            state = where(mask[:, t], after, state)
            if t >= begin:
                total += jnp.sum(weights[:, t] * jnp.where(mask[:, t, None], y, 0))
        return total + (sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(state)) if last else 0)

    gradients = []
    for begin in range(0, time, window):
        end = min(begin + window, time)
        loss = functools.partial(window_loss, begin=begin, end=end, last=end == time)
        gradients.append(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, xs, state))
    return jax.tree.map(lambda *parts: sum(parts), *gradients)


def truncated(window, reach, params, xs, state, mask, reset, key):
    cell = js.Truncated(CELL, window, reach)

    def loss(params, xs, state):
        final, ys = cell.unroll(params, xs, state, mask=mask, reset=reset, key=key)
        return weigh(ys) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(final)), (final, ys)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, xs, state)


@pytest.mark.slow
@pytest.mark.parametrize(("time", "window", "reach"), [(8, 3, 3), (8, 3, 4), (9, 3, 7), (8, 2, 5), (6, 4, 4)])
def test_gradient_is_that_of_its_definition(time, window, reach):
    args = problem(time)
    gradient, outputs = truncated(window, reach, *args)
    params, xs, state, mask, reset, key = args
    plain = CELL.unroll(params, xs, state, mask=mask, reset=reset, key=key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), outputs, plain)
    expected = brute_force(window, reach, *args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10), gradient, expected)


def test_a_reach_of_the_whole_sequence_is_full_back_propagation():
    args = problem(8)
    full, _ = truncated(8, None, *args)
    jax.tree.map(np.testing.assert_array_equal, truncated(3, 8, *args)[0], full)
    short, _ = truncated(3, 5, *args)
    assert np.abs(short[0][0].recurrent_kernel - full[0][0].recurrent_kernel).max() > 1e-6


def test_reverse_truncates_from_the_end():
    cell = js.Truncated(js.Elman(2, 3), window=2, reach=3)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (7, 2))

    def gradient(xs, flip=False, **options):
        return jax.grad(lambda xs: weigh(cell.unroll(params, xs, **options)[1][:: -1 if flip else 1]))(xs)

    state, ys = cell.unroll(params, xs, reverse=True)
    again, flipped = cell.unroll(params, xs[::-1])
    np.testing.assert_allclose(ys, flipped[::-1], atol=1e-12)
    np.testing.assert_allclose(state.hidden, again.hidden, atol=1e-12)
    np.testing.assert_allclose(gradient(xs, reverse=True), gradient(xs[::-1], flip=True)[::-1], atol=1e-12)
    first = jax.grad(lambda xs: cell.unroll(params, xs, reverse=True)[1][0].sum())(xs)
    assert (np.abs(first).max(1) > 0).tolist() == [True, True, True, False, False, False, False]


def test_errors():
    with pytest.raises(ValueError, match="Truncated needs window >= 1 step, got 0"):
        js.Truncated(js.Elman(2, 3), 0)
    with pytest.raises(ValueError, match="a reach of at least its window of 5 steps, got 4"):
        js.Truncated(js.Elman(2, 3), 5, 4)
