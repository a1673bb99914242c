"""Searches over prefixes find the best of all label sequences, and keep the prefixes that their papers keep."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies

import jaxseq as js
from jaxseq.structured import ctc, transducer
from tests.structured.paths import check, flags

pytestmark = pytest.mark.usefixtures("float64")
SEEDS = strategies.integers(0, 2**31)
TIME, VOCAB = 4, 3
CELL = js.Stack((js.Embed(VOCAB, 4), js.GRU(4, 5), js.Dense(5, VOCAB)))
PARAMS = jax.tree.map(lambda leaf: np.asarray(leaf) * 2, jax.jit(CELL.init)(jax.random.key(0)))


def language(tokens, blank=0):
    """The log-probability of a text under the model, after the blank, which it cannot give."""
    read = np.array([blank, *tokens])
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), PARAMS)
    logits = np.array(CELL.unroll(params, read)[1])
    logits[:, blank] = -np.inf
    log_probs = scipy.special.log_softmax(logits, axis=-1)
    return sum(log_probs[place, token] for place, token in enumerate(tokens))


def all_labels(logits):
    """The log-probability of each label sequence, its alignments summed."""
    found = {}
    log_probs = scipy.special.log_softmax(logits, axis=-1)
    for path in itertools.product(range(VOCAB), repeat=len(logits)):
        labels = tuple(label for label, _ in itertools.groupby(path) if label)
        score = log_probs[range(len(logits)), path].sum()
        found[labels] = np.logaddexp(found.get(labels, -np.inf), score)
    return found


TEXTS = [text for size in range(TIME + 1) for text in itertools.product(range(1, VOCAB), repeat=size)]


@pytest.mark.parametrize(("weight", "bonus"), [(None, 0.0), (0.7, 0.9)])
def test_a_wide_ctc_beam_is_exact(weight, bonus):
    model = {text: weight * language(text) if weight else 0.0 for text in TEXTS}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), PARAMS)
    options = {} if weight is None else {"cell": CELL, "params": params, "weight": weight}

    @check(SEEDS, flags(TIME))
    def examples(seed, mask):
        logits = np.random.default_rng(seed).normal(size=(2, TIME, VOCAB), scale=2)
        given = np.where(mask[..., None], logits, np.nan)
        found = jax.tree.map(np.asarray, ctc.beam_search(given, mask, beams=40, bonus=bonus, **options))
        for row in range(2):
            expected = all_labels(logits[row][mask[row]])
            scores = {text: score + model[text] + bonus * len(text) for text, score in expected.items()}
            order = sorted(scores, key=scores.get, reverse=True)
            count = len(order)
            assert np.isneginf(found.scores[row, count:]).all() and not found.lengths[row, count:].any()
            np.testing.assert_allclose(found.scores[row, :count], [scores[text] for text in order], atol=1e-10)
            for beam, text in enumerate(order):
                assert tuple(found.tokens[row, beam, : found.lengths[row, beam]]) == text
                assert not found.tokens[row, beam, len(text) :].any()
                np.testing.assert_allclose(found.log_probs[row, beam], expected[text], atol=1e-10)

    examples()


def narrow(log_probs, beams):
    """Hannun et al. 2014, algorithm 1, with dictionaries, without a language model."""
    kept = {(): (0.0, -np.inf)}
    for frame in log_probs:
        new = {}

        def add(text, blank=-np.inf, label=-np.inf, new=new):
            old = new.get(text, (-np.inf, -np.inf))
            new[text] = (np.logaddexp(old[0], blank), np.logaddexp(old[1], label))

        for text, (blank, label) in kept.items():
            both = np.logaddexp(blank, label)
            add(text, blank=both + frame[0])
            for token in range(1, len(frame)):
                if text and token == text[-1]:
                    add((*text, token), label=blank + frame[token])
                    add(text, label=label + frame[token])
                else:
                    add((*text, token), label=both + frame[token])
        kept = dict(sorted(new.items(), key=lambda item: -np.logaddexp(*item[1]))[:beams])
    return [(text, np.logaddexp(*parts)) for text, parts in kept.items()]


def test_a_narrow_ctc_beam_keeps_what_the_paper_keeps():
    logits = np.random.default_rng(0).normal(size=(3, 1, 30, 6), scale=2)
    found = ctc.beam_search(logits, beams=4)
    assert found.tokens.shape == (3, 1, 4, 30)
    for row in range(3):
        expected = narrow(scipy.special.log_softmax(logits[row, 0], axis=-1), 4)
        np.testing.assert_allclose(found.scores[row, 0], [score for _, score in expected], rtol=1e-10)
        for beam, (text, _) in enumerate(expected):
            assert tuple(found.tokens[row, 0, beam, : found.lengths[row, 0, beam]].tolist()) == text


def test_a_prefix_that_comes_back_is_merged():
    """ab is pruned, while a and abc are kept, and grows again out of a: this happens 12 times in these rows."""
    logits = np.random.default_rng(3).normal(size=(20, 10, 3), scale=3)
    found = jax.tree.map(np.asarray, ctc.beam_search(logits, beams=6))
    for row in range(20):
        expected = narrow(scipy.special.log_softmax(logits[row], axis=-1), 6)
        texts = [tuple(t[:n]) for t, n in zip(found.tokens[row], found.lengths[row], strict=True)]
        assert texts == [text for text, _ in expected]
        np.testing.assert_allclose(found.scores[row], [score for _, score in expected], rtol=1e-10)


PREDICTION = js.Stack((js.Embed(VOCAB, 4), js.GRU(4, 5)))


def joint(kernel, encoded, predicted):
    return jnp.tanh(encoded + predicted) @ kernel


def network(seed=0):
    """Params of a prediction network, a kernel and what an encoder gave."""
    generator = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float) * 2, jax.jit(PREDICTION.init)(jax.random.key(seed)))
    return params, generator.normal(size=(5, VOCAB), scale=2), generator.normal(size=(2, 3, 5), scale=2)


def test_a_wide_transducer_beam_is_exact():
    """The scores are those of the loss, whose lattice is enumerated elsewhere."""
    params, kernel, encoded = network()
    mask = np.array([[True, True, True], [True, False, True]])
    part = jax.tree_util.Partial(joint, kernel)
    found = transducer.beam_search(PREDICTION, params, part, encoded, mask, beams=40, max_labels=3)
    texts = [text for text in TEXTS if len(text) <= 3]
    labels = np.array([[*text, *[1] * (3 - len(text))] for text in texts])
    label_mask = js.length_mask(np.array([len(text) for text in texts]), 3)
    _, predicted = PREDICTION.unroll(params, transducer.begin(labels))
    for row in range(2):
        logits = joint(kernel, encoded[row][:, None], predicted[:, None])
        lattice = transducer.lattice(jax.nn.log_softmax(logits), labels)
        keep = np.broadcast_to(mask[row], (len(texts), 3))
        scores = -np.asarray(transducer.loss(lattice, keep, label_mask))
        order = np.argsort(-scores)
        np.testing.assert_allclose(found.scores[row, : len(texts)], scores[order], atol=1e-10)
        assert np.isneginf(found.scores[row, len(texts) :]).all()
        for beam, which in enumerate(order):
            assert tuple(found.tokens[row, beam, : found.lengths[row, beam]].tolist()) == texts[which]


@pytest.mark.parametrize("max_labels", [0, 2, 8])
def test_one_beam_is_greedy(max_labels):
    params, kernel, encoded = network(1)
    step = jax.jit(PREDICTION.step)
    part = jax.tree_util.Partial(joint, kernel)
    found = transducer.beam_search(PREDICTION, params, part, encoded, beams=1, max_labels=max_labels)
    for row in range(2):
        state, predicted = step(params, PREDICTION.initial_state(params), 0)
        text, at, score = [], 0, 0.0
        while at < 3:
            log_prob = scipy.special.log_softmax(joint(kernel, encoded[row, at], predicted))
            token = int(log_prob.argmax()) if len(text) < max_labels else 0
            score += log_prob[token]
            if token:
                text.append(token)
                state, predicted = step(params, state, token)
            else:
                at += 1
        assert found.tokens[row, 0, : found.lengths[row, 0]].tolist() == text
        np.testing.assert_allclose(found.scores[row, 0], score, rtol=1e-10)


def test_rows_without_steps():
    params, kernel, encoded = network()
    part = jax.tree_util.Partial(joint, kernel)
    for given, mask in ((encoded[:, :0], None), (encoded * np.nan, np.zeros((2, 3), bool))):
        found = transducer.beam_search(PREDICTION, params, part, given, mask, beams=2, max_labels=2)
        assert found.scores.tolist() == [[0, -np.inf]] * 2 and not found.lengths.any()
    found = ctc.beam_search(np.zeros((0, VOCAB)), beams=2)
    assert found.scores.tolist() == [0, -np.inf]


def test_errors():
    params, kernel, encoded = network()
    options = {"beams": 2, "max_labels": 2}
    for call, error, message in (
        (lambda: ctc.beam_search(np.zeros((4, 3)), beams=0), ValueError, "beams >= 1"),
        (lambda: ctc.beam_search(np.zeros((4, 3)), beams=2, bonus=np.zeros(3)), ValueError, "one number as bonus"),
        (lambda: ctc.beam_search(np.zeros((4, 3)), beams=2, cell=js.Dense(3, 3)), TypeError, "reads tokens"),
        (lambda: ctc.beam_search(np.zeros((4, 3)), beams=2, params=PARAMS), ValueError, "a cell and its params"),
        (lambda: ctc.beam_search(np.zeros((4, 3)), beams=2, cell=CELL), ValueError, "a cell and its params"),
        (lambda: ctc.beam_search(np.zeros((4, 5)), beams=2, cell=CELL, params=PARAMS), ValueError, "vocab 5"),
        (lambda: transducer.beam_search(js.Dense(3, 3), (), joint, encoded, **options), TypeError, "reads tokens"),
        (lambda: transducer.beam_search(PREDICTION, params, joint, encoded[0, 0], **options), ValueError, "encoded"),
        (
            lambda: transducer.beam_search(PREDICTION, params, joint, encoded, beams=1, max_labels=-1),
            ValueError,
            ">= 0",
        ),
        (
            lambda: transducer.beam_search(PREDICTION, params, lambda a, b: a[0], encoded, **options),
            ValueError,
            r"logits \[beam, vocab\]",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
