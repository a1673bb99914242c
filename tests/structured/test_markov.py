import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.structured import markov


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
    model = markov.fit(train, vocab_size, order - 1)
    contexts = [list(c) for length in range(4) for c in itertools.product(range(vocab_size), repeat=length)]
    for context in [*contexts, train[-order:].tolist()]:
        texts = (np.array([*context, token]) for token in range(vocab_size))
        nats = np.array([markov.log_probabilities(*model, text, len(context))[0] for text in texts])
        assert np.isfinite(nats).all()
        np.testing.assert_allclose(np.exp(nats).sum(), 1, rtol=1e-12)


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
    nats = markov.log_probabilities(*markov.fit(train, 4, order - 1), held_out, start=order - 1)
    want = [
        np.log(kneser_ney(train.tolist(), 4, tuple(held_out[t - order + 1 : t].tolist()), int(held_out[t]), order))
        for t in range(order - 1, len(held_out))
    ]
    np.testing.assert_allclose(nats, want, rtol=1e-12)


def test_scores_a_part_with_the_text_before_it():
    train, tokens = text(200, 5), text(100, 5, seed=1)
    model = markov.fit(train, 5, 2)
    whole = markov.log_probabilities(*model, tokens, 1)
    np.testing.assert_array_equal(markov.log_probabilities(*model, tokens, 40, 70), whole[39:69])


def test_structure_that_longer_contexts_show_costs_fewer_bits():
    train, tokens = text(3000, 5), text(500, 5, seed=1)
    models = (markov.fit(train, 5, order) for order in (0, 1, 2))
    bits = [-markov.log_probabilities(*model, tokens, 2).mean() / np.log(2) for model in models]
    entropy = -(0.68 * np.log2(0.68) + 4 * 0.08 * np.log2(0.08))  # of the source
    assert bits[0] > bits[2] + 0.5 and entropy - 0.1 < bits[2] < entropy + 0.1


def test_large_vocabularies_do_not_overflow():
    train = np.arange(100_000)[::-1].copy()
    with pytest.raises(ValueError, match="too many for codes"):
        markov.fit(train, 100_000, 4)
    nats = markov.log_probabilities(*markov.fit(train[:20_000], 100_000, 4), train[:20_000], 4)
    assert np.isfinite(nats).all() and nats.min() > -np.log(100_000)


SMOOTHINGS = [markov.KneserNey(), markov.Interpolated(0.7), markov.AddAlpha(0.5), markov.AddAlpha(0.0)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("smoothing", SMOOTHINGS, ids=repr)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_cell_gives_the_same_probabilities(order, smoothing):
    train, tokens = text(60, 4), text(40, 4, seed=1)
    chain, params = markov.fit(train, 5, order, smoothing=smoothing)
    _, logits = chain.unroll(params, tokens)
    np.testing.assert_allclose(np.exp(logits).sum(axis=-1), 1, rtol=1e-12)
    want = markov.log_probabilities(chain, params, tokens, 1)
    np.testing.assert_allclose(np.asarray(logits)[np.arange(39), tokens[1:]], want, rtol=1e-12)


def conditional(tokens, vocab_size, context, token):
    """How often a token follows a context in a text, and how often the context is followed at all."""
    k = len(context)
    after = [tokens[i + k] for i in range(len(tokens) - k) if tuple(tokens[i : i + k]) == context]
    return after.count(token), len(after)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_add_alpha_counts(alpha):
    train = text(60, 3)
    chain, params = markov.fit(train, 4, 2, smoothing=markov.AddAlpha(alpha))
    table = chain.table(params)
    assert table.shape == (4, 4, 4)
    for *context, token in itertools.product(range(4), repeat=3):
        count, total = conditional(train.tolist(), 4, tuple(context), token)
        want = (count + alpha) / (total + 4 * alpha) if total + alpha else 1 / 4
        np.testing.assert_allclose(table[*context, token], want, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_interpolated_counts():
    train = text(60, 3)
    chain, params = markov.fit(train, 4, 1, smoothing=markov.Interpolated(0.7))
    for context, token in itertools.product(range(4), repeat=2):
        want = 0.7 * train.tolist().count(token) / len(train) + 0.3 / 4
        count, total = conditional(train.tolist(), 4, (context,), token)
        want = 0.7 * count / total + 0.3 * want if total else want
        np.testing.assert_allclose(chain.table(params)[context, token], want, rtol=1e-12)


def test_short_contexts_have_estimates_of_their_own():
    """Before k tokens are read, those of a shorter context count, also with a smoothing that does not interpolate."""
    chain, params = markov.fit(np.array([0, 0, 1] * 5), 2, 2, smoothing=markov.AddAlpha(0.0))
    _, logits = chain.unroll(params, np.array([0, 0]))
    np.testing.assert_allclose(np.exp(logits), [[0.5, 0.5], [0, 1]], atol=1e-6)


def test_no_gram_reaches_over_a_reset_a_row_or_padding():
    tokens = np.array([[0, 1, 2, 0], [1, 2, 1, 2]])
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 0]], bool)
    reset = np.array([[0, 0, 0, 0], [0, 0, 1, 0]], bool)
    maximum_likelihood = markov.AddAlpha(0.0)
    chain, params = markov.fit(tokens, 3, 1, smoothing=maximum_likelihood, mask=mask, reset=reset)
    # the documents are 0 1 0, then 1 2, then 1
    assert params[1].codes.tolist() == [0 * 3 + 1, 1 * 3 + 0, 1 * 3 + 2]
    np.testing.assert_allclose(chain.table(params), [[0, 1, 0], [0.5, 0, 0.5], [1 / 3] * 3], atol=1e-6)


def test_generate_follows_the_chain():
    """Frequencies of what follows what in the generated text are those of the transition matrix."""
    chain, params = markov.fit(text(300, 3), 3, 1)
    out = js.generate(chain, params, np.zeros((200, 1), int), key=jax.random.key(0), max_new_tokens=60)
    table = np.zeros((3, 3))
    np.add.at(table, (out.tokens[:, :-1], out.tokens[:, 1:]), 1)
    np.testing.assert_allclose(table / table.sum(axis=1, keepdims=True), chain.table(params), atol=0.03)


def test_perplexity_is_that_of_the_probabilities():
    train = text(500, 4)
    chain, params = markov.fit(train, 4, 2)
    _, logits = chain.unroll(params, train[:-1])
    losses = js.losses.cross_entropy(logits, train[1:])
    want = np.exp(-markov.log_probabilities(chain, params, train, 1).mean())
    np.testing.assert_allclose(js.metrics.perplexity(losses), want, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 2])
def test_texts_of_no_tokens(order):
    chain, params = markov.fit(np.zeros((2, 0), int), 3, order)
    np.testing.assert_allclose(markov.log_probabilities(chain, params, [0, 1]), np.log([1 / 3, 1 / 3]))
    assert markov.log_probabilities(chain, params, np.zeros(0, int)).shape == (0,)
    np.testing.assert_allclose(chain.unroll(params, np.array([1, 2, 0]))[1], np.log(1 / 3), rtol=1e-6)
    short, params = markov.fit(np.array([1]), 3, order)
    assert np.isfinite(short.unroll(params, np.array([1, 2, 0]))[1]).all()


def test_a_step_in_the_default_dtype():
    """The params of `fit` are of float64, and `step` by itself is as `unroll`."""
    tokens = text(60, 3)
    chain, params = markov.fit(tokens, 3, 1)
    state, logits = chain.step(params, chain.initial_state(params), jnp.array(1))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, chain.unroll(params, np.array([1]))[1][0], rtol=1e-6)


def test_samples_of_order_two_follow_the_pairs():
    """What follows each pair of tokens in the generated text is distributed as it is in the counts."""
    train = text(300, 3)
    chain, params = markov.fit(train, 3, 2, smoothing=markov.AddAlpha(0.0))
    out = js.generate(chain, params, np.tile([0, 1], (200, 1)), key=jax.random.key(0), max_new_tokens=60)
    found = np.zeros((3, 3, 3))
    np.add.at(found, (out.tokens[:, :-2], out.tokens[:, 1:-1], out.tokens[:, 2:]), 1)
    for context in itertools.product(range(3), repeat=2):
        counts = [conditional(train.tolist(), 3, context, token) for token in range(3)]
        want = np.array([count / total for count, total in counts])
        np.testing.assert_allclose(found[context] / found[context].sum(), want, atol=0.06)


def test_tokens_out_of_range_are_unseen():
    chain, params = markov.fit(text(60, 3), 3, 1)
    logits = chain.unroll(params, np.array([3, -1]))[1]
    unigram = np.exp(markov.fit(text(60, 3), 3, 1)[0].unroll(params, np.array([7]))[1])
    np.testing.assert_allclose(np.exp(logits), np.concatenate([unigram, unigram]), rtol=1e-6)


def test_errors():
    def says(message, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=message):
            markov.fit(*arguments, **options)

    says("integer tokens", np.zeros(3), 3, 1, error=TypeError)
    says("order of 0 or more", np.zeros(3, int), 3, -1)
    says("tokens from 0 to 5; the vocabulary has 3", np.array([0, 5]), 3, 1)
    says("boolean mask", np.zeros(3, int), 3, 1, mask=np.ones(3), error=TypeError)
    says("alpha >= 0", np.zeros(3, int), 3, 1, smoothing=markov.AddAlpha(-1.0))
    says("share between 0 and 1", np.zeros(3, int), 3, 1, smoothing=markov.Interpolated(2.0))
    says("finite alpha >= 0", np.zeros(3, int), 3, 1, smoothing=markov.AddAlpha(np.inf))
    for smoothing in (0.5, markov.KneserNey, "kneser-ney"):
        says("KneserNey\\(\\), Interpolated", np.zeros(3, int), 3, 1, smoothing=smoothing, error=TypeError)
    says("vocab_size of 1 or more tokens, got 3.0", np.zeros(3, int), 3.0, 1)
    says("rows of one length", [[0, 1], [0]], 3, 1, error=TypeError)
    with pytest.raises(ValueError, match="got 10 2-grams"):
        markov.MarkovChain(3, (3, 10))
    with pytest.raises(TypeError, match="the number of n-grams of each length"):
        markov.MarkovChain(3, ())


def test_params_of_another_chain_are_refused():
    (chain, _), (_, longer) = (markov.fit(np.array([0, 1, 0]), 2, order) for order in (1, 2))
    for params in (None, longer, js.Dense(2, 2).init(jax.random.key(0))):
        with pytest.raises(ValueError, match="got params of another layer"):
            chain.unroll(params, jnp.array([0, 1]))


def test_errors_of_log_probabilities():
    model = markov.fit(np.array([0, 1, 0, 2, 0, 1, 0, 2, 0, 1] * 3), 3, 2)

    def says(message, *arguments, error=ValueError):
        with pytest.raises(error, match=message):
            markov.log_probabilities(*model, *arguments)

    says("from 0 to 3; the vocabulary has 3", np.array([0, 1, 3]))
    says("from -1 to 1; the vocabulary has 3", np.array([0, -1, 1]))
    says("integer tokens", np.array([0.0, 1.0]), error=TypeError)
    for bounds in [(-2, None), (3, 2), (0, 31), (31, None)]:
        says("0 <= start <= stop <= time", np.zeros(30, int), *bounds)
    says("got shape \\(2, 3\\)", np.zeros((2, 3), int))
