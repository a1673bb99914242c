"""A layer for each part of a tuple, and the chains that it makes possible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

TIMES = jnp.array([0.0, 0.5, 2.0, 7.0, 7.5])[:, None]


def test_each_part_is_read_by_its_own_layer():
    layer = js.Parallel((js.LSTM(2, 3), js.GRU(2, 4)))
    params, xs = layer.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 5, 2))
    states, ys = layer.unroll(params, (xs, 2 * xs))
    for part, p, x, state, y in zip(layer.layers, params, (xs, 2 * xs), states, ys, strict=True):
        ours, theirs = (state, y), part.unroll(p, x)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert layer.input_size == (2, 2) and layer.output_size == (3, 4)


def test_something_stands_before_cells_that_read_pairs():
    embed, phased = js.Embed(4, 2), js.Phased(js.LSTM(2, 3))
    cell = js.Stack((js.Parallel((embed, js.Map("identity"))), phased))
    params, tokens = cell.init(jax.random.key(0)), jnp.array([0, 3, 1, 2, 2])
    vectors = embed.unroll(params[0][0], tokens)[1]
    expected = phased.unroll(params[1], (vectors, TIMES))
    jax.tree.map(np.testing.assert_array_equal, cell.unroll(params, (tokens, TIMES))[1], expected[1])
    joined = js.Stack((js.Parallel((embed, js.Dense(1, 2))), js.Concatenate((2, 2)), js.GRU(4, 3)))
    assert joined.unroll(joined.init(jax.random.key(0)), (tokens, TIMES))[1].shape == (5, 3)


def test_it_is_a_cell_if_all_its_layers_are():
    both = js.Bidirectional(js.GRU(2, 1), js.GRU(2, 1))
    assert isinstance(js.Parallel((js.GRU(2, 1), js.Map("identity"))), js.Cell)
    layer = js.Parallel((js.GRU(2, 1), both))
    assert not isinstance(layer, js.Cell)
    with pytest.raises(TypeError, match="Stack needs cells; Parallel.* use Sequential"):
        js.Stack((layer,))
    assert js.Sequential((layer, js.Concatenate((1, 2)))).output_size == 3


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match=r"Phased.* needs \(2, 1\) features, but it is given \(3, None\)"):
        js.Stack((js.Parallel((js.Embed(4, 3), js.Map("identity"))), js.Phased(js.LSTM(2, 3))))
    layer = js.Parallel((js.Dense(2, 3), js.Dense(2, 3)))
    params = layer.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"reads 2 inputs at each step, of ranks \(1, 1\), but got one array"):
        layer.unroll(params, jnp.ones((5, 2)))
    with pytest.raises(TypeError, match="Parallel of 2 layers needs as many inputs in a tuple, got 1"):
        layer.step(params, ((), ()), (jnp.ones(2),))
    halved = js.Parallel((js.Pyramid((js.Dense(2, 3), js.Dense(6, 3))), js.Dense(2, 3)))
    with pytest.raises(ValueError, match="needs layers that give as many steps as each other"):
        halved.unroll(halved.init(jax.random.key(0)), (jnp.ones((4, 2)), jnp.ones((4, 2))))


@pytest.mark.parametrize("kind", [js.Stack, js.Sequential, js.Parallel, js.Hierarchical, js.Pyramid])
def test_layers_that_are_given_without_their_tuple(kind):
    with pytest.raises(TypeError, match=rf"{kind.__name__} takes its layers as one tuple: {kind.__name__}\(\(LSTM\("):
        kind(js.LSTM(2, 3), js.Dense(3, 1))
    with pytest.raises(TypeError, match=r"needs a tuple of at least one layer, got LSTM.*: \w+\(\(LSTM\(.*\),\)\)"):
        kind(js.LSTM(2, 3))
    with pytest.raises(TypeError, match="needs a tuple of at least one layer, got None"):
        kind(None)


def test_a_list_of_layers_is_their_tuple():
    cell = js.Stack([js.LSTM(2, 3), js.Dense(3, 1)])  # pyright: ignore[reportArgumentType]
    assert cell == js.Stack((js.LSTM(2, 3), js.Dense(3, 1)))


def test_the_sizes_around_an_activation_are_checked():
    with pytest.raises(ValueError, match=r"Dense.* \(number 2\) needs 4 features, but it is given 3"):
        js.Stack((js.LSTM(2, 3), js.Map("relu"), js.Dense(4, 1)))
