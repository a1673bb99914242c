import itertools

import numpy as np
import pytest

from jaxseq.training import ngrams


def text(length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Tokens with structure: each depends on the two before."""
    rng = np.random.default_rng(seed)
    tokens = [0, 1]
    while len(tokens) < length:
        likely = (tokens[-1] + 2 * tokens[-2]) % vocab_size
        tokens.append(likely if rng.random() < 0.6 else int(rng.integers(vocab_size)))
    return np.array(tokens)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_every_context(order: int):
    vocab_size = 4
    train = text(60, vocab_size - 1)  # the last token never occurs
    model = ngrams.fit(train, vocab_size, order)
    contexts = [list(c) for length in range(4) for c in itertools.product(range(vocab_size), repeat=length)]
    for context in [*contexts, train[-order:].tolist()]:
        bits = [ngrams.bits(model, np.array([*context, token]), len(context))[0] for token in range(vocab_size)]
        assert np.isfinite(bits).all()
        np.testing.assert_allclose(np.sum(2.0 ** -np.array(bits)), 1, rtol=1e-12)


def kneser_ney(train: list[int], vocab_size: int, context: tuple[int, ...], token: int, order: int) -> float:
    """The equations word for word, with dictionaries."""

    def occurrences(length):
        return [tuple(train[i : i + length]) for i in range(len(train) - length + 1)]

    def count(gram, longest):
        if longest:
            return occurrences(len(gram)).count(gram)
        return len({longer for longer in occurrences(len(gram) + 1) if longer[1:] == gram})

    def probability(context, length, longest):
        if length == 0:
            return 1 / vocab_size
        shorter = probability(context[1:], length - 1, False)
        counts = {gram: count(gram, longest) for gram in set(occurrences(length))}
        once, twice = (list(counts.values()).count(number) for number in (1, 2))
        discount = once / (once + 2 * twice) if once and twice else 0.5
        after = {gram[-1]: number for gram, number in counts.items() if gram[:-1] == context and number > 0}
        if not after:
            return shorter
        kept = max(after.get(token, 0) - discount, 0)
        return (kept + discount * len(after) * shorter) / sum(after.values())

    return probability(context, order, True)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_the_equations(order: int):
    train, held_out = text(40, 3), text(30, 4, seed=1)
    bits = ngrams.bits(ngrams.fit(train, 4, order), held_out, start=order - 1)
    want = [
        -np.log2(kneser_ney(train.tolist(), 4, tuple(held_out[t - order + 1 : t].tolist()), int(held_out[t]), order))
        for t in range(order - 1, len(held_out))
    ]
    np.testing.assert_allclose(bits, want, rtol=1e-12)


def test_scores_a_part_with_the_text_before_it():
    train, tokens = text(200, 5), text(100, 5, seed=1)
    model = ngrams.fit(train, 5, 3)
    whole = ngrams.bits(model, tokens, 1)
    np.testing.assert_array_equal(ngrams.bits(model, tokens, 40, 70), whole[39:69])


def test_structure_that_longer_contexts_show_costs_fewer_bits():
    train, tokens = text(3000, 5), text(500, 5, seed=1)
    bits = [ngrams.bits(ngrams.fit(train, 5, order), tokens, 2).mean() for order in (1, 2, 3)]
    entropy = -(0.68 * np.log2(0.68) + 4 * 0.08 * np.log2(0.08))  # of the source
    assert bits[0] > bits[2] + 0.5 and entropy - 0.1 < bits[2] < entropy + 0.1


def test_large_vocabularies_do_not_overflow():
    train = np.arange(100_000)[::-1].copy()
    bits = ngrams.bits(ngrams.fit(train, 100_000, 5), train, 4)
    assert np.isfinite(bits).all() and bits.max() < np.log2(100_000)
