"""The rank of what a chain reads: that of the first layer made for one; and chains that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

CELL = js.ConvLSTM((3, 2, 4), 4)
FIRST = (js.Dense(1, 4), js.FeatureNorm(4), js.Dropout(0.1), js.Map("relu"), js.Frozen(js.Dense(2, 4)))


@pytest.mark.parametrize("first", FIRST, ids=repr)
def test_a_pointwise_layer_before_images_reads_images(first):
    cell = js.Stack((first, CELL))
    params = cell.init(jax.random.key(0))
    size = getattr(first, "input_size", None) or 4
    assert cell.input_rank == 3
    assert cell.zero_input(params, (2,)).shape == (2, 3, 2, size)
    xs = jax.random.normal(jax.random.key(1), (5, 3, 2, size))
    _, ys = cell.unroll(params, xs)
    between = first.unroll(params[0], xs)[1]
    np.testing.assert_allclose(ys, CELL.unroll(params[1], between)[1], rtol=1e-6, atol=1e-6)


def test_wrappers_pass_the_rank_on():
    cell = js.Residual(js.Stack((js.FeatureNorm(4), CELL)))
    assert cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 3, 2, 4)))[1].shape == (5, 3, 2, 4)
    both = js.Sequential((js.Bidirectional(js.Dense(4, 2), js.Dense(4, 2)), CELL))
    assert both.input_rank == 3
    assert js.Bidirectional(js.Dense(4, 4), CELL).input_rank == 3
    assert js.Stack((js.Dense(2, 3), js.Dropout(0.5))).input_rank == 1
    assert js.Stack((js.Map("identity", 3), js.Map(jnp.tanh), CELL)).input_rank == 3


def test_a_grid_behind_a_dense_layer_reads_rows():
    layer = js.Sequential((js.Dense(1, 4), js.Grid((js.Elman2D((7, 4), 3),) * 4)))
    ys = layer.unroll(layer.init(jax.random.key(0)), jnp.ones((7, 7, 1)))[1]
    assert ys.shape == (7, 7, 12)  # height, width, features: no batch


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((js.ConvLSTM((6, 6, 1), 4), js.LSTM(4, 5)), r"reads vectors \(rank 1\), but it is given images \(rank 3\)"),
        ((js.LSTM(4, 4), CELL), r"reads images \(rank 3\), but it is given vectors \(rank 1\)"),
        ((js.Dropout(0.1), js.Embed(4, 4)), r"reads tokens \(rank 0\), but it is given vectors \(rank 1\)"),
    ],
)
def test_a_chain_of_other_ranks_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        js.Stack(layers)


def test_a_function_gives_what_it_gives():
    cell = js.Stack((CELL, js.Map(_pooled), js.LSTM(4, 5)))
    assert cell.unroll(cell.init(jax.random.key(0)), jnp.ones((5, 3, 2, 4)))[1].shape == (5, 5)
    layer = js.Sequential((js.Map(jnp.tanh), js.Grid((js.Elman2D((7, 1), 3),) * 4)))
    with pytest.raises(ValueError, match=r'can begin with Map\("identity", 2\)'):
        layer.unroll(layer.init(jax.random.key(0)), jnp.ones((7, 7, 1)))


def _pooled(x):
    return x.mean((-2, -3))
