"""Where states start, how far they go, and how params are treated."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

XS = jax.random.normal(jax.random.key(1), (2, 5, 3))


def test_the_gradient_of_a_learned_state_is_that_of_the_state_given():
    inner = js.Stack((js.LSTM(3, 4), js.GRU(4, 2)))
    cell = js.LearnedState(inner)
    params = cell.init(jax.random.key(0))
    assert [leaf.shape for leaf in params.state] == [(4,), (4,), (2,)]

    def of_learned(learned):
        return cell.unroll(params._replace(state=learned), XS)[1].sum()

    def of_given(state):
        return inner.unroll(params.cell, XS, state)[1].sum()

    rows = jax.grad(of_given)(inner.initial_state(params.cell, (2,)))
    for ours, given in zip(jax.grad(of_learned)(params.state), jax.tree.leaves(rows), strict=True):
        np.testing.assert_allclose(ours, given.sum(axis=0), rtol=1e-5, atol=1e-6)


def test_resets_return_to_the_learned_state():
    cell = js.LearnedState(js.Stack((js.GRU(3, 4), js.GRU(4, 2))))
    params = cell.init(jax.random.key(0))._replace(state=(jnp.arange(4.0), jnp.ones(2)))
    reset = jnp.zeros((2, 5), bool).at[:, 3].set(True)
    _, ys = cell.unroll(params, XS, reset=reset)
    _, fresh = cell.unroll(params, XS[:, 3:])
    np.testing.assert_allclose(ys[:, 3:], fresh, rtol=1e-5)


def test_random_state():
    cell = js.RandomState(js.LSTM(3, 200), scale=0.5)
    params = cell.init(jax.random.key(0))
    state, _ = cell.unroll(params, jnp.zeros((50, 0, 3)), key=jax.random.key(2))
    for leaf in state:
        assert abs(float(leaf.mean())) < 5 * 0.5 / 100 and abs(float(leaf.std()) - 0.5) < 5 * 0.5 / 141
    assert not np.array_equal(state.hidden, state.cell)
    assert not any(leaf.any() for leaf in cell.unroll(params, jnp.zeros((50, 0, 3)))[0])


def test_clip():
    cell = js.Clip(js.Elman(1, 1, activation="relu"), 2.0)
    params = js.GatedParams(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)), jnp.zeros((1, 1)))
    state, ys = cell.unroll(params, jnp.ones((5, 1)))
    assert ys[:, 0].tolist() == [1, 2, 2, 2, 2] and state.hidden.tolist() == [2]
    cell = js.Clip(js.LSTM(3, 4), (None, 0.01))
    params = cell.init(jax.random.key(0))
    (hidden, memory), y = cell.step(params, cell.initial_state(params, (2,)), 9 * XS[:, 0])
    assert float(jnp.abs(memory).max()) == pytest.approx(0.01) and y is hidden


def test_frozen_params_get_no_gradient_and_inputs_do():
    inner = js.LSTM(3, 4)
    cell = js.Frozen(inner)
    params = cell.init(jax.random.key(0))
    of_params, of_inputs = jax.grad(lambda p, xs: cell.unroll(p, xs)[1].sum(), argnums=(0, 1))(params, XS)
    assert not any(leaf.any() for leaf in of_params)
    np.testing.assert_allclose(of_inputs, jax.grad(lambda xs: inner.unroll(params, xs)[1].sum())(XS), rtol=1e-6)


def test_mixed_precision_rounds_the_factors_of_every_product():
    cell = js.MixedPrecision(js.Stack((js.LSTM(3, 4), js.Dense(4, 2))))
    params = cell.init(jax.random.key(0))

    def products(params, xs):
        text = str(jax.make_jaxpr(jax.grad(lambda p: cell.unroll(p, xs)[1].sum()))(params))
        return text.count("dot_general"), text.count("precision=BF16_BF16_F32")

    count, rounded = products(params, XS)
    assert count == rounded > 4
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    count, rounded = products(half, XS.astype(jnp.bfloat16))
    assert count > 4 and rounded == 0
    assert jax.tree.map(jnp.result_type, cell.unroll(params, XS)) == jax.tree.map(
        jnp.result_type, cell.cell.unroll(params, XS)
    )


def test_what_is_attached_to_a_frozen_cell_is_not_frozen():
    conditioned = js.Conditioned(js.LSTM(5, 4), 2)
    cell = js.Frozen(conditioned)
    params, vector = cell.init(jax.random.key(0)), jnp.ones((2, 2))

    def total(layer):
        return lambda params, vector: layer.unroll(layer.attach(params, vector), XS)[1].sum()

    of_params, of_vector = jax.grad(total(cell), (0, 1))(params, vector)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_params))
    np.testing.assert_allclose(of_vector, jax.grad(total(conditioned), 1)(params, vector), rtol=1e-6)
    assert of_vector.any()


@pytest.mark.parametrize(
    "cell",
    [
        lambda: js.Zoneout(js.SLSTM(2, 4), 0.1),
        lambda: js.RandomState(js.Stack((js.MLSTM(2, 4), js.Dense(4, 2)))),
        lambda: js.LearnedState(js.MovingAverage(2, 3)),
        lambda: js.Clip(js.TransformerBlock(4, 2, window=3), 1.0),
        lambda: js.Phased(js.Delay(js.Elman(2, 3), 2)),
        lambda: js.Conditioned(js.SLSTM(2, 4), 3, input=None, state=True),
    ],
)
def test_a_state_whose_arrays_belong_together_is_left_alone(cell):
    with pytest.raises(TypeError, match="changes arrays of the state one by one, but those of .* belong together"):
        cell()


@pytest.mark.parametrize("wrap", [lambda cell: js.Zoneout(cell, 0.1), lambda cell: js.Clip(cell, 1.0), js.LearnedState])
def test_remat_that_would_save_nothing_is_refused(wrap):
    with pytest.raises(TypeError, match="unrolls step by step, so that Remat inside would do nothing: put Remat aro"):
        wrap(js.Stack((js.Remat(js.LSTM(2, 3)), js.Elman(3, 2))))
    wrap(js.Plain(js.LSTM(2, 3)))
    js.Remat(wrap(js.LSTM(2, 3)))


def test_wrong_use():
    with pytest.raises(TypeError, match="LearnedState and RandomState both say where the state starts"):
        js.LearnedState(js.RandomState(js.LSTM(2, 3)))
    with pytest.raises(TypeError, match="LearnedState needs a cell with a floating state to learn, but Dense"):
        js.LearnedState(js.Dense(2, 3)).init(jax.random.key(0))
    with pytest.raises(ValueError, match=re.escape("Clip needs a bound > 0, got -1")):
        js.Clip(js.LSTM(2, 3), (None, -1))
