"""A vector that conditions a sequence, against the equations, with one vector a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxseq as js

BATCH, TIME, SIZE = 3, 4, 5

pytestmark = pytest.mark.usefixtures("float64")


def vectors(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def test_the_vector_is_an_extra_input_of_each_hidden_unit():
    """Goodfellow et al., figure 10.9: h(t) = tanh(b + W h(t-1) + U x(t) + R v)."""
    cell = js.Conditioned(js.Elman(2 + SIZE, 4), SIZE)
    params = cell.init(jax.random.key(0))
    xs, v = vectors(BATCH, TIME, 2), 2 * vectors(BATCH, SIZE)
    U, R = np.split(np.asarray(params.cell.input_kernel[:, 0]), [2])
    W = np.asarray(params.cell.recurrent_kernel[:, 0])
    hidden, expected = np.zeros((BATCH, 4)), []
    for t in range(TIME):
        hidden = np.tanh(xs[:, t] @ U + hidden @ W + v @ R)
        expected.append(hidden)
    _, ys = cell.unroll(cell.attach(params, v), xs)
    np.testing.assert_allclose(ys, np.stack(expected, 1), rtol=1e-12)


def test_the_vector_is_a_map_to_the_initial_state_and_a_sum():
    cell = js.Conditioned(js.LSTM(2, 4), SIZE, input="add", state=True)
    params = cell.init(jax.random.key(0))
    xs, v = vectors(BATCH, TIME, 2), vectors(BATCH, SIZE)
    hidden, memory = (np.tanh(v @ dense.kernel + (dense.bias + 0.5)) for dense in params.state)
    params = params._replace(state=tuple(dense._replace(bias=dense.bias + 0.5) for dense in params.state))
    state = js.LSTMState(jnp.asarray(hidden), jnp.asarray(memory))
    expected = cell.cell.unroll(params.cell, xs + (v @ params.input_kernel)[:, None], state)
    attached = cell.attach(params, v)
    actual = cell.unroll(attached, xs)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12)
    start = cell.initial_state(attached, (BATCH,))
    np.testing.assert_allclose(start.cell, memory, rtol=1e-12)


@pytest.mark.parametrize("how", ["concatenate", "add"])
def test_one_vector_a_row_is_each_row_by_itself(how):
    cell = js.Conditioned(js.GRU(2 + SIZE * (how == "concatenate"), 4), SIZE, input=how, state=True)
    params = cell.init(jax.random.key(0))
    xs, v = vectors(BATCH, TIME, 2), vectors(BATCH, SIZE)
    mask, reset = jnp.ones((BATCH, TIME), bool).at[1, 2:].set(False), jnp.zeros((BATCH, TIME), bool).at[0, 2].set(True)

    def row(v, xs, mask, reset):
        return cell.unroll(cell.attach(params, v), xs, mask=mask, reset=reset)

    together = row(v, xs, mask, reset)
    for index in range(BATCH):
        alone = row(v[index], xs[index], mask[index], reset[index])
        for a, e in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[index], e, rtol=1e-12)
    for a, e in zip(jax.tree.leaves(jax.vmap(row)(v, xs, mask, reset)), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12)


def test_the_state_may_have_further_axes():
    """As in a search that keeps several beams a row: the vector is that of the row."""
    cell = js.Conditioned(js.Elman(2 + SIZE, 4), SIZE, state=True)
    params = cell.attach(cell.init(jax.random.key(0)), vectors(BATCH, SIZE))
    beams = 2
    x = vectors(BATCH, beams, 2)
    state, _ = cell.step(params, cell.initial_state(params, (BATCH, beams)), x)
    for beam in range(beams):
        one, _ = cell.step(params, cell.initial_state(params, (BATCH,)), x[:, beam])
        np.testing.assert_allclose(state.hidden[:, beam], one.hidden, rtol=1e-12)


def test_a_closed_loop_runs_from_one_vector_a_row():
    cell = js.Feedback(js.Conditioned(js.Stack((js.Elman(2 + SIZE, 4), js.Dense(4, 2))), SIZE))
    params = cell.attach(cell.init(jax.random.key(0)), vectors(BATCH, SIZE))
    _, ys = cell.unroll(params, None, cell.initial_state(params, (BATCH,)), length=TIME)
    assert ys.shape == (BATCH, TIME, 2)
    before = jnp.concatenate([jnp.zeros((BATCH, 1, 2)), ys[:, :-1]], axis=1)
    np.testing.assert_allclose(cell.cell.unroll(params, before)[1], ys, rtol=1e-12)


def test_gradients_reach_the_kernels_through_the_attached_vector():
    cell = js.Conditioned(js.Elman(2, 4), SIZE, input="add", state=True)
    params, xs, v = cell.init(jax.random.key(0)), vectors(BATCH, TIME, 2), vectors(BATCH, SIZE)

    def loss(params, v):
        return jnp.sum(jnp.cos(cell.unroll(cell.attach(params, v), xs)[1]))

    gradients = jax.grad(loss, argnums=(0, 1))(params, v)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    check_grads(loss, (params, v), order=1, modes=["rev"])


def test_what_depends_on_the_vector_alone_is_computed_once():
    cell = js.Conditioned(js.Elman(2, 4), SIZE, input="add", state=True)
    params = cell.attach(cell.init(jax.random.key(0)), vectors(BATCH, SIZE))
    jaxpr = str(jax.make_jaxpr(lambda xs: cell.unroll(params, xs))(vectors(BATCH, TIME, 2)))
    assert jaxpr.count("dot_general[") == 2  # those of the cell


def test_errors_say_what_is_missing():
    cell = js.Conditioned(js.Elman(2 + SIZE, 4), SIZE, state=True)
    params = cell.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"no vector to read: params = cell.attach\(params, vector\)"):
        cell.unroll(params, vectors(BATCH, TIME, 2))
    with pytest.raises(ValueError, match=r"no vector to read"):
        only_state = js.Conditioned(js.Elman(2, 4), SIZE, input=None, state=True)
        only_state.step(only_state.init(jax.random.key(0)), js.ElmanState(jnp.zeros(4)), jnp.ones(2))
    with pytest.raises(ValueError, match="needs a cell with a floating state"):
        js.Conditioned(js.OneHot(3), SIZE, input=None, state=True).init(jax.random.key(0))
    with pytest.raises(ValueError, match="got a vector with 3 features"):
        cell.attach(params, jnp.ones(3))
    with pytest.raises(TypeError, match="params of float64 but got a vector of float32"):
        cell.attach(params, jnp.ones(SIZE, jnp.float32))
    with pytest.raises(ValueError, match=r"batch axes \(2,\) attached, but reads a batch of \(3,\)"):
        cell.unroll(cell.attach(params, vectors(2, SIZE)), vectors(BATCH, TIME, 2))
    with pytest.raises(ValueError, match="it reads 5 in all"):
        js.Conditioned(js.Elman(5, 4), SIZE)
    with pytest.raises(TypeError, match="vectors of a known input_size"):
        js.Conditioned(js.Embed(5, 4), SIZE)
    with pytest.raises(ValueError, match="conditions nothing"):
        js.Conditioned(js.Elman(2, 4), SIZE, input=None)
    with pytest.raises(ValueError, match='input="concatenate", "add" or None'):
        js.Conditioned(js.Elman(2, 4), SIZE, input="both")  # type: ignore


@pytest.mark.parametrize(
    "wrap",
    [
        js.Frozen,
        js.RandomState,
        js.WeightNorm,
        js.SpectralBound,
        lambda cell: js.WeightDrop(cell, 0.5),
        lambda cell: js.WeightDrop(js.Frozen(cell), 0.5),
        lambda cell: js.Stack((js.WeightNorm(cell), js.Dropout(0.5, variational=True))),
    ],
)
def test_wrappers_around_a_conditioned_cell(wrap):
    """Attached, drawn with a key, and a batch of vectors: as the same cell that reads each vector beside its inputs."""
    wide = wrap(js.LSTM(2 + SIZE, 4))
    cell = wrap(js.Conditioned(js.LSTM(2 + SIZE, 4), SIZE))
    params = jax.tree.map(lambda leaf: 2 * leaf, cell.init(jax.random.key(0)))
    xs, v = vectors(BATCH, TIME, 2), vectors(BATCH, SIZE)
    inner = jax.tree.unflatten(jax.tree.structure(wide.init(jax.random.key(0))), jax.tree.leaves(params))
    joined = jnp.concatenate([xs, jnp.broadcast_to(v[:, None], (BATCH, TIME, SIZE))], axis=-1)
    for key in (None, jax.random.key(3)):
        ours, theirs = cell.unroll(cell.attach(params, v), xs, key=key), wide.unroll(inner, joined, key=key)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), ours[1], theirs[1])
