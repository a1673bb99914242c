"""Histories and the rules that read them, beside a plain reading of their definitions; and in `generate`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.tree_util import Partial

import jaxseq as js
from jaxseq import samplers

VOCAB, ROWS, PROMPT, NEW = 4, 3, 5, 4
TEXTS = hnp.arrays(np.int32, (ROWS, PROMPT + NEW), elements=st.integers(0, VOCAB - 1))
MASKS = hnp.arrays(bool, (ROWS, PROMPT))
TRANSITIONS = np.array([[1, -1, 0, 2], [0, 0, -1, -1], [2, 1, -1, 2]])
ALL = samplers.together(
    counts=samplers.token_counts(VOCAB),
    since=samplers.new_tokens(),
    last=samplers.recent(3),
    text=samplers.text(7),
    state=samplers.automaton(TRANSITIONS, start=1),
)


@jax.jit
def read(history, prompt, mask, new):
    memory = history.begin(prompt, mask)
    for token in new.T:
        memory = history.update(memory, token)
    return memory


@settings(deadline=None, max_examples=40)
@given(TEXTS, MASKS, st.integers(0, NEW))
def test_histories_remember(tokens, mask, count):
    new = tokens[:, PROMPT:][:, :count]
    memory = jax.tree.map(np.asarray, read(ALL, tokens[:, :PROMPT], mask, new))
    for row in range(ROWS):
        said = [*tokens[row, :PROMPT][mask[row]], *new[row]]
        assert memory["counts"][row].tolist() == [said.count(token) for token in range(VOCAB)]
        assert memory["since"][row] == count
        assert memory["last"][row].tolist() == ([-1] * 3 + said)[-3:]
        assert memory["text"].count[row] == min(len(said), 7)
        assert memory["text"].tokens[row].tolist() == (said[:7] + [0] * 7)[:7]
        state = 1
        for token in new[row]:
            state = TRANSITIONS[state, token] if TRANSITIONS[state, token] >= 0 else state
        assert memory["state"][row] == state


FORBIDDEN = np.array([[-1, -1, 3], [-1, 0, 1], [2, 2, 0], [-1, -1, -1]])
NGRAMS = jax.jit(samplers.no_repeat_ngrams, static_argnums=2)


@settings(deadline=None, max_examples=60)
@given(TEXTS, MASKS, st.integers(1, 3))
def test_repeats_and_sequences_are_forbidden(tokens, mask, n):
    memory = read(ALL, tokens[:, :PROMPT], mask, tokens[:, PROMPT : PROMPT + 2])
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    once = np.asarray(NGRAMS(logits, memory["text"], n))
    words = np.asarray(samplers.forbid(logits, memory["last"], FORBIDDEN))
    for row in range(ROWS):
        said = [*tokens[row, :PROMPT][mask[row]], *tokens[row, PROMPT : PROMPT + 2]]
        ngrams = {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}
        tail = said[len(said) - n + 1 :]
        repeats = {token for token in range(VOCAB) if len(said) >= n - 1 and (*tail, token) in ngrams}
        assert set(np.flatnonzero(np.isneginf(once[row]))) == repeats
        bad = [[token for token in sequence if token >= 0] for sequence in FORBIDDEN.tolist()]
        completed = {token for token in range(VOCAB) for b in bad if b and [*said, token][-len(b) :] == b}
        assert set(np.flatnonzero(np.isneginf(words[row]))) == completed
        for out in once, words:
            kept = np.isfinite(out[row])
            np.testing.assert_array_equal(out[row][kept], logits[row][kept])


def model(seed=0):
    cell = js.Stack((js.Embed(VOCAB, 3), js.GRU(3, 4), js.Dense(4, VOCAB)))
    return cell, cell.init(jax.random.key(seed))


def ruled(key, logits, memory, *, penalty):
    logits = samplers.repetition_penalty(logits, memory["counts"], penalty)
    logits = samplers.no_repeat_ngrams(logits, memory["text"], 3)
    logits = samplers.minimum_length(logits, memory["since"], 3, end=0)
    return samplers.greedy(key, logits)


def test_generate_carries_a_history():
    """As a loop in Python that reads the whole text anew for each token; ended rows, padding and `start` included."""
    cell, params = model()
    prompt, mask = jnp.array([[1, 2, 3], [3, 0, 0], [0, 0, 0]]), js.length_mask(jnp.array([3, 1, 0]), 3)
    history = samplers.together(
        counts=samplers.token_counts(VOCAB), since=samplers.new_tokens(), text=samplers.text(16)
    )
    out = js.generate(
        cell, params, prompt, mask=mask, start=2, end=0, max_new_tokens=8,
        sample=Partial(ruled, penalty=1.7), history=history,
    )  # fmt: skip
    for row in range(3):
        said, new = [2, *prompt[row, : int(mask[row].sum())].tolist()], []
        while len(new) < 8 and 0 not in new:
            logits = np.asarray(cell.unroll(params, jnp.array([said + new]))[1][0, -1])
            counts = np.bincount(said + new, minlength=VOCAB)
            logits = np.where(counts > 0, np.where(logits > 0, logits / 1.7, logits * 1.7), logits)
            whole = said + new
            for token in range(VOCAB):
                if (*whole[-2:], token) in {tuple(whole[i : i + 3]) for i in range(len(whole) - 2)}:
                    logits[token] = -np.inf
            if len(new) < 3:
                logits[0] = -np.inf
            new.append(int(logits.argmax()))
        assert out.tokens[row, : len(new)].tolist() == new and out.lengths[row] == len(new)


def test_a_grammar_is_kept_and_new_numbers_compile_nothing():
    cell, params = model()

    def kept(key, logits, state, *, transitions):
        return samplers.categorical(key, samplers.allow(logits, transitions[state] >= 0))

    traces = chex.assert_max_traces(kept, n=1)
    for table in (TRANSITIONS, np.where(TRANSITIONS == 2, -1, TRANSITIONS)):
        sample, history = Partial(traces, transitions=jnp.asarray(table)), samplers.automaton(table)
        tokens = js.generate(
            cell,
            params,
            jnp.zeros((20, 1), int),
            key=jax.random.key(0),
            max_new_tokens=12,
            sample=sample,
            history=history,
        ).tokens
        for row in np.asarray(tokens):
            state = 0
            for token in row:
                assert table[state, token] >= 0
                state = table[state, token]


def test_forced_tokens_and_penalties():
    logits, counts = jnp.array([[1.0, -1.0, 2.0]]), jnp.array([[2, 1, 0]])
    np.testing.assert_allclose(samplers.repetition_penalty(logits, counts, 2.0), [[0.5, -2.0, 2.0]])
    np.testing.assert_allclose(samplers.presence_penalty(logits, counts, 0.5), [[0.5, -1.5, 2.0]])
    np.testing.assert_allclose(samplers.frequency_penalty(logits, counts, 0.5), [[0.0, -1.5, 2.0]])
    rows = jnp.broadcast_to(logits, (4, 3))
    forced = samplers.force(rows, jnp.arange(4), jnp.array([[2, 1, -1]] * 4))
    assert np.isfinite(forced).tolist() == [[False, False, True], [False, True, False], [True] * 3, [True] * 3]
    for rule in (samplers.presence_penalty, samplers.frequency_penalty, samplers.repetition_penalty):
        assert rule(logits.astype(jnp.bfloat16), counts, jnp.array([0.5])).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: samplers.token_counts(0), ValueError, "token_counts needs vocab_size >= 1, got 0"),
        (lambda: samplers.automaton(jnp.ones((2, 2))), TypeError, r"integer transitions \[state, vocab\], got float32"),
        (lambda: samplers.no_repeat_ngrams(jnp.ones(3), samplers.Text(jnp.zeros(2, int), 0), 0), ValueError, "n >= 1"),
        (
            lambda: samplers.forbid(jnp.ones(3), jnp.zeros(1, int), jnp.zeros((1, 3), int)),
            ValueError,
            r"recent\(2\), got 1",
        ),
        (lambda: samplers.forbid(jnp.ones(3), jnp.zeros(1, int), jnp.zeros(3, int)), TypeError, r"\[number, length\]"),
        (lambda: samplers.force(jnp.ones(3), jnp.array(0), jnp.ones(2)), TypeError, "force needs integer tokens"),
        (lambda: samplers.allow(jnp.ones(3), jnp.ones(3)), TypeError, "allow needs boolean flags"),
        (lambda: samplers.without_replacement(None, jnp.ones(3), 4), ValueError, "k from 1 to the vocab 3, got 4"),
    ],
)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()
