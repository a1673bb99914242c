"""Noise: what it zeroes or keeps, for how long, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

KEY = jax.random.key(3)
XS = jax.random.normal(jax.random.key(1), (2, 5, 3))


def test_variational_dropout_zeroes_the_same_features_at_every_step():
    _, ys = js.Dropout(0.5, variational=True).unroll((), jnp.ones((4, 6, 50)), key=KEY)
    assert (ys == ys[:, :1]).all() and set(np.unique(ys)) == {0.0, 2.0}
    assert not (ys[0] == ys[1]).all()  # each row has its own features
    _, ys = js.Dropout(0.5).unroll((), jnp.ones((4, 6, 50)), key=KEY)
    assert not (ys[:, 0] == ys[:, 1]).all()


@pytest.mark.parametrize("layer", [js.Dropout(0.2), js.Dropout(0.2, variational=True)])
def test_dropout_keeps_the_mean(layer):
    _, ys = layer.unroll((), jnp.ones((400, 1, 100)), key=KEY)
    assert abs(float(ys.mean()) - 1) < 5 * 0.5 / 200  # deviation sqrt(0.2 / 0.8) of 40,000 numbers
    assert abs(float((ys == 0).mean()) - 0.2) < 5 * 0.4 / 200


def test_recurrent_dropout_is_a_kernel_with_rows_of_zeros():
    """(m h) R = h (diag(m) R): for one sequence the dropped units are rows of the kernel."""
    gru = js.GRU(3, 8)
    cell = js.RecurrentDropout(gru, 0.5)
    params = cell.init(jax.random.key(0))
    state, ys = cell.unroll(params, XS[0], key=KEY)
    draw_key, _ = jax.random.split(KEY)
    drawn = cell.draw(params, draw_key)
    keep = jax.random.bernoulli(drawn.key, 0.5, (8,))
    assert 0 < keep.sum() < 8
    kernel = params.recurrent_kernel * keep[:, None, None] / 0.5
    expected = gru.unroll(params._replace(recurrent_kernel=kernel), XS[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (state, ys), expected)
    assert np.array_equal(cell.unroll(params, XS)[1], gru.unroll(params, XS)[1])


def test_weight_drop_zeroes_weights_of_the_recurrent_kernels_alone():
    inner = js.Stack((js.LSTM(3, 20), js.Dense(20, 4)))
    cell = js.WeightDrop(inner, 0.25)
    params = cell.init(jax.random.key(0))
    draw_key, _ = jax.random.split(KEY)
    dropped = cell.draw(params, draw_key)
    before, after = params[0].recurrent_kernel, dropped[0].recurrent_kernel
    zeros = after == 0
    assert abs(float(zeros.mean()) - 0.25) < 5 * 0.43 / 40
    np.testing.assert_allclose(after, jnp.where(zeros, 0, before / 0.75), rtol=1e-6)
    assert dropped[1].kernel is params[1].kernel and dropped[0].input_kernel is params[0].input_kernel
    assert np.array_equal(cell.unroll(params, XS, key=KEY)[1], inner.unroll(dropped, XS)[1])


def test_zoneout_keeps_units_and_without_a_key_the_expectation():
    lstm, rates = js.LSTM(3, 40), (0.05, 0.5)
    cell = js.Zoneout(lstm, rates)
    params = cell.init(jax.random.key(0))
    key = jax.random.key(0)
    before = js.LSTMState(*jax.random.normal(key, (2, 100, 40)))
    x = jax.random.normal(jax.random.key(1), (100, 3))
    plain, _ = lstm.step(params, before, x)
    noisy, y = cell.step(params, before, x, KEY)
    for rate, old, new, out in zip(rates, before, plain, noisy, strict=True):
        kept = out == old
        assert abs(float(kept.mean()) - rate) < 5 * np.sqrt(rate * (1 - rate)) / np.sqrt(4000)
        assert np.array_equal(out, jnp.where(kept, old, new))
    assert np.array_equal(y, noisy.hidden)
    expected, y = cell.step(params, before, x)
    for rate, old, new, out in zip(rates, before, plain, expected, strict=True):
        np.testing.assert_allclose(out, rate * old + (1 - rate) * new, atol=1e-6)
    assert np.array_equal(y, expected.hidden)


def test_wrong_use():
    for make in (
        js.Dropout,
        lambda rate: js.WeightDrop(js.LSTM(2, 3), rate),
        lambda rate: js.Zoneout(js.GRU(2, 3), rate),
    ):
        with pytest.raises(ValueError, match="needs 0 <= rate < 1, got 1.5"):
            make(1.5)
    with pytest.raises(ValueError, match="needs 0 <= rate < 1, got 'high'"):
        js.Zoneout(js.LSTM(2, 3), (0.1, "high"))
    with pytest.raises(TypeError, match=r"RecurrentDropout works on the products of a gated cell .* Stack"):
        js.RecurrentDropout(js.Stack((js.LSTM(2, 3),)), 0.5)
    with pytest.raises(TypeError, match="Dense.* has no recurrent kernel"):
        js.WeightDrop(js.Dense(2, 3), 0.5)
    stack = js.Zoneout(js.Stack((js.GRU(3, 3),)), 0.5)
    with pytest.raises(TypeError, match="Zoneout needs a cell whose output is the hidden state it keeps, but Stack"):
        stack.unroll(stack.init(KEY), XS)
    three = js.Zoneout(js.LSTM(3, 4), (0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="has 3 numbers for a state of 2 floating arrays"):
        three.unroll(three.init(KEY), XS)
