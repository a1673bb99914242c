"""Ways around a cell against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import jaxseq as js

TIME = 4

pytestmark = pytest.mark.usefixtures("float64")


def test_highway_is_its_equations():
    """y = H(x) T(x) + x (1 - T(x)), T(x) = expit(W_T x + b_T), with H the LSTM."""
    cell = js.Highway(js.LSTM(3, 3), gate_bias=-2.0)
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, TIME, 3))
    assert params.gate_bias.tolist() == [-2.0] * 3
    _, inner = cell.cell.unroll(params.cell, xs)
    gate = expit(np.asarray(xs) @ np.asarray(params.gate_kernel) - 2)
    np.testing.assert_allclose(cell.unroll(params, xs)[1], gate * inner + (1 - gate) * xs, rtol=1e-12)


def test_every_layer_reads_the_input_and_the_output_reads_every_layer():
    cell = js.Stack((js.Skip(js.Elman(2, 3)), js.Skip(js.GRU(5, 4))))
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (TIME, 2))
    _, first = js.Elman(2, 3).unroll(params[0], xs)
    _, second = js.GRU(5, 4).unroll(params[1], jnp.concatenate([xs, first], -1))
    np.testing.assert_allclose(cell.unroll(params, xs)[1], jnp.concatenate([xs, first, second], -1), rtol=1e-12)
    assert cell.output_size == 9


def test_the_inner_cell_keeps_its_own_way_to_unroll():
    """A cell without a state has no loop over time inside them either."""
    for cell in (js.Skip(js.Dense(3, 3)), js.Highway(js.Dense(3, 3))):
        params = cell.init(jax.random.key(0))
        assert "scan[" not in str(jax.make_jaxpr(lambda xs, p=params, cell=cell: cell.unroll(p, xs))(jnp.ones((5, 3))))


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="one size, but .* reads 2 and gives 3 features"):
        js.Highway(js.Elman(2, 3))
    with pytest.raises(ValueError, match="one size, but .* reads None and gives None"):
        js.Highway(js.Map("tanh"))
    with pytest.raises(ValueError, match=r"cannot join its input int64\[4\] and the output float64\[4,3\]"):
        cell = js.Skip(js.Embed(5, 3))
        cell.unroll(cell.init(jax.random.key(0)), jnp.arange(4))
