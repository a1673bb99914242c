"""What `Remat` saves, and what `Feedback` closes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

LSTM = js.LSTM(8, 16)


def gradient_memory(cell, time):
    """Bytes that the compiled gradient of an unroll needs beside its arguments and results."""

    def loss(params, xs):
        return jnp.sum(cell.unroll(params, xs)[0].hidden ** 2)

    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((4, time, 8), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(params, xs).compile().memory_analysis().temp_size_in_bytes


def test_remat_bounds_what_is_saved():
    """O(T / every + every) instead of O(T)."""
    plain, remat = (functools.partial(gradient_memory, cell) for cell in (LSTM, js.Remat(LSTM, every=32)))
    assert remat(1024) < plain(1024) / 4
    assert gradient_memory(js.Remat(LSTM), 1024) < plain(1024) / 4
    per_step = (remat(2048) - remat(1024)) / 1024
    inputs_and_states = 4 * (8 + 2 * 16 / 32) * 4  # bytes a step: x in time-major order, one LSTMState in 32
    assert per_step < 2 * inputs_and_states


@pytest.mark.parametrize("every", [1, 3, 7, 20])
@pytest.mark.parametrize("reverse", [False, True])
def test_remat_of_any_length_of_chunk(every, reverse):
    params, xs = LSTM.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (7, 8))

    @functools.partial(jax.jit, static_argnums=0)
    def run(cell):
        def loss(params, xs):
            state, ys = cell.unroll(params, xs, reverse=reverse)
            return jnp.sum(jnp.cos(ys)) + jnp.sum(state.cell), (state, ys)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, xs)

    for a, e in zip(jax.tree.leaves(run(js.Remat(LSTM, every=every))), jax.tree.leaves(run(LSTM)), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(e).max())))


def test_feedback_reads_its_own_output():
    cell = js.Feedback(js.Stack((js.Elman(2, 3), js.Dense(3, 2))))
    params = cell.init(jax.random.key(0))
    first = jnp.array([0.5, -1.0])
    state = cell.initial_state(params)._replace(output=first)
    _, ys = cell.unroll(params, None, state, length=4)
    _, expected = cell.cell.unroll(params, jnp.concatenate([first[None], ys[:-1]]))
    np.testing.assert_allclose(ys, expected, atol=1e-6)


def test_tokens_are_fed_back_as_tokens():
    cell = js.Feedback(js.Stack((js.Embed(5, 3), js.Dense(3, 5), js.Map(jnp.argmax))))
    state, tokens = cell.unroll(cell.init(jax.random.key(0)), None, length=4)
    assert tokens.shape == (4,) and tokens.dtype == state.output.dtype


def test_a_cell_that_runs_without_inputs_under_every_wrapper():
    cell = js.Feedback(js.Dense(2, 2))
    params = cell.init(jax.random.key(0))
    state = js.FeedbackState(cell=(), output=jnp.ones((3, 2)))
    expected = cell.unroll(params, None, state, length=5)
    for wrapped in (js.Remat(cell, every=2), js.Plain(cell), js.Stack((cell, js.Map("identity")))):
        given = ((params, ()), (state, ())) if isinstance(wrapped, js.Stack) else (params, state)
        _, ys = wrapped.unroll(given[0], None, given[1], length=5)
        np.testing.assert_allclose(ys, expected[1], atol=1e-6)
