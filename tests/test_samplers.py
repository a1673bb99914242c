"""Samplers: filters against a plain reading of their definitions, draws against the probabilities they should have."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxseq import samplers

# few distinct values, so that ties are common, and forbidden tokens
VALUES = st.sampled_from([-np.inf, -30.0, -1.0, 0.0, 0.5, 0.5001, 2.0, 30.0])
LOGITS = hnp.arrays(np.float32, (2, 3, 7), elements=VALUES)
MASSES = st.sampled_from([0.0, 1e-9, 0.123, 0.457, 0.891, 0.9993, 1.0, 2.0])
TOP_K, TOP_P = jax.jit(samplers.top_k), jax.jit(samplers.top_p)


def kept_by_k(row, k):
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    return set(order[:k])


def kept_by_p(row, p):
    if p >= 1:
        return set(range(len(row)))
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    weights = np.exp(np.asarray(row, np.float64) - max(row))
    kept, mass = set(), 0.0
    for token in order:
        if kept and mass >= p:
            break
        kept.add(token)
        mass += weights[token] / weights.sum()
    return kept


def probabilities_of(row):
    weights = np.exp(np.asarray(row, np.float64) - max(row))
    return weights / weights.sum()


def entropy_of(row):
    p = probabilities_of(row)
    return -sum(q * np.log(q) for q in p if q > 0)


def at_least(row, bound):
    p = probabilities_of(row)
    return {token for token, q in enumerate(p) if q >= bound or q == p.max()}


def kept_by_typical(row, p):
    if p >= 1:
        return set(range(len(row)))
    probabilities, entropy = probabilities_of(row), entropy_of(row)
    with np.errstate(divide="ignore"):
        strangeness = np.abs(-np.log(probabilities) - entropy).round(5)  # equal ones are to stay equal
    kept, mass = set(), 0.0
    for token in sorted(range(len(row)), key=lambda token: (strangeness[token], token)):
        if kept and mass >= p:
            break
        kept.add(token)
        mass += probabilities[token]
    return kept


def kept_by_sigma(row, n):
    finite = [float(value) for value in row if np.isfinite(value)]
    return {token for token, value in enumerate(row) if value >= max(finite) - n * np.std(finite)}


FILTERS = {
    "min_p": lambda row, p: at_least(row, p * probabilities_of(row).max()),
    "typical": kept_by_typical,
    "epsilon": at_least,
    "eta": lambda row, value: at_least(row, min(value, np.sqrt(value) * np.exp(-entropy_of(row)))),
    "top_n_sigma": kept_by_sigma,
}
COMPILED = {name: jax.jit(getattr(samplers, name)) for name in FILTERS}


def only(row, kept):
    return [value if token in kept else -np.inf for token, value in enumerate(row)]


@settings(deadline=None, max_examples=60)
@given(LOGITS, hnp.arrays(np.int32, (2, 3), elements=st.integers(1, 9)))
def test_top_k_keeps_the_k_first_in_order(logits, k):
    expected = [only(row, kept_by_k(row, int(n))) for row, n in zip(logits.reshape(-1, 7), k.ravel(), strict=True)]
    np.testing.assert_array_equal(TOP_K(logits, k), np.reshape(expected, logits.shape))


@settings(deadline=None, max_examples=60)
@given(LOGITS, hnp.arrays(np.float32, (2, 3), elements=MASSES))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    logits[..., 0] = np.maximum(logits[..., 0], -30)  # at least one token is allowed
    expected = [only(row, kept_by_p(row, float(q))) for row, q in zip(logits.reshape(-1, 7), p.ravel(), strict=True)]
    np.testing.assert_array_equal(TOP_P(logits, p), np.reshape(expected, logits.shape))


@pytest.mark.parametrize("name", FILTERS)
@settings(deadline=None, max_examples=60)
@given(LOGITS, hnp.arrays(np.float32, (2, 3), elements=MASSES))
def test_filters_keep_what_their_definitions_say(name, logits, value):
    logits[..., 0] = np.maximum(logits[..., 0], -30)  # at least one token is allowed
    rows = zip(logits.reshape(-1, 7), value.ravel(), strict=True)
    expected = [only(row, FILTERS[name](row, float(number))) for row, number in rows]
    np.testing.assert_array_equal(COMPILED[name](logits, value), np.reshape(expected, logits.shape))


def test_top_p_by_hand():
    logits = np.log([0.4, 0.1, 0.3, 0.2]).astype(np.float32)
    for p, kept in [(0.39, {0}), (0.41, {0, 2}), (0.69, {0, 2}), (0.71, {0, 2, 3}), (0.95, {0, 1, 2, 3})]:
        np.testing.assert_array_equal(samplers.top_p(logits, p), np.float32(only(logits, kept)))


def test_p_of_one_keeps_a_tail_that_rounding_would_lose():
    logits = jnp.array([0.0, -40.0, -80.0])
    np.testing.assert_array_equal(samplers.top_p(logits, 1.0), logits)
    assert np.isinf(samplers.top_p(logits, 0.9999)[1:]).all()


@pytest.mark.parametrize("name", ["top_k", "top_p", *FILTERS])
def test_rows_without_any_allowed_token_stay_so(name):
    row = jnp.full((2, 4), -jnp.inf)
    np.testing.assert_array_equal(getattr(samplers, name)(row, 3 if name == "top_k" else 0.5), row)


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_one_counts_as_one(k):
    np.testing.assert_array_equal(samplers.top_k(jnp.array([1.0, 2.0]), k), [-np.inf, 2.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_filters_keep_the_dtype(dtype):
    with jax.enable_x64(True):
        logits = jnp.array([1.0, 3.0, 2.0], dtype)
        for filtered in samplers.top_k(logits, 2), samplers.top_p(logits, 0.8):
            assert filtered.dtype == dtype
            np.testing.assert_array_equal(filtered, jnp.array([-jnp.inf, 3.0, 2.0], dtype))


def test_top_p_of_many_half_precision_logits():
    kept = jnp.isfinite(samplers.top_p(jnp.zeros(4096, jnp.bfloat16), 0.5)).sum()  # a sum in bfloat16 stops at 1/16
    assert kept == 2048


def test_gradients_reach_what_is_kept():
    logits = jnp.array([1.0, 3.0, 2.0])
    gradient = jax.grad(lambda logits: jax.nn.logsumexp(samplers.top_p(samplers.top_k(logits, 2), 0.99)))(logits)
    np.testing.assert_allclose(gradient[1:], jax.nn.softmax(logits[1:]), rtol=1e-6)
    assert gradient[0] == 0


def test_new_numbers_compile_nothing():
    @jax.jit
    @chex.assert_max_traces(1)
    def draw(sample, key, logits):
        return sample(key, logits)

    def nucleus(key, logits, *, temperature, k, p):
        return samplers.categorical(key, samplers.top_p(samplers.top_k(logits / temperature, k), p))

    logits = jnp.array([[0.0, 1.0, 2.0, 3.0]])
    drawn = [
        draw(jax.tree_util.Partial(nucleus, temperature=temperature, k=k, p=p), jax.random.key(0), logits)
        for temperature, k, p in [(0.01, 4, 1.0), (1e6, 1, 1.0), (1e6, 4, 1e-6)]
    ]
    assert [token.tolist() for token in drawn] == [[3], [3], [3]]


def test_vmap_over_settings_equals_settings_a_row():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.float32)
    k, p = jnp.arange(1, 6), jnp.linspace(0.1, 1.0, 5)
    np.testing.assert_array_equal(jax.vmap(samplers.top_k)(logits, k), samplers.top_k(logits, k))
    np.testing.assert_array_equal(jax.vmap(samplers.top_p)(logits, p), samplers.top_p(logits, p))


def test_frequencies_are_the_probabilities():
    """A chi-square test that a right sampler fails once in ten thousand (for one seed: never, or always)."""
    probabilities = np.array([0.5, 0.2, 0.0, 0.25, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities), (40_000, 5)) + 3.0  # any constant may be added
    counts = np.bincount(samplers.categorical(jax.random.key(0), logits), minlength=5)
    assert counts[2] == 0
    allowed = probabilities > 0
    test = scipy.stats.chisquare(counts[allowed], 40_000 * probabilities[allowed])
    assert test.pvalue > 1e-4


def test_what_is_drawn_without_replacement():
    """Ordered pairs have the probabilities p_i p_j / (1 - p_i)."""
    p = np.array([0.5, 0.2, 0.0, 0.3])
    logits = jnp.broadcast_to(jnp.log(p), (40_000, 4))
    first, second = np.asarray(samplers.without_replacement(jax.random.key(0), logits, 2)).T
    counts = np.zeros((4, 4))
    np.add.at(counts, (first, second), 1)
    expected = 40_000 * np.outer(p / (1 - p), p) * (1 - np.eye(4))
    assert not counts[expected == 0].any()
    assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-4
    assert samplers.without_replacement(jax.random.key(0), logits[0], 4).tolist()[3] == 2  # when there is no other


def test_gumbel_softmax_is_a_token_with_the_gradients_of_a_softmax():
    p, key = np.array([0.5, 0.2, 0.0, 0.3]), jax.random.key(1)
    logits = jnp.log(p)
    hard = samplers.gumbel_softmax(key, jnp.broadcast_to(logits, (40_000, 4)))
    assert (hard.max(axis=-1) == 1).all() and (hard.sum(axis=-1) == 1).all()
    counts = np.asarray(hard.sum(axis=0))
    assert counts[2] == 0 and scipy.stats.chisquare(counts[p > 0], 40_000 * p[p > 0]).pvalue > 1e-4
    assert (hard.argmax(axis=-1) == samplers.categorical(key, jnp.broadcast_to(logits, (40_000, 4)))).all()

    noise = samplers.gumbel(key, jnp.zeros(3))
    logits = jnp.array([0.3, -1.0, 2.0])

    def of_softmax(logits):
        return jax.nn.softmax((logits + noise) / 0.7) @ jnp.arange(3.0)

    def of_token(logits, **options):
        return samplers.gumbel_softmax(key, logits, 0.7, **options) @ jnp.arange(3.0)

    np.testing.assert_allclose(jax.grad(of_token)(logits), jax.grad(of_softmax)(logits), rtol=1e-5)
    np.testing.assert_allclose(of_token(logits, straight_through=False), of_softmax(logits), rtol=1e-6)
    assert of_token(logits) in (0, 1, 2)


def test_frequencies_after_the_filters():
    probabilities = jnp.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.broadcast_to(jnp.log(probabilities), (40_000, 4))
    drawn = samplers.categorical(jax.random.key(1), samplers.top_p(samplers.top_k(logits, 3), 0.7))
    counts = np.bincount(drawn, minlength=4)  # 0.7 of the three's 0.9 is reached by two tokens
    assert not counts[2:].any()
    assert scipy.stats.chisquare(counts[:2], 40_000 * np.array([4, 3]) / 7).pvalue > 1e-4


def test_half_precision_logits_are_drawn_with_full_precision_noise():
    """Noise in bfloat16 is so coarse that many tokens tie, and the first of them would win."""
    drawn = samplers.categorical(jax.random.key(0), jnp.zeros((2000, 1024), jnp.bfloat16))
    error = (1024**2 / 12 / 2000) ** 0.5
    assert abs(np.mean(drawn) - 511.5) < 4 * error


def test_without_a_key_the_best_token():
    logits = jnp.array([[0.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -5.0], [-jnp.inf] * 3])
    for tokens in samplers.greedy(None, logits), samplers.categorical(None, logits):
        assert tokens.tolist() == [1, 2, 0]
    assert samplers.greedy(jax.random.key(0), logits).tolist() == [1, 2, 0]
    assert samplers.categorical(jax.random.key(0), logits[2]) == 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: samplers.top_k(jnp.ones((2, 5)), 2.0), TypeError, r"integer k, got float32\[\]"),
        (lambda: samplers.top_k(jnp.ones((2, 5)), jnp.ones(3, int)), ValueError, r"\(2,\).*k of shape \(3,\)"),
        (lambda: samplers.top_p(jnp.ones((2, 5)), jnp.ones((2, 5))), ValueError, r"\(2,\).*p of shape \(2, 5\)"),
        (lambda: samplers.top_p(jnp.ones((2, 5), int), 0.5), TypeError, r"top_p needs floating logits.*int32\[2,5\]"),
        (lambda: samplers.greedy(None, jnp.ones(())), TypeError, r"greedy needs floating logits .*float32\[\]"),
        (lambda: samplers.categorical(None, jnp.ones(3, int)), TypeError, "categorical needs floating logits"),
    ],
)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_temperature():
    logits = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, 0.0, 1.0]])
    np.testing.assert_allclose(jax.nn.softmax(samplers.temperature(logits, 2.0)), jax.nn.softmax(logits / 2))
    coldest = samplers.temperature(logits, jnp.array([0.0, 1.0]))  # rows may differ; at 0 the first of the largest
    np.testing.assert_allclose(coldest, [[-jnp.inf, 0.0, -jnp.inf], [-jnp.inf, -1.0, 0.0]])
    tokens = samplers.categorical(jax.random.key(0), samplers.temperature(logits, 0.0))
    assert tokens.tolist() == [1, 2]
    assert samplers.temperature(logits.astype(jnp.bfloat16), 0.5).dtype == jnp.bfloat16
    half = samplers.temperature(logits.astype(jnp.float16), 1e-5)  # 3 / 1e-5 is more than float16 can hold
    assert half.dtype == jnp.float16 and half.tolist() == [[-jnp.inf, 0.0, 0.0], [-jnp.inf, -jnp.inf, 0.0]]
    assert not jnp.isnan(samplers.temperature(jnp.full((1, 3), -jnp.inf), 0.5)).any()
