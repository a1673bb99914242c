"""The deep transition against the equations of Pascanu et al., with and without the shortcut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

BATCH, TIME = 2, 5

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("shortcut", [False, True])
def test_deep_transition_is_its_equations(shortcut):
    cell = js.DeepTransition(2, 4, 3, shortcut=shortcut)
    params = cell.init(jax.random.key(0))
    params = params._replace(bias=jax.random.normal(jax.random.key(2), params.bias.shape))
    U, W, b = (np.asarray(leaf) for leaf in params)
    assert U.shape == (2, 1, 4) and W.shape == (4, 4 if shortcut else 3, 4) and b.shape == (3, 4)
    xs = np.random.default_rng(0).normal(size=(BATCH, TIME, 2))
    h, expected = np.zeros((BATCH, 4)), []
    for t in range(TIME):
        first = np.tanh(h @ W[:, 0] + xs[:, t] @ U[:, 0] + b[0])
        second = np.tanh(first @ W[:, 1] + b[1])
        h = np.tanh(second @ W[:, 2] + b[2] + (h @ W[:, 3] if shortcut else 0))
        expected.append(h)
    state, ys = cell.unroll(params, jnp.asarray(xs))
    np.testing.assert_allclose(ys, np.stack(expected, 1), rtol=1e-12)
    np.testing.assert_allclose(state.hidden, h, rtol=1e-12)


def test_a_transition_of_one_layer_is_elman():
    cell, elman = js.DeepTransition(2, 4, 1), js.Elman(2, 4)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (TIME, 2))
    np.testing.assert_allclose(cell.unroll(params, xs)[1], elman.unroll(params, xs)[1], rtol=1e-12)


def test_a_shortcut_needs_a_layer_to_pass():
    with pytest.raises(ValueError, match="needs depth >= 2, got 1"):
        js.DeepTransition(2, 4, 1, shortcut=True)
    with pytest.raises(ValueError, match="needs depth >= 1, got 0"):
        js.DeepTransition(2, 4, 0)
