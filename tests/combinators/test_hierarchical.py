"""Segments read one by one, against the cells run on each segment by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js

TIME = 9
LETTERS, WORDS, SENTENCES = js.LSTM(2, 3), js.GRU(3, 4), js.Elman(4, 2)
XS = np.random.default_rng(0).normal(size=(TIME, 2))
ENDS = [0, 1, 0, 0, 2, 1, 0, 1, 0]  # words of letters 0-1, 2-4, 5, 6-7 and an open one; a sentence of two words

pytestmark = pytest.mark.usefixtures("float64")


def test_each_cell_reads_what_the_segments_below_end_with():
    cell = js.Hierarchical((LETTERS, WORDS, SENTENCES))
    params = cell.init(jax.random.key(0))
    words = [(0, 2), (2, 5), (5, 6), (6, 8), (8, 9)]
    letters = [LETTERS.unroll(params[0], XS[a:b])[1] for a, b in words]
    ends = jnp.stack([ys[-1] for ys in letters[:-1]])  # the last word has not ended
    read = jnp.concatenate([WORDS.unroll(params[1], ends[:2])[1], WORDS.unroll(params[1], ends[2:])[1]])
    _, sentence = SENTENCES.unroll(params[2], read[1:2])

    zeros = np.zeros((1, 4))
    words_seen = np.concatenate([zeros, np.asarray(read)])[[0, 1, 1, 1, 2, 3, 3, 4, 4]]
    sentences_seen = np.concatenate([np.zeros((4, 2)), np.repeat(np.asarray(sentence), 5, axis=0)])
    expected = np.concatenate([np.concatenate(letters), words_seen, sentences_seen], axis=-1)
    state, ys = cell.unroll(params, (jnp.asarray(XS), jnp.array(ENDS)))
    np.testing.assert_allclose(ys, expected, rtol=1e-12)
    np.testing.assert_allclose(state.outputs[1], sentence[0], rtol=1e-12)
    np.testing.assert_allclose(state.layers[0].hidden, letters[-1][-1], rtol=1e-12)


def test_what_a_word_held_reaches_the_next_one_by_the_upper_cell_only():
    cell = js.Hierarchical((LETTERS, WORDS))
    params = cell.init(jax.random.key(0))

    def parts(xs):
        _, ys = cell.unroll(params, (xs, jnp.array(ENDS)))
        return ys[2, :3], ys[2, 3:]

    of_letters, of_words = jax.jacobian(parts)(jnp.asarray(XS))
    assert not of_letters[:, :2].any() and of_words[:, :2].any() and not of_words[:, 2].any()


def test_errors_of_a_hierarchy():
    with pytest.raises(ValueError, match="two cells or more"):
        js.Hierarchical((LETTERS,))
    with pytest.raises(ValueError, match="needs 4 features, but it is given 3"):
        js.Hierarchical((LETTERS, SENTENCES))
    with pytest.raises(TypeError, match="known output_size"):
        js.Hierarchical((js.Map("tanh"), js.Map("tanh")))
    cell = js.Hierarchical((LETTERS, WORDS, SENTENCES))
    params = cell.init(jax.random.key(0))
    with pytest.raises(TypeError, match=r"to 2 at the ends .* integers \(flags are for two cells\); got bool\[\]"):
        cell.unroll(params, (jnp.asarray(XS), jnp.array(ENDS) > 0))
    with pytest.raises(TypeError, match=r"integers: cast them with .astype\(int\); got float64\[\]"):
        cell.unroll(params, (jnp.asarray(XS), jnp.array(ENDS, float)))
    with pytest.raises(ValueError, match=r"reads 2 inputs at each step, \(x, boundary\), of ranks \(1, 0\), but"):
        cell.unroll(params, jnp.asarray(XS))


def test_two_cells_read_flags():
    cell = js.Hierarchical((LETTERS, WORDS))
    params, ends = cell.init(jax.random.key(0)), jnp.minimum(jnp.array(ENDS), 1)
    flags, numbers = (cell.unroll(params, (jnp.asarray(XS), given)) for given in (ends > 0, ends))
    jax.tree.map(np.testing.assert_array_equal, flags, numbers)
