"""Wrappers around layers that are no cells: what they compute, and which refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

READERS = (js.LSTM(4, 2), js.GRU(4, 2))
LAYER = js.Bidirectional(*READERS)
XS = jax.random.normal(jax.random.key(1), (3, 5, 4))
MASK = js.length_mask(jnp.array([5, 0, 2]), 5)


def read(layer, params, xs=XS):
    return layer.unroll(params, xs, mask=MASK)[1]


@pytest.mark.parametrize("wrapper", [js.Frozen, js.MixedPrecision, js.SpectralBound])
def test_around_a_layer_is_around_the_cells_inside(wrapper):
    around, inside = wrapper(LAYER), js.Bidirectional(*map(wrapper, READERS))
    params = jax.tree.map(lambda leaf: 3 * leaf, around.init(jax.random.key(0)))

    def loss(layer, params, xs):
        return jnp.sin(read(layer, params, xs)).sum()

    def jaxpr(layer):
        return str(jax.make_jaxpr(lambda xs: read(layer, params, xs))(XS))

    assert ("BF16" in jaxpr(around)) == (wrapper is js.MixedPrecision)
    ours, theirs = (jax.grad(loss, argnums=(1, 2))(layer, params, XS) for layer in (around, inside))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    assert any(leaf.any() for leaf in jax.tree.leaves(ours[0])) == (wrapper is not js.Frozen)


def test_shortcuts_around_a_layer():
    params = LAYER.init(jax.random.key(0))
    ys = read(LAYER, params)
    xs = jnp.where(MASK[..., None], XS, 0)
    np.testing.assert_array_equal(read(js.Residual(LAYER), params), xs + ys)
    np.testing.assert_array_equal(read(js.Skip(LAYER), params), jnp.concatenate([xs, ys], axis=-1))
    twice = js.Residual(js.Residual(LAYER))
    np.testing.assert_array_equal(read(twice, params), xs + (xs + ys))


def test_dropped_weights_of_a_layer():
    layer = js.WeightDrop(LAYER, rate=0.5)
    params = layer.init(jax.random.key(0))
    draw_key, _ = jax.random.split(jax.random.key(2))
    drawn = layer.draw(params, draw_key)
    for before, after in zip(params, drawn, strict=True):
        dropped = after.recurrent_kernel == 0
        assert 0 < dropped.sum() < dropped.size
        assert (after.input_kernel == before.input_kernel).all()
    with_key = layer.unroll(params, XS, mask=MASK, key=jax.random.key(2))[1]
    np.testing.assert_array_equal(with_key, read(LAYER, drawn))


def test_a_wrapper_is_a_cell_if_what_it_wraps_is_one():
    for wrapper in (js.Residual, js.Frozen, js.MixedPrecision, js.WeightNorm, js.Highway):
        around = wrapper(js.Residual(LAYER))
        assert isinstance(around, wrapper) and not isinstance(around, js.Cell)
        assert isinstance(wrapper(js.LSTM(4, 4)), js.Cell)
        assert js.from_json(js.to_json(around)) == around
    with pytest.raises(TypeError, match="Stack needs cells; Residual.* reads whole sequences: use Sequential"):
        js.Stack((js.Residual(LAYER),))
    with pytest.raises(AttributeError, match="Bidirectional has no step"):
        js.Residual(LAYER).step(LAYER.init(jax.random.key(0)), None, XS[:, 0])


def test_a_wrapper_passes_on_the_number_of_steps():
    layer = js.Frozen(js.Pyramid((js.LSTM(4, 3), js.LSTM(6, 4))))
    assert layer.output_mask(MASK).shape == (3, 3)
    chain = js.Sequential((layer, js.LSTM(4, 2)))
    assert read(chain, chain.init(jax.random.key(0))).shape == (3, 3, 2)
    for wrapper, verb in ((js.Residual, "add"), (js.Skip, "join"), (js.Highway, "mix")):
        around = wrapper(layer)
        with pytest.raises(
            ValueError, match=rf"cannot {verb} its input float32\[5,3,4\] .* the output float32\[3,3,4\]"
        ):
            read(around, around.init(jax.random.key(0)))


@pytest.mark.parametrize(
    "wrap",
    [
        js.LearnedState,
        js.RandomState,
        js.Plain,
        js.Remat,
        js.States,
        js.Feedback,
        js.LayerNorm,
        js.Phased,
        lambda layer: js.Zoneout(layer, 0.5),
        lambda layer: js.RecurrentDropout(layer, 0.5),
        lambda layer: js.Clip(layer, 1.0),
        lambda layer: js.Leaky(layer, 0.5),
        lambda layer: js.Delay(layer, 2),
        lambda layer: js.TimeSkip(layer, 2),
        lambda layer: js.Conditioned(layer, 2, state=True),
    ],
)
def test_what_needs_steps_refuses_a_layer_without(wrap):
    for layer in (LAYER, js.Residual(LAYER)):
        with pytest.raises(TypeError, match="needs a cell, but .* has no step: .* give it the cells inside"):
            wrap(layer)


def test_a_wrapper_of_ones_own_that_changes_the_step_needs_a_cell():
    class Double(js.Wrapper):
        def step(self, params, state, x, key=None):
            state, y = super().step(params, state, x, key)
            return state, 2 * y

    with pytest.raises(TypeError, match="Double needs a cell, but Bidirectional.* has no step"):
        Double(LAYER)
    assert isinstance(Double(js.GRU(2, 3)), js.Cell)
