"""Initialisers reach every cell of a layer, keep shapes and dtypes, and draw what their papers say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests import zoo

STACK = js.Stack((js.Embed(5, 6), js.LSTM(6, 8), js.Residual(js.GRU(8, 8)), js.Dense(8, 5)))


def params_of(layer):
    return layer.init(jax.random.key(0))


def changed(before, after):
    """The paths of the arrays that differ; shapes and dtypes must not."""
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves_with_path(after), strict=True)
    found = set()
    for (path, old), (_, new) in pairs:
        assert old.shape == new.shape and old.dtype == new.dtype
        if not np.array_equal(old, new):
            found.add(jax.tree_util.keystr(path))
    return found


def test_each_touches_its_role_in_every_cell():
    params, key = params_of(STACK), jax.random.key(1)
    recurrent = {"[1].recurrent_kernel", "[2].recurrent_kernel"}
    inputs = {"[1].input_kernel", "[2].input_kernel", "[3].kernel"}
    biases = {"[1].bias", "[2].bias"}
    assert changed(params, js.initializers.orthogonal(STACK, params, key)) == recurrent
    assert changed(params, js.initializers.uniform(STACK, params, key)) == recurrent
    assert changed(params, js.initializers.identity(STACK, params)) == recurrent
    assert changed(params, js.initializers.glorot(STACK, params, key)) == inputs
    assert changed(params, js.initializers.uniform(STACK, params, key, role="input")) == inputs
    assert changed(params, js.initializers.forget_bias(STACK, params, 3.0)) == biases
    assert changed(params, js.initializers.chrono(STACK, params, key, max_time=50)) == biases


def test_gates_are_drawn_apart_and_orthogonal():
    cell = js.LSTM(3, 8)
    kernel = np.asarray(js.initializers.orthogonal(cell, params_of(cell), jax.random.key(1), scale=2).recurrent_kernel)
    for gate in range(4):
        np.testing.assert_allclose(kernel[:, gate] @ kernel[:, gate].T, 4 * np.eye(8), atol=1e-5)
    assert np.abs(kernel[:, 0] - kernel[:, 1]).max() > 0.1


@pytest.mark.parametrize("function", ["glorot", "uniform"])
def test_bounds(function):
    cell = js.LSTM(20, 50)
    kernel = getattr(js.initializers, function)(cell, params_of(cell), jax.random.key(1), role="input").input_kernel
    bound = {"glorot": np.sqrt(6 / 70), "uniform": 1 / np.sqrt(50)}[function]
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    wide = js.initializers.uniform(cell, params_of(cell), jax.random.key(1), scale=3.0).recurrent_kernel
    assert 2.9 < np.abs(wide).max() <= 3


def test_convolutions_count_their_places_as_features():
    cell = js.ConvLSTM((6, 2), 4, kernel_size=3)
    params, key = params_of(cell), jax.random.key(1)
    kernel = np.asarray(js.initializers.orthogonal(cell, params, key).recurrent_kernel)
    for gate in range(4):
        columns = kernel[:, :, gate].reshape(12, 4)
        np.testing.assert_allclose(columns.T @ columns, np.eye(4), atol=1e-5)
    assert np.abs(js.initializers.glorot(cell, params, key).input_kernel).max() <= np.sqrt(6 / (3 * 2 + 3 * 4))
    changed(params, js.initializers.chrono(cell, params, key, max_time=9))
    with pytest.raises(ValueError, match="maps 4 x 3 features to 4"):
        js.initializers.identity(cell, params)


GATED = [
    name for name, line in zoo.ZOO.items() if len(getattr(line.layer, "gates", ())) > 1 and not name.endswith("_axis")
]
NO_GATE = ["gated_antisymmetric_rnn", "rg_lru"]  # z is a speed; r scales a logarithm
SEVERAL = ["lstm_2d", "recurrent_highway"]


def kept_of(layer):
    """How much of its memory a cell keeps in one step, as a function of its params."""

    @jax.jit
    def kept(params):
        state = jax.tree.map(jnp.ones_like, layer.initial_state(params))
        if "stabilizer" in state._fields:
            state = state._replace(stabilizer=jnp.zeros_like(state.stabilizer))
        memory = next(name for name in ("memory", "cell", "hidden") if name in state._fields)

        def new(old):
            after, _ = layer.step(params, state._replace(**{memory: old}), layer.zero_input(params))
            array = getattr(after, memory)
            log_scale = getattr(after, "stabilizer", jnp.zeros(()))
            return array * jnp.exp(jnp.expand_dims(log_scale, range(log_scale.ndim, array.ndim)))

        _, push = jax.jvp(new, (getattr(state, memory),), (jnp.ones_like(getattr(state, memory)),))
        return push[0] if isinstance(layer, js.LSTM2D) else push  # of the first place, which has none to its left

    return kept


@pytest.mark.parametrize("name", [name for name in GATED if name not in NO_GATE])
def test_the_gate_that_keeps_has_the_bias(name):
    """Measured through a step of every gated cell, whose other params are 0."""
    layer = zoo.ZOO[name].layer
    params = jax.tree.map(jnp.zeros_like, layer.init(jax.random.key(0)))
    kept, sigma = kept_of(layer), 1 / (1 + np.exp(-2))
    expected = {"recurrent_highway": sigma**3, "min_lstm": sigma / (sigma + 0.5)}.get(name, sigma)
    if name == "lstm_activations":
        expected = 0.5 + 0.25 * 2  # its gate is piecewise linear
    np.testing.assert_allclose(kept(js.initializers.forget_bias(layer, params, 2.0)), expected, rtol=1e-5)
    chrono = functools.partial(js.initializers.chrono, layer, params, jax.random.key(1), max_time=50)
    if name in SEVERAL:
        with pytest.raises(TypeError, match="chrono sets one gate that keeps the state, but .* has several"):
            chrono()
    elif name != "lstm_activations":
        times = 1 / (1 - kept(chrono()))
        assert (2 - 1e-4 < times).all() and (times < 50 + 1e-2).all() and (times.std() > 0.1 or layer.hidden_size == 1)


@pytest.mark.parametrize("name", NO_GATE)
def test_a_gate_that_does_not_keep_is_not_taken_for_one(name):
    layer = zoo.ZOO[name].layer
    with pytest.raises(TypeError, match="sets the bias b of a gate .* that keeps the state, .* but .* has none"):
        js.initializers.forget_bias(layer, params_of(layer))


@pytest.mark.parametrize("wrap", [js.WeightNorm, js.SpectralBound, js.Frozen])
def test_kernels_are_in_effect_what_was_promised(wrap):
    """Also where a wrapper computes them, and whatever it held before; those of the other role stay."""
    cell = wrap(js.Stack((js.LSTM(2, 4), js.SLSTM(4, 4, heads=2))))
    params = jax.tree.map(lambda leaf: 3 * leaf, params_of(cell))
    before, after = cell.inner(params), cell.inner(js.initializers.orthogonal(cell, params, jax.random.key(1)))
    for gate in range(4):
        kernel = after[0].recurrent_kernel[:, gate]
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(4), atol=1e-5)
        for block in np.split(np.asarray(after[1].recurrent_kernel[:, gate]), 2):
            np.testing.assert_allclose(block @ block.T, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(after[0].input_kernel, before[0].input_kernel, rtol=1e-5)
    scaled = cell.inner(js.initializers.identity(cell, params, scale=0.5))
    np.testing.assert_allclose(scaled[0].recurrent_kernel[:, 1], np.eye(4) / 2, atol=1e-6)


def test_what_a_group_does_not_read_stays_0():
    cell = js.ClockworkRNN(2, 6, periods=(1, 2, 3))
    kernel = js.initializers.uniform(cell, params_of(cell), jax.random.key(1)).recurrent_kernel[:, 0]
    assert not kernel[:2, 2:].any() and not kernel[2:4, 4:].any() and (kernel[4:] != 0).all()


def test_layers_of_one_shape_differ():
    cell = js.Stack((js.LSTM(4, 4), js.LSTM(4, 4)))
    for function in (js.initializers.orthogonal, lambda *args: js.initializers.chrono(*args, max_time=9)):
        first, second = function(cell, params_of(cell), jax.random.key(1))
        assert changed(first, second)


def test_identity_of_a_rectified_elman_keeps_what_it_has():
    cell = js.Elman(2, 3, activation="relu")
    params = js.initializers.identity(cell, params_of(cell), scale=0.5)
    state, _ = cell.unroll(params, jnp.zeros((4, 2)), js.ElmanState(jnp.array([1.0, 2.0, 4.0])))
    np.testing.assert_array_equal(state.hidden, np.array([1, 2, 4]) / 16)


@pytest.mark.parametrize("cell", [js.LSTM(2, 400), js.GRU(2, 400), js.CoupledLSTM(2, 400)])
def test_chrono_forgets_after_one_to_max_time_steps(cell):
    params = js.initializers.chrono(cell, params_of(cell), jax.random.key(1), max_time=50)
    keep = cell.gates.index("f" if "f" in cell.gates else "z")
    times = np.exp(np.asarray(params.bias[keep]))
    assert 1 <= times.min() < 2 and 48 < times.max() <= 49
    assert abs(times.mean() - 25) < 3  # uniform between
    if "i" in cell.gates:
        np.testing.assert_array_equal(params.bias[cell.gates.index("i")], -params.bias[keep])


def test_the_two_biases_of_a_gru_add_up():
    cell = js.GRU(2, 3)
    params = params_of(cell)._replace(recurrent_bias=jnp.ones((3, 3)))
    params = js.initializers.forget_bias(cell, params, 2.0)
    np.testing.assert_array_equal((params.bias + params.recurrent_bias)[1], 2.0)
    np.testing.assert_array_equal(params.recurrent_bias[jnp.array([0, 2])], 1.0)


def test_dtype_and_tracing():
    def all_of_them(layer, params, key):
        params = js.initializers.orthogonal(layer, params, key)
        params = js.initializers.uniform(layer, params, key, role="input")
        return js.initializers.chrono(layer, params, key, max_time=30)

    cell, key = js.LSTM(2, 3), jax.random.key(1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(cell))
    made = jax.jit(functools.partial(all_of_them, cell))(params, key)
    assert changed(params, made) == {".input_kernel", ".recurrent_kernel", ".bias"}
    kernel = made.recurrent_kernel.astype(float)[:, 2]
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(3), atol=0.02)

    with jax.enable_x64(True):
        for dtype in (jnp.bfloat16, jnp.float64):
            params = jax.tree.map(
                lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), jax.eval_shape(STACK.init, key)
            )
            made = jax.eval_shape(functools.partial(all_of_them, STACK), params, key)
            assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
            assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}


def test_errors():
    elman, projected, embed = js.Elman(2, 3), js.ProjectedLSTM(2, 4, 3), js.Embed(4, 3)
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="chrono sets the bias b of a gate .* that keeps the state.*Elman.*has none"):
        js.initializers.chrono(elman, params_of(elman), key, max_time=10)
    with pytest.raises(TypeError, match="forget_bias sets the bias"):
        js.initializers.forget_bias(elman, params_of(elman))
    with pytest.raises(ValueError, match="chrono needs max_time > 2 steps, the longest memory, got 2"):
        js.initializers.chrono(js.LSTM(2, 3), params_of(js.LSTM(2, 3)), key, max_time=2)
    with pytest.raises(ValueError, match="maps 3 features to 4: orthogonal serves it"):
        js.initializers.identity(projected, params_of(projected))
    with pytest.raises(TypeError, match=r"Embed.* has no recurrent kernel: no array of its axes\(\) begins with"):
        js.initializers.orthogonal(embed, params_of(embed), key)
    with pytest.raises(ValueError, match="role of a kernel is .* got 'output'"):
        js.initializers.glorot(elman, params_of(elman), key, role="output")
    with pytest.raises(ValueError, match="got params of another layer"):
        js.initializers.orthogonal(elman, params_of(embed), key)
