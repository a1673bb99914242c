"""Memory networks beside NumPy, written from the paper, one story, sentence and word after the other."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxseq as js
from tests.numbers import close, random_params

KEY = jax.random.key(0)
VOCAB, SIZE, MEMORY = 9, 4, 6


def numpy_answer(network, params, story, question, linear=False):
    """The logits and weights of one story, a list of lists of words."""
    adjacent, d = network.tying == "adjacent", network.size

    def embed(table, words):
        total, count = np.zeros(d), len(words)
        for j, word in enumerate(words, 1):
            for k in range(1, d + 1):
                position = (2 * k - d - 1) * (2 * j - count - 1) / d / count
                scale = 1 + position * (network.encoding == "position")
                total[k - 1] += scale * params.embeddings[table, word, k - 1]
        return total

    u, seen = embed(0 if adjacent else 2, question), []
    for hop in range(network.hops):
        a, c = (hop, hop + 1) if adjacent else (0, 1)
        ages = range(len(story) - 1, -1, -1)
        m, out = ([embed(t, s) + params.ages[t, age] for s, age in zip(story, ages, strict=True)] for t in (a, c))
        p = np.array([u @ m_i for m_i in m])
        if not linear:
            nothing = (network.memory_size - len(story)) * np.exp(0) if network.empty_places else 0
            p = np.exp(p) / (np.exp(p).sum() + nothing)
        o = sum((p_i * c_i for p_i, c_i in zip(p, out, strict=True)), np.zeros(d))
        u = (u if adjacent else u @ params.hop_kernel) + o
        seen.append(p)
    return params.embeddings[-1] @ u, np.array(seen)


def pad(rows, count, width, fill):
    tokens, mask = np.full((count, width), fill), np.zeros((count, width), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], mask[index, : len(row)] = row, True
    return tokens, mask


STORIES = [[[1, 2, 3], [4], [5, 6, 7, 8]], [[0, 2]], [[3, 3], [1, 2, 4, 5], [6], [7, 8], [0, 1, 2]]]
QUESTIONS = [[1, 2], [3, 4, 5], [8]]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("encoding, empty", [("position", False), ("bag", False), ("position", True)])
@pytest.mark.parametrize("tying", ["adjacent", "layer-wise"])
def test_answers_are_those_of_the_paper(tying, encoding, empty, linear):
    """Whatever tokens the padding holds, and with a sentence of no words between two others."""
    network = js.MemoryNetwork(VOCAB, SIZE, MEMORY, hops=3, tying=tying, encoding=encoding, empty_places=empty)
    params, answer = random_params(np.random.default_rng(0), network), jax.jit(network.answer)
    for fill in (0, -7, 10**6):
        padded = [pad(story[:1] + [[]] + story[1:], MEMORY, 4, fill) for story in STORIES]
        story, mask = (np.stack(part) for part in zip(*padded, strict=True))
        question, question_mask = pad(QUESTIONS, 3, 5, fill)
        logits, weights = answer(params, story, question, mask=mask, question_mask=question_mask, linear=linear)
        present = mask.any(axis=-1)
        assert not weights[~np.broadcast_to(present[:, None], weights.shape)].any()
        for row, (told, asked) in enumerate(zip(STORIES, QUESTIONS, strict=True)):
            expected = numpy_answer(network, params, told, asked, linear)
            close((logits[row], weights[row][:, present[row]]), expected, 1e-12)


def test_batch_axes_none_and_several():
    network = js.MemoryNetwork(VOCAB, SIZE, MEMORY, hops=2)
    params = network.init(KEY)
    story = jax.random.randint(KEY, (2, 3, 5, 4), 0, VOCAB)
    question = story[..., 0, :3]
    answer = jax.jit(network.answer)
    logits, weights = answer(params, story, question)
    assert logits.shape == (2, 3, VOCAB) and weights.shape == (2, 3, 2, 5)
    one = answer(params, story[1, 2], question[1, 2])
    close(tuple(one), (logits[1, 2], weights[1, 2]))
    mapped = jax.vmap(jax.vmap(answer, (None, 0, 0)), (None, 0, 0))(params, story, question)
    close(tuple(mapped), (logits, weights))


@pytest.mark.parametrize("tying", ["adjacent", "layer-wise"])
def test_a_batch_stays_sharded(tying):
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec("devices"))
    network = js.MemoryNetwork(VOCAB, SIZE, MEMORY, tying=tying)
    params, story, mask = network.init(KEY), jnp.ones((4, 3, 5), int), jnp.ones((4, 3, 5), bool).at[1, 2].set(False)

    def loss(params, story, mask):
        answer = network.answer(params, story, story[:, 0], mask=mask, question_mask=mask[:, 0], key=KEY)
        return (answer.logits**2).sum(), answer

    run = jax.jit(jax.grad(loss, has_aux=True))
    expected = run(params, story, mask)
    with jax.set_mesh(mesh):
        slopes, answer = run(params, *jax.device_put((story, mask), rows))
    assert answer.logits.sharding.spec[0] == answer.weights.sharding.spec[0] == "devices"
    close(jax.tree.leaves((slopes, answer)), jax.tree.leaves(expected))


def test_stories_and_questions_of_nothing():
    network = js.MemoryNetwork(VOCAB, SIZE, MEMORY)
    params, question = network.init(KEY), jnp.array([[1, 2], [3, 4]])
    story, mask = jnp.ones((2, 3, 2), int), jnp.zeros((2, 3, 2), bool).at[1].set(True)

    def loss(params, mask, question_mask):
        logits, weights = network.answer(params, story, question, mask=mask, question_mask=question_mask)
        return (logits**2).sum(), (logits, weights)

    (_, (logits, weights)), slope = jax.value_and_grad(loss, has_aux=True)(params, mask, jnp.zeros((2, 2), bool))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((logits, weights, slope)))
    assert not weights[0].any() and not logits[0].any()
    none = jax.jit(network.answer)(params, jnp.zeros((2, 0, 0), int), question)
    assert none.weights.shape == (2, 3, 0) and jnp.isfinite(none.logits).all()
    hessian = jax.jvp(jax.grad(lambda p: loss(p, mask, None)[0]), (params,), (params,))[1]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(hessian))


def test_noise_makes_sentences_older():
    """Empty sentences come after others: ages grow, stay in order, and reach no further than their table."""
    present = jnp.ones((500, 5), bool)
    network = js.MemoryNetwork(VOCAB, SIZE, 40)
    calm, noisy = network._ages(present, 0.1, None), network._ages(present, 0.1, KEY)
    assert calm.tolist() == [[4, 3, 2, 1, 0]] * 500
    assert (noisy[:, :-1] > noisy[:, 1:]).all()
    np.testing.assert_allclose((noisy - calm).mean(axis=0), [0.5, 0.4, 0.3, 0.2, 0.1], atol=0.08)
    assert js.MemoryNetwork(VOCAB, SIZE, 5)._ages(present, 0.5, KEY).max() == 4

    params, story, question = network.init(KEY), jnp.ones((50, 5, 1), int), jnp.ones((50, 1), int)
    weights = [network.answer(params, story, question, key=k, noise=n).weights for k, n in ((None, 0.5), (KEY, 0.0))]
    assert (weights[0] == weights[1]).all()
    assert not np.allclose(weights[0], network.answer(params, story, question, key=KEY, noise=0.5).weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(dtype):
    network = js.MemoryNetwork(VOCAB, SIZE, MEMORY, tying="layer-wise")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), network.init(KEY))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        answer = network.answer(params, jnp.ones((2, 3, 4), int), jnp.ones((2, 2), int), key=KEY)
    assert answer.logits.dtype == answer.weights.dtype == dtype


def test_it_is_a_value_with_named_axes():
    network = js.MemoryNetwork(VOCAB, SIZE, MEMORY, tying="layer-wise")
    assert js.from_json(js.to_json(network)) == network and hash(network) == hash(js.from_json(js.to_json(network)))
    for tying in ("adjacent", "layer-wise"):
        network = js.MemoryNetwork(VOCAB, SIZE, MEMORY, tying=tying)
        shapes = jax.tree.map(jnp.ndim, jax.eval_shape(network.init, KEY))
        assert jax.tree.map(len, network.axes(), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)) == shapes
    assert network.init(KEY).hop_kernel.shape == (SIZE, SIZE)


NETWORK = js.MemoryNetwork(VOCAB, SIZE, MEMORY)
STORY, QUESTION = jnp.ones((2, 3, 4), int), jnp.ones((2, 3), int)
REFUSED = {
    "hops": (lambda: js.MemoryNetwork(9, 4, 5, hops=0), "MemoryNetwork needs hops >= 1, got 0."),
    "size": (lambda: js.MemoryNetwork(9, 4, 0), "MemoryNetwork needs memory_size >= 1, got 0."),
    "tying": (lambda: js.MemoryNetwork(9, 4, 5, tying="rnn"), "needs tying='adjacent' or 'layer-wise', got 'rnn'."),
    "encoding": (lambda: js.MemoryNetwork(9, 4, 5, encoding="sum"), "needs encoding='position' or 'bag', got 'sum'."),
    "vectors": (lambda: NETWORK.answer(NETWORK.init(KEY), STORY * 1.0, QUESTION), "reads tokens, integers"),
    "batch": (lambda: NETWORK.answer(NETWORK.init(KEY), STORY, QUESTION[0]), "reads a story [*batch, sentence, word]"),
    "long": (
        lambda: NETWORK.answer(NETWORK.init(KEY), jnp.ones((2, 7, 4), int), QUESTION),
        "remembers 6 sentences, but the story has 7: give the last ones alone.",
    ),
    "mask": (
        lambda: NETWORK.answer(NETWORK.init(KEY), STORY, QUESTION, mask=jnp.ones((2, 3), bool)),
        "needs a mask of bool[2, 3, 4], True at words, got bool[2,3].",
    ),
    "noise": (lambda: NETWORK.answer(NETWORK.init(KEY), STORY, QUESTION, noise=10), "from 0 to 1, got 10."),
    "key": (lambda: NETWORK.answer(NETWORK.init(KEY), STORY, QUESTION, key=3), "needs one key"),
    "params": (lambda: NETWORK.answer((), STORY, QUESTION), "got params of another layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        make()
