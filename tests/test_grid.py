"""Images: against loops over their places in NumPy, and packed images against the same ones apart."""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import jaxseq as js
from tests.test_laws import assert_same

HEIGHT, WIDTH, CHANNELS, HIDDEN = 4, 3, 2, 2
RNG = np.random.default_rng(0)
CELLS = [js.Elman2D((WIDTH, CHANNELS), HIDDEN), js.LSTM2D((WIDTH, CHANNELS), HIDDEN)]
ROWS = np.array([True, False, True, True])

pytestmark = pytest.mark.usefixtures("float64")


def random(layer):
    shapes = jax.eval_shape(layer.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), shapes)


def by_places(cell, params, image, top, keep):
    """Every place in turn: the states of all places, {(row, column): (hidden, cell)}, with `top` as row -1."""
    edge = (np.zeros(HIDDEN), np.zeros(HIDDEN))
    states = {(-1, j): tuple(leaf[j] for leaf in (*top, *top)[:2]) for j in range(WIDTH)}
    for i in range(len(image)):
        for j in range(WIDTH):
            if not keep[i]:
                states[i, j] = states[i - 1, j]
                continue
            (h_a, c_a), (h_l, c_l) = states[i - 1, j], states.get((i, j - 1), edge)
            z = params.bias + sum(
                np.einsum("f,fgh->gh", v, kernel)
                for v, kernel in (
                    (image[i, j], params.input_kernel),
                    (h_a, params.above_kernel),
                    (h_l, params.left_kernel),
                )
            )
            if isinstance(cell, js.Elman2D):
                states[i, j] = (np.tanh(z[0]) if cell.activation == "tanh" else expit(z[0]),) * 2
            else:
                c = expit(z[1]) * c_a + expit(z[2]) * c_l + expit(z[0]) * np.tanh(z[3])
                states[i, j] = expit(z[4]) * np.tanh(c), c
    return states


def outputs(states, keep):
    return np.array([[states[i, j][0] * keep[i] for j in range(WIDTH)] for i in range(len(keep))])


@pytest.mark.parametrize("height", [1, HEIGHT])
@pytest.mark.parametrize("cell", [*CELLS, js.Elman2D((WIDTH, CHANNELS), HIDDEN, activation="sigmoid")], ids=repr)
def test_two_dimensional_recurrence_equals_loops(cell, height):
    params, image, keep = random(cell), RNG.normal(size=(2, height, WIDTH, CHANNELS)), ROWS[:height]
    top = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), cell.initial_state(params, (2,)))
    last, ys = cell.unroll(params, image, top, mask=np.tile(keep, (2, 1)))
    for batch in range(2):
        states = by_places(cell, params, image[batch], [leaf[batch] for leaf in top], keep)
        assert_same(ys[batch], outputs(states, keep))
        bottom = [np.array([states[height - 1, j][part] for j in range(WIDTH)]) for part in range(len(last))]
        assert_same([leaf[batch] for leaf in last], bottom)


@pytest.mark.parametrize("merge", ["concatenate", "mean"])
def test_grid_reads_from_four_corners(merge):
    grid = js.Grid((CELLS[1], CELLS[0], CELLS[1], CELLS[1]), merge=merge)
    params, image = random(grid), RNG.normal(size=(HEIGHT, WIDTH, CHANNELS))
    image = np.where(ROWS[:, None, None], image, np.nan)
    start = np.zeros((2, WIDTH, HIDDEN))
    expected = []
    for index, (cell, p) in enumerate(zip(grid.layers, params, strict=True)):
        axes = [axis for axis, flipped in enumerate((index >= 2, index % 2)) if flipped]
        keep = ROWS[::-1] if index >= 2 else ROWS
        states = by_places(cell, p, np.flip(image, axes), start, keep)
        expected.append(np.flip(outputs(states, keep), axes))
    expected = np.concatenate(expected, -1) if merge == "concatenate" else np.mean(expected, 0)
    _, ys = grid.unroll(params, image, mask=ROWS)
    assert_same(ys, expected)
    assert grid.output_size == expected.shape[-1] and grid.input_size == CHANNELS


def line(p, xs):
    """An Elman network over a list of vectors."""
    hidden, ys = np.zeros(p.bias.shape[-1]), []
    for x in xs:
        hidden = np.tanh(x @ p.input_kernel[:, 0] + hidden @ p.recurrent_kernel[:, 0] + p.bias[0])
        ys.append(hidden)
    return np.array(ys)


def both(p, xs):
    return np.concatenate([line(p.forward, xs), line(p.backward, xs[::-1])[::-1]], -1)


def test_renet_equals_loops():
    pairs = [js.Bidirectional(js.Elman(n, HIDDEN), js.Elman(n, HIDDEN)) for n in (CHANNELS, 2 * HIDDEN)]
    layer = js.ReNet(pairs)
    params, image = random(layer), RNG.normal(size=(2, HEIGHT, WIDTH, CHANNELS))
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)  # the second image has a row less
    _, ys = layer.unroll(params, np.where(mask[..., None, None], image, np.nan), mask=mask)
    for batch, height in enumerate((4, 3)):
        columns = np.stack([both(params[0], image[batch, :height, j]) for j in range(WIDTH)], 1)
        rows = np.stack([both(params[1], columns[i]) for i in range(height)])
        assert_same(ys[batch], np.concatenate([rows, np.zeros((HEIGHT - height, *rows.shape[1:]))]))


@pytest.mark.parametrize(
    "layer",
    [js.Grid((CELLS[1],) * 4), js.ReNet((js.Bidirectional(js.GRU(2, 3), js.LSTM(2, 3)), js.GRU(6, 2)))],
    ids=["grid", "renet"],
)
def test_packed_images_are_separate(layer):
    params, image = random(layer), RNG.normal(size=(7, WIDTH, CHANNELS))
    _, ys = layer.unroll(params, image, reset=np.isin(np.arange(7), (0, 2, 5)))
    apart = [layer.unroll(params, image[part])[1] for part in (slice(0, 2), slice(2, 5), slice(5, 7))]
    assert_same(ys, jnp.concatenate(apart))


def test_renet_halves_the_height_and_draws_noise():
    pyramid = js.Pyramid((js.Elman(CHANNELS, 2), js.Dropout(0.5), js.Elman(8, 2)))
    layer = js.ReNet((pyramid, js.Dropout(0.5), js.Elman(2, 3)))
    image = RNG.normal(size=(HEIGHT, WIDTH, CHANNELS))
    params = random(layer)
    _, ys = layer.unroll(params, image, key=jax.random.key(0), mask=np.arange(HEIGHT) < 3)
    assert ys.shape == (1, WIDTH, 3)
    assert (ys != layer.unroll(params, image, mask=np.arange(HEIGHT) < 3)[1]).any()
    assert layer.output_mask(np.arange(HEIGHT) < 3).tolist() == [True]


def test_the_loop_goes_by_diagonals():
    cell = CELLS[1]
    jaxpr = jax.make_jaxpr(functools.partial(cell.unroll, random(cell)))(np.zeros((5, 10, WIDTH, CHANNELS)))
    assert loops(jaxpr.jaxpr) == [10 + WIDTH - 1]


def loops(jaxpr):
    """The lengths of all scans."""
    inner = [loops(inner) for e in jaxpr.eqns for inner in jax.extend.core.jaxprs_in_params(e.params)]
    return [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] + sum(inner, [])


def says(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_errors():
    with says(ValueError, "Elman2D needs the shape of a row, (width, channels), as input_shape, got (3,)"):
        js.Elman2D((3,), 2)
    with says(ValueError, "got rows of shape (4, 2); they need its input_shape (3, 2)"):
        CELLS[0].unroll(random(CELLS[0]), np.zeros((5, 4, 2)))
    with says(ValueError, "Grid needs four layers that read rows, as LSTM2D does, one a corner, got"):
        js.Grid((CELLS[0],) * 3)
    with says(ValueError, "Grid needs four layers that read rows, as LSTM2D does, one a corner, got"):
        js.Grid((js.Elman(2, 2),) * 4)
    with says(ValueError, "Grid merges by concatenate, sum, mean, product, got 'both'"):
        js.Grid((CELLS[0],) * 4, merge="both")
    with says(ValueError, "Grid needs layers of one output_size to sum, got [2, 3]"):
        js.Grid((*[CELLS[0]] * 3, js.Elman2D((WIDTH, CHANNELS), 3)), merge="sum")
    with says(ValueError, "Grid needs layers of one input_size to concatenate, got [1, 2]"):
        js.Grid((*[CELLS[0]] * 3, js.Elman2D((WIDTH, 1), 2)))
    with says(ValueError, "ReNet needs layers that read vectors; Embed(vocab_size=3, size=2) (number 0) does not"):
        js.ReNet((js.Embed(3, 2), js.Elman(2, 2)))
    with says(ValueError, "ReNet: Elman(input_size=3, hidden_size=2) (number 1) needs 3 features, but it is given 2"):
        js.ReNet((js.Elman(2, 2), js.Elman(3, 2)))
