"""Metrics: by hand, and equal however the steps are padded."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq import losses, metrics

MASK = jnp.array([[True, True, False], [True, False, False]])
PROBABILITIES = jnp.array([[0.5, 0.25, 1.0], [0.125, 1.0, 1.0]])  # of the targets


def test_bits_and_perplexity_by_hand():
    nats = -jnp.log(PROBABILITIES)
    np.testing.assert_allclose(metrics.bits_per_symbol(nats, MASK), (1 + 2 + 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics.perplexity(nats, MASK), 4.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.bits_per_symbol(nats), 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.perplexity(nats), 2.0, rtol=1e-6)


def test_a_uniform_guess_costs_its_alphabet():
    nats = losses.cross_entropy(jnp.zeros((4, 32)), jnp.arange(4))
    np.testing.assert_allclose(metrics.perplexity(nats), 32, rtol=1e-6)
    np.testing.assert_allclose(metrics.bits_per_symbol(nats), 5, rtol=1e-6)


def test_perplexity_is_two_to_the_bits():
    nats = jnp.asarray(np.random.default_rng(0).uniform(0, 5, (2, 3)), jnp.float32)
    bits = metrics.bits_per_symbol(nats, MASK)
    np.testing.assert_allclose(metrics.perplexity(nats, MASK), 2**bits, rtol=1e-6)


def test_accuracy_counts_unmasked_steps():
    logits = jnp.array([[[0.0, 1.0], [2.0, 1.0], [0.0, jnp.nan]], [[3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    targets = jnp.array([[1, 1, 9], [0, 1, 0]])
    assert metrics.accuracy(logits, targets, MASK) == pytest.approx(2 / 3)
    assert metrics.accuracy(logits, targets) == pytest.approx(3 / 6)
    assert metrics.accuracy(jnp.ones((1, 3)), jnp.array([0])) == 1  # of equal logits the first


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_accuracy_under_strict_promotion(dtype):
    logits, targets = jnp.array([[0.0, 1.0], [2.0, 1.0]], jnp.bfloat16), jnp.array([1, 1], dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert metrics.accuracy(logits, targets) == 0.5
        assert metrics.accuracy(logits, targets, jnp.array([True, False])) == 1


def test_no_steps_at_all():
    none = jnp.zeros((2, 3), bool)
    nats = jnp.full((2, 3), jnp.nan)
    assert metrics.perplexity(nats, none) == 1
    assert metrics.bits_per_symbol(nats, none) == 0
    assert metrics.accuracy(jnp.full((2, 3, 4), jnp.nan), jnp.full((2, 3), -1), none) == 0
    assert metrics.perplexity(nats[:, :0]) == 1


def test_every_result_is_one_float32_number():
    nats = jnp.ones((2, 3), jnp.bfloat16)
    results = metrics.perplexity(nats), metrics.bits_per_symbol(nats), metrics.accuracy(nats, jnp.array([0, 1]))
    assert all(result.shape == () and result.dtype == jnp.float32 for result in results)
    assert float(results[1]) == pytest.approx(1 / math.log(2))


def test_under_jit_and_vmap():
    nats = -jnp.log(PROBABILITIES)
    rows = jax.jit(jax.vmap(metrics.bits_per_symbol))(nats, MASK)
    np.testing.assert_allclose(rows, [1.5, 3.0], rtol=1e-6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: metrics.accuracy(jnp.ones((2, 5)), jnp.ones(2)), TypeError, r"integer targets.*float32\[2\]"),
        (lambda: metrics.accuracy(jnp.ones((2, 5)), jnp.ones(3, int)), ValueError, r"\(2, 5\) and .*\(3,\)"),
        (lambda: metrics.perplexity(jnp.ones(3), jnp.ones(3)), TypeError, "boolean mask"),
        (lambda: metrics.bits_per_symbol(jnp.ones(3), jnp.ones(2, bool)), ValueError, r"\(2,\).*\(3,\)"),
    ],
)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()
