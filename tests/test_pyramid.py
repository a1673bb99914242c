"""Time that halves between layers: against loops over the steps of each row in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from tests.test_laws import assert_same, with_gradients

ROWS, TIME, INPUT = 4, 7, 2
RNG = np.random.default_rng(0)
LAYER = js.Pyramid((js.Elman(INPUT, 3), js.Elman(6, 2), js.Elman(4, 3)))
GAPS = np.array([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)

pytestmark = pytest.mark.usefixtures("float64")


def random(layer=LAYER, time=TIME):
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), jax.eval_shape(layer.init, jax.random.key(0)))
    state = jax.eval_shape(lambda params: layer.initial_state(params, (ROWS,)), params)
    return params, RNG.normal(size=(ROWS, time, INPUT)), jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), state)


def by_hand(params, row, state, keep):
    """One row, in Python lists: what each step of each layer reads is written out."""
    steps = [(x if kept else None) for x, kept in zip(row, keep, strict=True)]
    last = []
    for level, (p, (hidden,)) in enumerate(zip(params, state, strict=True)):
        if level:
            blank = np.zeros(size)
            steps = [*steps, None] if len(steps) % 2 else steps
            steps = [
                None if a is None and b is None else np.concatenate([blank if y is None else y for y in (a, b)])
                for a, b in zip(steps[::2], steps[1::2], strict=True)
            ]
        size = p.bias.shape[-1]
        for t, x in enumerate(steps):
            if x is not None:
                hidden = np.tanh(x @ p.input_kernel[:, 0] + hidden @ p.recurrent_kernel[:, 0] + p.bias[0])
                steps[t] = hidden
        last.append(hidden)
    return last, np.array([np.zeros(size) if y is None else y for y in steps]), [y is not None for y in steps]


@pytest.mark.parametrize("reverse", [False, True])
def test_equals_loops(reverse):
    """In both directions: of 8 steps the pairs are the same from both ends."""
    params, xs, state = random(time=8)
    gaps = np.pad(GAPS, [(0, 0), (0, 1)], constant_values=True)
    flip = (lambda leaf: np.flip(leaf, 1)) if reverse else (lambda leaf: leaf)
    junk = np.where(gaps[..., None], xs, np.nan)
    last, ys = LAYER.unroll(params, flip(junk), state, mask=flip(gaps), reverse=reverse)
    mask = LAYER.output_mask(flip(gaps))
    for row in range(ROWS):
        expected = by_hand(params, xs[row], [(part.hidden[row],) for part in state], gaps[row])
        assert_same(([part.hidden[row] for part in last], flip(ys)[row]), expected[:2])
        assert flip(mask)[row].tolist() == expected[2]


def test_two_pyramids_from_both_ends_form_the_same_pairs():
    """Of an odd number of steps too: each output is of the steps that `output_mask` says."""
    layer = js.Bidirectional(*[js.Pyramid((js.Elman(2, 3), js.Elman(6, 3)))] * 2, merge="both")
    params, xs, _ = random(time=5)
    params = layer.init(jax.random.key(0))
    mask = np.zeros((ROWS, 5), bool)
    mask[:, 1] = True
    _, ys = layer.unroll(params, xs, mask=mask)
    expected = layer.output_mask(mask)
    assert expected[0].tolist() == [True, False, False]
    for outputs in ys:
        assert np.array_equal(np.asarray(outputs).any(-1), expected)


@pytest.mark.parametrize("time", [0, 1, 2, 5, 8])
def test_any_number_of_steps(time):
    params, xs, state = random(time=time)
    last, ys = LAYER.unroll(params, xs, state)
    assert ys.shape == (ROWS, -(-time // 4), 3)
    for row in range(ROWS if time else 0):
        expected = by_hand(params, xs[row], [(part.hidden[row],) for part in state], [True] * time)
        assert_same(([part.hidden[row] for part in last], ys[row]), expected[:2])
    if not time:
        assert_same(last, jax.tree.map(jnp.asarray, state))


def test_padding_gradients_vmap_and_axes():
    """Padded rows equal rows of their own length, gradients too, whatever the padding holds; batch axes are vmap."""
    params, xs, state = random()
    lengths = np.array([5, 0, 1, 7])
    mask = np.arange(TIME) < lengths[:, None]

    def read(params, xs, state):
        return LAYER.unroll(params, xs, state, mask=mask)

    def apart(params, xs, state):
        rows = []
        for row, length in enumerate(lengths):
            last, ys = LAYER.unroll(params, xs[row, :length], jax.tree.map(lambda leaf, row=row: leaf[row], state))
            rows.append((last, jnp.zeros((2, 3)).at[: len(ys)].set(ys)))
        return jax.tree.map(lambda *rows: jnp.stack(rows), *rows)

    def vmapped(params, xs, state):
        return jax.vmap(lambda xs, state, mask: LAYER.unroll(params, xs, state, mask=mask))(xs, state, mask)

    expected = jax.jit(lambda *given: with_gradients(apart, *given))(params, xs, state)
    junk = np.where(mask[..., None], xs, np.nan)
    for given in (xs, junk):
        assert_same(jax.jit(lambda *given: with_gradients(read, *given))(params, given, state), expected)
    assert_same(jax.jit(lambda *given: with_gradients(vmapped, *given))(params, xs, state), expected)
    wide = jax.tree.map(lambda leaf: leaf[None], (xs, state, mask))
    last, ys = LAYER.unroll(params, *wide[:2], mask=wide[2])
    assert_same(jax.tree.map(lambda leaf: leaf[0], (last, ys)), (expected["state"], expected["ys"]))


def test_as_a_part_of_other_layers():
    """A listener: what follows a pyramid, and what reads both ways, sees the shorter time and its mask and keys."""
    pair = js.Bidirectional(js.LSTM(INPUT, 3), js.LSTM(INPUT, 3))
    listener = js.Pyramid((pair, js.Sequential((js.Dropout(0.5), js.Bidirectional(js.LSTM(12, 3), js.LSTM(12, 3))))))
    inner = js.Sequential((listener, js.Dropout(0.5), js.GRU(6, 2)))
    params, xs, _ = random(inner)
    state, ys = inner.unroll(params, xs, mask=GAPS, key=jax.random.key(0))
    assert ys.shape == (ROWS, 4, 2)
    mask = listener.output_mask(GAPS)
    np.testing.assert_array_equal((ys != 0).any(-1), mask)
    _, heard = listener.unroll(params[0], xs, mask=GAPS)
    _, expected = js.GRU(6, 2).unroll(params[2], heard, mask=mask)
    assert_same(inner.unroll(params, xs, mask=GAPS)[1], expected)
    assert (ys != expected).any()
    outer = js.Sequential((js.Bidirectional(inner, inner, merge="sum"), js.Dense(2, 1)))
    params, xs, _ = random(outer)
    _, ys = outer.unroll(params, xs, mask=GAPS)
    np.testing.assert_array_equal((ys != 0).any(-1), mask)
    assert (inner.input_size, listener.output_size, outer.output_size) == (INPUT, 6, 1)


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    with says(ValueError, "Pyramid: Elman(input_size=3, hidden_size=2) (number 1) needs 3 features, but it is given 6"):
        js.Pyramid((js.Elman(2, 3), js.Elman(3, 2)))
    params, xs, state = random()
    with says(ValueError, "Pyramid takes no reset, which might come inside a pair of steps: unroll segments apart"):
        LAYER.unroll(params, xs, state, reset=GAPS)
    with says(TypeError, "needs a boolean mask"):
        LAYER.output_mask(np.ones((2, 3)))
    layer = js.Pyramid((js.Map(jnp.tanh, input_rank=0), js.Dense(2, 1)))
    with says(ValueError, "Pyramid joins the features of two steps, but a layer in"):
        layer.unroll(layer.init(jax.random.key(0)), np.ones(4, int))
