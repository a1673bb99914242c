"""The reservoir: its equations, its spectral radius, and the numbers that are tuned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.reservoirs import spectral_radius
from jaxseq.reservoirs.spectrum import _by_squaring

pytestmark = pytest.mark.usefixtures("float64")


def test_equations_by_numpy():
    cell = js.Reservoir(
        2, 5, radius=0.7, leak=0.3, input_scale=(0.5, 2.0), bias_scale=0.4, density=0.4, activation="softsign"
    )
    params = cell.init(jax.random.key(0))
    xs = np.random.default_rng(0).normal(size=(6, 2))
    kernel, recurrent, bias = (np.asarray(leaf) for leaf in params[:3])
    h, expected = np.zeros(5), []
    for x in xs:
        z = (x * [0.5, 2.0]) @ kernel[:, 0] + 0.7 * (h @ recurrent[:, 0]) + 0.4 * bias[0]
        h = (1 - 0.3) * h + 0.3 * z / (1 + np.abs(z))
        expected.append(h)
    state, ys = cell.unroll(params, xs)
    np.testing.assert_allclose(ys, expected, rtol=1e-12)
    np.testing.assert_allclose(state.hidden, h, rtol=1e-12)


@pytest.mark.parametrize(("size", "density"), [(1, 1.0), (3, 0.01), (40, 0.05), (100, 0.1), (60, 1.0)])
def test_kernels_are_sparse_and_of_radius_1(size, density):
    params = jax.jit(js.Reservoir(3, size, density=density).init)(jax.random.key(size))
    kernel = np.asarray(params.recurrent_kernel[:, 0])
    assert abs(np.abs(np.linalg.eigvals(kernel)).max() - 1) < 1e-7
    assert (np.count_nonzero(kernel, axis=0) == max(1, round(density * size))).all()
    assert np.abs(params.input_kernel).max() <= 1 and np.abs(params.bias).max() <= 1
    chosen = np.count_nonzero(kernel, axis=1)  # by whom units are read: chance, and not the same for all
    assert size < 40 or density == 1 or chosen.std() > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_spectral_radius_is_that_of_numpy(dtype):
    random = np.random.default_rng(3)
    matrices = random.normal(size=(6, 12, 12))
    matrices[1] = np.linalg.qr(matrices[1])[0]  # all of magnitude 1
    matrices[2] = np.triu(matrices[2])
    matrices[3] *= 1e-12
    matrices[4] *= 1e12
    matrices[5] = np.kron(np.eye(6), [[0, 3], [-3, 0]])  # pairs ±3i
    expected = np.abs(np.linalg.eigvals(matrices)).max(axis=-1)
    found = jax.jit(spectral_radius)(jnp.asarray(matrices, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=2e-6 if dtype == jnp.float32 else 1e-7)


def test_spectral_radius_at_the_ends_of_the_range_and_far_from_normal():
    for size in (1e38, 1e-30):
        np.testing.assert_allclose(spectral_radius(jnp.diag(jnp.array([1.0, 0.5])) * size), size, rtol=1e-6)
    delays = 0.9 * jnp.eye(50) + jnp.eye(50, k=1)
    np.testing.assert_allclose(spectral_radius(delays), 0.9, rtol=1e-6)
    assert jnp.isnan(jax.grad(spectral_radius)(jnp.full((2, 2), jnp.nan))).all()


@pytest.mark.parametrize("matrix", [np.diag([3.0, 1.0]), [[0.0, 2.0], [-2.0, 0.0]], np.zeros((3, 3))])
def test_by_squaring_the_radius_is_the_same(matrix):
    np.testing.assert_allclose(
        _by_squaring(jnp.asarray(matrix, float)), spectral_radius(jnp.asarray(matrix, float)), rtol=1e-5
    )


def test_spectral_radius_of_what_dies_out_is_0():
    assert spectral_radius(jnp.triu(jnp.ones((4, 4)), 1)) == 0
    assert spectral_radius(jnp.zeros((4, 4))) == 0
    for matrix in (jnp.triu(jnp.ones((4, 4)), 1), jnp.zeros((4, 4))):
        assert not jax.grad(spectral_radius)(matrix).any()
    with pytest.raises(ValueError, match=r"needs square matrices \[\*batch, units, units\], got \(2, 3\)"):
        spectral_radius(jnp.ones((2, 3)))
    for dtype in (int, complex):
        with pytest.raises(TypeError, match=rf"needs matrices of floating numbers, got {dtype.__name__}\w+\[2,2\]"):
            spectral_radius(jnp.ones((2, 2), dtype))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_spectral_radius_of_small_and_large_numbers(size):
    matrix = np.array([[1, 2, 0], [-1, 0.5, 0.3], [0.2, 0, 0.1]])
    expected = np.abs(np.linalg.eigvals(matrix)).max() * size
    np.testing.assert_allclose(spectral_radius(jnp.asarray(matrix * size, jnp.float32)), expected, rtol=1e-6)


def test_derivatives_of_the_spectral_radius_are_differences():
    """Of a complex pair, of a real eigenvalue above 0 and below, and of random matrices; under vmap, of both orders."""
    random = np.random.default_rng(3)
    matrices = random.normal(size=(5, 3, 3))
    matrices[0] = [[1, 2, 0], [-1, 0.5, 0.3], [0.2, 0, 0.1]]
    matrices[1], matrices[2] = np.diag([2.0, 1, 0]) + 0.1 * matrices[1], np.diag([-2.0, 1, 0]) + 0.1 * matrices[2]
    directions = random.normal(size=matrices.shape)

    def along(step, matrix, direction):
        return spectral_radius(matrix + step * direction)

    def radii(step):
        return np.abs(np.linalg.eigvals(matrices + step * directions)).max(-1)

    each = (jnp.zeros(len(matrices)), matrices, directions)
    slope = jax.grad(along)
    slopes, bends = jax.jit(jax.vmap(lambda *given: (slope(*given), jax.grad(slope)(*given))))(*each)
    np.testing.assert_allclose(slopes, (radii(1e-6) - radii(-1e-6)) / 2e-6, rtol=1e-6)
    np.testing.assert_allclose(bends, (radii(1e-3) - 2 * radii(0) + radii(-1e-3)) / 1e-6, rtol=1e-3)
    small = jax.grad(spectral_radius)(jnp.asarray(1e-30 * matrices[0], jnp.float32))
    assert (small * directions[0]).sum() == pytest.approx(float(slopes[0]), rel=1e-4)


def test_settings_are_tried_under_vmap():
    cell, xs = js.Reservoir(1, 8), np.random.default_rng(0).normal(size=(20, 1))
    params = cell.init(jax.random.key(0))
    radii = jnp.array([0.1, 0.9])
    ys = jax.vmap(lambda radius: cell.unroll(params._replace(radius=radius), xs)[1])(radii)
    for radius, expected in zip(radii, ys, strict=True):
        alone = js.Reservoir(1, 8, radius=float(radius))
        np.testing.assert_allclose(alone.unroll(alone.init(jax.random.key(0)), xs)[1], expected, rtol=1e-12)
    many = jax.vmap(cell.init)(jax.random.split(jax.random.key(1), 3))
    assert jax.vmap(lambda params: cell.unroll(params, xs)[1])(many).shape == (3, 20, 8)


def test_numbers_have_gradients_and_under_frozen_none():
    cell, xs = js.Reservoir(1, 8, leak=0.5, bias_scale=0.2), np.random.default_rng(0).normal(size=(20, 1))
    params = cell.init(jax.random.key(0))

    def loss(params, cell):
        return jnp.sum(cell.unroll(params, xs)[1] ** 2)

    gradient = jax.grad(loss)(params, cell)
    for name in ("radius", "leak", "input_scale", "bias_scale"):
        ends = [loss(params._replace(**{name: getattr(params, name) + step}), cell) for step in (1e-6, -1e-6)]
        np.testing.assert_allclose(getattr(gradient, name), (ends[0] - ends[1]) / 2e-6, rtol=1e-6)
    frozen = jax.grad(loss)(params, js.Frozen(cell))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))


def test_noise_needs_a_key_and_has_its_deviation():
    cell = js.Reservoir(1, 500, noise=0.01, density=0.004, activation="identity")
    params = cell.init(jax.random.key(0))
    _, quiet = cell.unroll(params, jnp.zeros((1, 1)))
    _, noisy = cell.unroll(params, jnp.zeros((1, 1)), key=jax.random.key(1))
    assert not quiet.any()
    assert abs(noisy.std() / 0.01 - 1) < 0.1


def test_numbers_of_numpy_are_plain():
    for scale in (np.float32(0.5), [np.float64(0.5), 0.25], np.int64(2)):
        cell = js.Reservoir(2, 3, input_scale=scale, radius=np.float32(0.5))
        again = eval(repr(cell), vars(js))
        assert again == cell == js.from_json(js.to_json(cell)) and hash(again) == hash(cell)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"leak": 0.0}, ValueError, "needs 0 < leak <= 1, got 0.0"),
        ({"density": 1.5}, ValueError, "needs 0 < density <= 1, got 1.5"),
        ({"radius": -1.0}, ValueError, "needs a finite radius >= 0, got -1.0"),
        ({"noise": float("nan")}, ValueError, "Reservoir needs a number noise, got nan"),
        ({"input_scale": (1.0, float("nan"))}, ValueError, "Reservoir needs a number input_scale, got nan"),
        ({"input_scale": (1.0, np.ones(2))}, TypeError, r"but input_scale holds array\(\[1., 1.\]\)"),
        ({"input_scale": "big"}, TypeError, "needs a number, or a tuple of numbers, as input_scale, got 'big'"),
        ({"input_scale": (1.0,)}, ValueError, "needs one input_scale, or 2, one for each input, got 1"),
        ({"activation": "tan"}, ValueError, "No activation is called 'tan'"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        js.Reservoir(2, 3, **options)
