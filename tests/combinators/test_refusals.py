"""What wrappers and cells say of arguments that cannot be, and narrow dtypes that they take."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

KEY = jax.random.key(0)


def _mask_of_attached():
    cell = js.Conditioned(js.LSTM(4, 3), 2)
    return js.regularizers.kernel_mask(cell, cell.attach(cell.init(KEY), jnp.ones(2)))


REFUSED = {
    "products": (lambda: js.LayerNorm(js.MGU(2, 3)), "its products are not plain."),
    "products_inside": (lambda: js.LayerNorm(js.RecurrentDropout(js.LSTM(2, 3), 0.1)), "RecurrentDropout(LayerNorm("),
    "zoneout": (lambda: js.RecurrentDropout(js.Zoneout(js.LSTM(2, 3), 0.1), 0.1), "Zoneout(RecurrentDropout(cell))."),
    "stack": (lambda: js.LayerNorm(js.Stack((js.LSTM(2, 3),))), "it goes around the cells inside of Stack."),
    "key": (lambda: js.FeatureNorm(3).init(None), "needs one key"),
    "epsilon": (lambda: js.FeatureNorm(2, epsilon=1e-60), "FeatureNorm needs a finite epsilon of at least 1.2e-38"),
    "infinite": (lambda: js.RMSNorm(js.LSTM(2, 3), epsilon=float("inf")), "RMSNorm needs a finite epsilon"),
    "lstm_epsilon": (lambda: js.LayerNormLSTM(2, 3, epsilon=0.0), "LayerNormLSTM needs a finite epsilon"),
    "periods": (lambda: js.ClockworkRNN(2, 4, periods=(True, 2)), "needs increasing periods"),
    "merge": (lambda: js.Bidirectional(js.LSTM(2, 3), js.LSTM(2, 3), merge="add"), "product, both, got 'add'"),
    "norms": (lambda: js.plots.gradient_flow(jnp.ones(3)), 'needs norms by name, {"name": norms}, got'),
    "weights": (lambda: js.plots.weights(jnp.ones((3, 4))), 'needs arrays by name, {"name": array}, got'),
    "lengths": (
        lambda: js.pooling.last(jnp.ones((2, 5, 3)), jnp.array([3, 5])),
        "length_mask(lengths, time) makes one",
    ),
    "attached": (_mask_of_attached, "got params that hold an attached vector: give those of init."),
    "line": (lambda: js.Zoneout(js.TimeSkip(js.Elman(5, 3), 2), 0.1), "belong together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()


def test_periods_may_be_integers_of_numpy():
    cell = js.ClockworkRNN(2, 4, periods=(np.int64(1), np.int64(2)))  # pyright: ignore[reportArgumentType]
    assert cell == js.ClockworkRNN(2, 4, periods=(1, 2))
    assert all(type(period) is int for period in cell.periods)


def test_normalised_weights_of_small_half_precision_kernels():
    cell = js.WeightNorm(js.Elman(2, 3))
    params = cell.init(KEY)
    small = jax.tree.map(lambda leaf: (1e-4 * leaf).astype(jnp.float16), params)
    kernels = cell.inner(small)
    assert kernels.input_kernel.dtype == jnp.float16
    np.testing.assert_allclose(kernels.input_kernel, 1e-4 * params.cell.input_kernel, rtol=2e-2, atol=1e-6)


def test_a_memory_attached_later_leaves_drawn_noise():
    inner = js.Conditioned(js.RecurrentDropout(js.Elman(4, 3), 0.5), 2)
    cell, xs = js.WeightNorm(inner), jnp.ones((5, 2))
    params, v = cell.init(KEY), jnp.ones(2)
    ys = [
        cell.unroll(drawn, xs)[1]
        for drawn in (cell.attach(cell.draw(params, KEY), v), cell.draw(cell.attach(params, v), KEY))
    ]
    np.testing.assert_allclose(*ys, rtol=1e-6)
    assert not np.allclose(ys[0], cell.unroll(cell.attach(params, v), xs)[1])
