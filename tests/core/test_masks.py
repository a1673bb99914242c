"""Masks of lengths, and resets for those who call `step` themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js


def test_length_mask():
    lengths = np.array([[2, 0], [3, 5]])
    mask = js.length_mask(jnp.array(lengths), 3)
    assert mask.dtype == bool
    assert mask.tolist() == [[[t < length for t in range(3)] for length in row] for row in lengths]
    assert js.length_mask(jnp.array(1), 2).tolist() == [True, False]
    with pytest.raises(TypeError, match="integer lengths, got float32"):
        js.length_mask(jnp.array([1.5]), 3)
    with pytest.raises(TypeError, match=r"needs the number of steps as time, got int32\[2\]"):
        js.length_mask(5, jnp.array([1, 2]))


def test_pad():
    rows = [np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32), np.full((4, 3), 2.0, np.float32)]
    padded, mask = js.pad(rows, 5)
    assert padded.dtype == jnp.float32 and mask.tolist() == js.length_mask(jnp.array([2, 0, 4]), 5).tolist()
    assert (padded == jnp.stack([jnp.pad(row, ((0, 5 - len(row)), (0, 0))) for row in rows])).all()
    tokens, mask = js.pad([[], [1, 2], []])  # an empty list tells no dtype
    assert tokens.tolist() == [[0, 0], [1, 2], [0, 0]] and jnp.issubdtype(tokens.dtype, jnp.integer)
    assert js.pad([[], []])[0].shape == (2, 0)
    assert js.pad([np.zeros(0, np.int32), []])[0].dtype == jnp.int32
    assert js.pad([np.zeros((0, 3)), []])[0].shape == (2, 0, 3)


@pytest.mark.parametrize(
    "given, message",
    [
        (([],), r"needs a list of sequences \[time, ...\], got"),
        (([1, 2],), r"needs a list of sequences \[time, ...\], got"),
        (([np.ones((2, 3)), np.ones((2, 4))],), r"of the same features, got shapes \[\(2, 3\), \(2, 4\)\]"),
        (([[2**40], [1]],), "pad got 1099511627776, which int32 cannot hold"),
        (([[1, 2]], 1), "needs time >= 2, the longest sequence, got 1"),
    ],
)
def test_what_cannot_be_padded(given, message):
    with pytest.raises(ValueError, match=message):
        js.pad(*given)
    with pytest.raises(TypeError, match="pad needs numbers, got .*: give words their ids"):
        js.pad([["a", "b"], ["c"]])


def test_steps_with_reset_where_are_unroll_with_reset():
    """`done` after step t is a reset before step t + 1."""
    cell = js.Stack((js.LSTM(2, 3), js.GRU(3, 3)))
    params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 5, 2))
    done = jax.random.bernoulli(jax.random.key(2), 0.4, (4, 5))
    state = cell.initial_state(params, (4,))
    ys = []
    for t in range(5):
        state, y = cell.step(params, state, xs[:, t])
        state = js.reset_where(cell, params, state, done[:, t])
        ys.append(y)
    _, expected = cell.unroll(params, xs, reset=jnp.pad(done[:, :-1], ((0, 0), (1, 0))))
    np.testing.assert_allclose(jnp.stack(ys, 1), expected, atol=1e-6)
    assert bool(done.any()) and not bool(done.all())


@pytest.mark.parametrize(
    "done, error, message",
    [
        (jnp.ones(3, bool), ValueError, r"got a state\[0\].hidden of shape \(2, 3\); these inputs need \(3, 3\)"),
        (jnp.ones(2, int), TypeError, "needs a boolean done, got int32"),
    ],
)
def test_reset_where_checks_what_it_is_given(done, error, message):
    cell = js.Stack((js.LSTM(2, 3),))
    params = cell.init(jax.random.key(0))
    with pytest.raises(error, match=message):
        js.reset_where(cell, params, cell.initial_state(params, (2,)), done)
