"""Normalised products and weights, against the papers' equations in NumPy and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import expit

import jaxseq as js
from tests.numbers import random_params
from tests.peers import peer

TIME, INPUT, HIDDEN = 5, 3, 4
RNG = np.random.default_rng(0)
XS = RNG.normal(size=(TIME, INPUT))

pytestmark = pytest.mark.usefixtures("float64")


def layer_norm(z):
    return (z - z.mean()) / np.sqrt(z.var() + 1e-5)


def rms_norm(z):
    return z / np.sqrt((z**2).mean() + 1e-5)


def flat(weights):
    return weights.reshape(*weights.shape[:-2], -1)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["flat", "axis"])
def test_layer_norm_lstm(layout):
    cell = js.LayerNormLSTM(INPUT, HIDDEN, gate_layout=layout)
    p = random_params(RNG, cell)
    h, c, ys = np.zeros(HIDDEN), np.zeros(HIDDEN), []
    for x in XS:
        z = layer_norm(flat(p.input_kernel).T @ x) * flat(p.input_scale)
        z = z + layer_norm(flat(p.recurrent_kernel).T @ h) * flat(p.recurrent_scale) + flat(p.bias)
        i, f, g, o = np.split(z, 4)
        c = expit(f) * c + expit(i) * np.tanh(g)
        h = expit(o) * np.tanh(layer_norm(c) * p.cell_scale + p.cell_shift)
        ys.append(h)
    state, ours = cell.unroll(p, XS)
    close(ours, ys)
    close(state.cell, c)


@pytest.mark.parametrize(("wrapper", "norm"), [(js.LayerNorm, layer_norm), (js.RMSNorm, rms_norm)])
def test_normalised_products_of_a_gru(wrapper, norm):
    cell = wrapper(js.GRU(INPUT, HIDDEN))
    p = random_params(RNG, cell)
    h, ys = np.zeros(HIDDEN), []
    for x in XS:
        from_input = norm(flat(p.cell.input_kernel).T @ x) * flat(p.input_scale) + flat(p.cell.bias)
        recurrent = norm(flat(p.cell.recurrent_kernel).T @ h) * flat(p.recurrent_scale) + flat(p.cell.recurrent_bias)
        (r, z, n), (u_r, u_z, u_n) = np.split(from_input, 3), np.split(recurrent, 3)
        z = expit(z + u_z)
        h = (1 - z) * np.tanh(n + expit(r + u_r) * u_n) + z * h
        ys.append(h)
    close(cell.unroll(p, XS)[1], ys)


def test_weight_norm_is_torchs():
    torch = peer("torch")
    from torch.nn.utils.parametrizations import weight_norm

    theirs = torch.nn.LSTM(INPUT, HIDDEN, dtype=torch.float64)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight_norm(theirs, name, dim=0)
    weights = dict(theirs.named_parameters())
    with torch.no_grad():  # other lengths than those of the directions
        for name in ("weight_ih_l0", "weight_hh_l0"):
            weights[f"parametrizations.{name}.original0"].mul_(1.5)

    def ours(name):
        return weights[name].detach().numpy().T.reshape(-1, 4, HIDDEN)

    def kernel(name):
        return ours(f"parametrizations.{name}.original1"), ours(f"parametrizations.{name}.original0")[0]

    (direction, scale), (recurrent, recurrent_scale) = kernel("weight_ih_l0"), kernel("weight_hh_l0")
    bias = ours("bias_ih_l0")[0] + ours("bias_hh_l0")[0]
    params = js.WeightNormParams(js.GatedParams(direction, recurrent, bias), (scale, recurrent_scale))
    close(js.WeightNorm(js.LSTM(INPUT, HIDDEN)).unroll(params, XS)[1], theirs(torch.tensor(XS))[0].detach().numpy())


def test_weight_norm_starts_as_the_cell():
    inner = js.Stack((js.GRU(INPUT, HIDDEN), js.Dense(HIDDEN, 2)))
    cell = js.WeightNorm(inner)
    params = cell.init(jax.random.key(0))
    close(cell.unroll(params, XS)[1], inner.unroll(params.cell, XS)[1])
    zero = jax.tree.map(jnp.zeros_like, params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(lambda p: cell.unroll(p, XS)[1].sum())(zero)))


def test_weight_norm_of_heads_and_windows():
    cell = js.WeightNorm(js.TransformerBlock(8, 2, window=4))
    assert [scale.shape for scale in cell.init(jax.random.key(0)).scales] == [(1, 3, 2, 4), (1, 32)]
    cell = js.WeightNorm(js.ConvLSTM((4, 4, 2), 3, 3))
    assert [scale.shape for scale in cell.init(jax.random.key(0)).scales] == [(4, 3), (4, 3)]


def test_spectral_bound():
    lstm = js.LSTM(INPUT, HIDDEN)
    cell = js.SpectralBound(lstm, bound=1.5)
    params = random_params(RNG, cell)
    small = params.recurrent_kernel[:, 0] / np.linalg.norm(params.recurrent_kernel[:, 0], 2)
    params = params._replace(recurrent_kernel=np.stack([small, *np.moveaxis(params.recurrent_kernel, 1, 0)[1:]], 1))
    bounded = np.asarray(cell.inner(params).recurrent_kernel)
    close([np.linalg.norm(bounded[:, gate], 2) for gate in range(4)], [1, 1.5, 1.5, 1.5])
    close(bounded[:, 0], small)
    close(bounded[:, 1] * (params.recurrent_kernel[0, 1, 0] / bounded[0, 1, 0]), params.recurrent_kernel[:, 1])
    close(cell.unroll(params, XS)[1], lstm.unroll(params._replace(recurrent_kernel=bounded), XS)[1])
    check_grads(lambda kernel: cell.unroll(params._replace(recurrent_kernel=kernel), XS)[1], (bounded * 1.3,), order=1)


def test_what_is_multiplied_is_bounded():
    """The blocks of an sLSTM, and what the groups of a Clockwork RNN read, whatever else their kernels hold."""
    cell = js.SpectralBound(js.SLSTM(INPUT, HIDDEN, heads=2), bound=0.5)
    params = random_params(RNG, cell)
    params.recurrent_kernel[:2] *= 0.01
    kernel = cell.inner(params).recurrent_kernel
    close(kernel[:2], params.recurrent_kernel[:2])  # a small block is left as it is beside a large one
    close([np.linalg.norm(kernel[2:, gate], 2) for gate in range(4)], [0.5] * 4)
    cell = js.SpectralBound(js.ClockworkRNN(INPUT, HIDDEN, periods=(1, 2)), bound=0.5)
    params = random_params(RNG, cell)
    kernel = cell.inner(params).recurrent_kernel[:, 0]
    close(np.linalg.norm(kernel, 2), 0.5)
    read = params.recurrent_kernel[:, 0] * np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    close(kernel, read * 0.5 / np.linalg.norm(read, 2))


def test_the_units_of_an_slstm_have_lengths_of_their_own():
    cell = js.WeightNorm(js.SLSTM(INPUT, HIDDEN, heads=2))
    params = random_params(RNG, cell)
    kernel = np.asarray(cell.inner(params).recurrent_kernel).reshape(2, 2, 4, 2)  # head, recurrent, gate, unit
    lengths = np.linalg.norm(kernel, axis=1)
    close(np.moveaxis(lengths, 0, 1).reshape(8, 2), np.abs(params.scales[1]))


@pytest.mark.parametrize("wrap", [js.WeightNorm, js.SpectralBound])
def test_kernels_are_computed_before_noise_and_memory(wrap):
    cell = wrap(js.Conditioned(js.RecurrentDropout(js.LSTM(INPUT + 2, HIDDEN), 0.5), 2))
    params, vector, key = random_params(RNG, cell), jnp.arange(2.0), jax.random.key(3)
    plain = cell.cell.attach(cell.inner(params), vector)
    attached = cell.attach(params, vector)
    close(cell.unroll(attached, XS, key=key)[1], cell.cell.unroll(plain, XS, key=key)[1])
    assert cell.attach(attached, None) is params


def test_wrong_use():
    with pytest.raises(TypeError, match="SpectralBound and WeightNorm both change kernels and would undo each other"):
        js.SpectralBound(js.Stack((js.WeightNorm(js.LSTM(2, 3)),)))
    with pytest.raises(TypeError, match="WeightNorm and WeightDrop both change kernels"):
        js.WeightNorm(js.WeightDrop(js.LSTM(2, 3), 0.5))
    with pytest.raises(TypeError, match=r"LayerNorm works on the products of a gated cell .* but GRUv1"):
        js.LayerNorm(js.GRUv1(2, 3))
    with pytest.raises(TypeError, match="normalises the plain products .* LayerNorm goes next to the cell"):
        js.LayerNorm(js.RecurrentDropout(js.LSTM(2, 3), 0.5))
    with pytest.raises(TypeError, match="Map.* has no input or recurrent kernel"):
        js.WeightNorm(js.Map("tanh"))
    with pytest.raises(ValueError, match="SpectralBound needs a bound > 0, got 0.0"):
        js.SpectralBound(js.LSTM(2, 3), bound=0)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_feature_norm_is_that_of_torch(kind):
    torch = peer("torch")
    theirs = {"layer": torch.nn.LayerNorm, "rms": torch.nn.RMSNorm}[kind](HIDDEN, eps=1e-3, dtype=torch.float64)
    cell = js.FeatureNorm(HIDDEN, kind=kind, epsilon=1e-3)
    params, xs = random_params(RNG, cell), 3 + 2 * RNG.normal(size=(2, TIME, HIDDEN))
    pairs = zip(theirs.parameters(), jax.tree.leaves(params), strict=True)  # scale, and shift where there is one
    with torch.no_grad():
        for parameter, leaf in pairs:
            parameter.copy_(torch.tensor(leaf))
    inputs = torch.tensor(xs, requires_grad=True)
    outputs = theirs(inputs)
    outputs.sin().sum().backward()

    def loss(params, xs):
        ys = cell.unroll(params, xs)[1]
        return jnp.sin(ys).sum(), ys

    (of_params, of_xs), ys = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, xs)
    close(ys, outputs.detach().numpy())
    close(of_xs, inputs.grad.numpy())
    for parameter, leaf in zip(theirs.parameters(), jax.tree.leaves(of_params), strict=True):
        close(leaf, parameter.grad.numpy())


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_feature_norm_in_bfloat16_sums_in_float32(kind):
    """In bfloat16 the mean of 4096 numbers near 100 is off by more than they differ from each other."""
    cell = js.FeatureNorm(4096, kind=kind)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), cell.init(jax.random.key(0)))
    x = jnp.asarray(100 + 4 * RNG.normal(size=4096), jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    expected = layer_norm(wide) if kind == "layer" else rms_norm(wide)
    _, y = cell.step(params, (), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=2**-8 * np.abs(expected).max())


def test_feature_norm_errors():
    with pytest.raises(ValueError, match="kind=.* got 'batch'"):
        js.FeatureNorm(3, kind="batch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs a finite epsilon of at least 1.2e-38, got 0.0"):
        js.FeatureNorm(3, epsilon=0)
    with pytest.raises(ValueError, match="got inputs with 4 features"):
        js.FeatureNorm(3).unroll(js.FeatureNorm(3).init(jax.random.key(0)), jnp.ones((2, 4)))
    with pytest.raises(TypeError, match=r"RMSNorm normalises the products inside .*, got 64: FeatureNorm\(size\)"):
        js.RMSNorm(64)  # pyright: ignore[reportArgumentType]
