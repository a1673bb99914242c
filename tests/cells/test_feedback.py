"""Recurrence through the output: in parallel over given outputs, closed by `Feedback`, against the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests.numbers import random_params

BATCH, TIME = 2, 5
CELL = js.Jordan(2, 4, 3, output_activation="softmax")

pytestmark = pytest.mark.usefixtures("float64")


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def test_jordan_is_its_equations():
    """Figure 10.4: a(t) = b + W o(t-1) + U x(t), h = tanh(a), o = c + V h, and a softmax that is fed back."""
    params = random_params(np.random.default_rng(1), CELL)
    U, W, V = (np.asarray(k) for k in (params.input_kernel[:, 0], params.recurrent_kernel[:, 0], params.output_kernel))
    b, c = np.asarray(params.bias[0]), np.asarray(params.output_bias)
    xs = np.random.default_rng(0).normal(size=(BATCH, TIME, 2))
    output, expected = np.zeros((BATCH, 3)), []
    for t in range(TIME):
        output = softmax(np.tanh(xs[:, t] @ U + output @ W + b) @ V + c)
        expected.append(output)
    state, ys = js.Feedback(CELL).unroll(params, jnp.asarray(xs))
    np.testing.assert_allclose(ys, np.stack(expected, 1), rtol=1e-12)
    np.testing.assert_allclose(state.output, output, rtol=1e-12)


def test_a_closed_loop_is_teacher_forcing_with_its_own_outputs():
    params = CELL.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (BATCH, TIME, 2))
    _, ys = js.Feedback(CELL).unroll(params, xs)
    before = jnp.concatenate([jnp.zeros((BATCH, 1, 3)), ys[:, :-1]], axis=1)
    np.testing.assert_allclose(CELL.unroll(params, (xs, before))[1], ys, rtol=1e-12)


def test_given_outputs_are_read_without_a_loop_over_time():
    def loss(params, xs, cell=CELL):
        return jnp.sum(cell.unroll(params, xs, mask=jnp.ones((BATCH, TIME), bool))[1][..., 0])

    params = CELL.init(jax.random.key(0))
    xs, given = jnp.ones((BATCH, TIME, 2)), jnp.ones((BATCH, TIME, 3))
    for function in (loss, jax.grad(loss, argnums=(0, 1))):
        jaxpr = str(jax.make_jaxpr(function)(params, (xs, given)))
        assert "dot_general[" in jaxpr and "scan[" not in jaxpr and "while[" not in jaxpr
    assert "scan[" in str(jax.make_jaxpr(lambda params, xs: loss(params, xs, js.Feedback(CELL)))(params, xs))


def test_hidden_and_output_recurrence_over_given_inputs():
    """h(t) = tanh(b + W h(t-1) + R o(t-1) + U x(t)), o(t) = c + V h(t)."""
    cell = js.Feedback(js.Stack((js.Concatenate((2, 3)), js.Elman(5, 4), js.Dense(4, 3))))
    params = random_params(np.random.default_rng(1), cell)
    kernel, W, b = (np.asarray(leaf) for leaf in params[1])
    U, R = kernel[:2, 0], kernel[2:, 0]
    V, c = (np.asarray(leaf) for leaf in params[2])
    xs = np.random.default_rng(0).normal(size=(TIME, 2))
    hidden, output = np.zeros(4), np.zeros(3)
    for t in range(TIME):
        hidden = np.tanh(b[0] + hidden @ W[:, 0] + output @ R + xs[t] @ U)
        output = c + hidden @ V
    state, ys = cell.unroll(params, jnp.asarray(xs))
    np.testing.assert_allclose(ys[-1], output, rtol=1e-12)
    np.testing.assert_allclose(state.cell[1].hidden, hidden, rtol=1e-12)


def test_errors_say_what_the_pair_needs():
    params = CELL.init(jax.random.key(0))
    with pytest.raises(ValueError, match="reads a tuple of 2 vectors of \\(2, 3\\) features"):
        CELL.step(params, (), jnp.ones(2))
    with pytest.raises(ValueError, match="got inputs with 2 features .* it needs 3 in the last axis"):
        CELL.step(params, (), (jnp.ones(2), jnp.ones(2)))
    with pytest.raises(ValueError, match="batch axes differ"):
        CELL.step(params, (), (jnp.ones((4, 2)), jnp.ones(3)))
    with pytest.raises(TypeError, match="Concatenate needs a tuple of sizes"):
        js.Concatenate(3)  # type: ignore
    with pytest.raises(ValueError, match="Concatenate needs sizes >= 1"):
        js.Concatenate((2, 0))
    with pytest.raises(ValueError, match="output of 4 features, but it reads 3"):
        js.Feedback(js.Stack((js.Concatenate((2, 3)), js.Elman(5, 4))))
