"""The chain rule, what the next token depends on, and the size of a model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from jaxseq.structured import graphical, markov
from tests.numbers import random_params

pytestmark = pytest.mark.usefixtures("float64")
VOCAB = 3


def elman():
    cell = js.Stack((js.Embed(VOCAB, 4), js.Elman(4, 5), js.Dense(5, VOCAB)))
    return cell, random_params(np.random.default_rng(0), cell)


def chain():
    text = np.random.default_rng(0).integers(0, VOCAB, 100)
    return markov.fit(text, VOCAB, 2)


@pytest.mark.parametrize("model", [elman, chain])
def test_the_probabilities_of_all_sequences_sum_to_one(model):
    cell, params = model()
    for length in (1, 4):
        table = jnp.exp(graphical.joint_table(cell, params, length, VOCAB, start=1))
        assert table.shape == (VOCAB,) * length
        np.testing.assert_allclose(table.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("model", [elman, chain])
def test_the_table_is_the_product_of_conditionals(model):
    """Each by `step`, one token after the other."""
    cell, params = model()
    table = graphical.joint_table(cell, params, 3, VOCAB, start=2)
    for sequence in itertools.product(range(VOCAB), repeat=3):
        state, log_p, before = cell.initial_state(params), 0.0, 2
        for token in sequence:
            state, logits = cell.step(params, state, jnp.array(before))
            log_p += jax.nn.log_softmax(logits)[token]
            before = token
        np.testing.assert_allclose(table[sequence], log_p, rtol=1e-12)


@pytest.mark.parametrize(("model", "depends"), [(elman, True), (chain, False)])
def test_what_the_next_token_depends_on(model, depends):
    """Given the two before it, that of a chain of order 2 does not depend on older ones; an Elman network's does."""
    cell, params = model()
    table = jnp.exp(graphical.joint_table(cell, params, 4, VOCAB))
    conditional = table / table.sum(axis=-1, keepdims=True)
    differs = np.abs(conditional - conditional[:1]).max()
    assert differs > 1e-3 if depends else differs < 1e-12


def test_packed_and_padded_rows_are_their_sequences():
    cell, params = elman()
    tokens = np.array([[1, 2, 0, 2, 1], [2, 2, 1, 0, 0]])
    mask = np.array([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    reset = np.array([[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], bool)
    found = graphical.joint_log_probability(cell, params, tokens, mask, start=np.array([1, 2]), reset=reset)

    def one(sequence, start):
        return graphical.joint_log_probability(cell, params, np.array(sequence), start=start)

    np.testing.assert_allclose(found, [one([1, 0], 1) + one([2, 1], 1), one([2, 2, 1], 2)], rtol=1e-12)
    gradient = jax.grad(lambda params: graphical.joint_log_probability(cell, params, tokens, mask, reset=reset).sum())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


def test_an_empty_sequence_is_certain():
    cell, params = elman()
    assert graphical.joint_log_probability(cell, params, np.zeros((2, 0), int)).tolist() == [0, 0]
    masked = graphical.joint_log_probability(cell, params, np.zeros((1, 3), int), np.zeros((1, 3), bool))
    assert masked.tolist() == [0]


def test_free_parameters():
    """As many as the conditional tables of a chain hold, less one each; of a cell those that `init` makes."""
    for length in (1, 2, 3, 5):
        assert graphical.free_parameters("table", VOCAB, length) == VOCAB**length - 1
        contexts = {
            sequence[max(t - 2, 0) : t]
            for sequence in itertools.product(range(VOCAB), repeat=length)
            for t in range(length)
        }
        assert graphical.free_parameters(2, VOCAB, length) == len(contexts) * (VOCAB - 1)
        assert graphical.free_parameters(chain()[0], VOCAB, length) == len(contexts) * (VOCAB - 1)
        cell, params = elman()
        assert graphical.free_parameters(cell, VOCAB, length) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_errors():
    cell, params = elman()

    def says(message, function, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=message):
            function(*arguments, **options)

    says("reads tokens", graphical.joint_log_probability, js.Elman(2, 3), params, np.zeros(3, int), error=TypeError)
    says("got a single one", graphical.joint_log_probability, cell, params, 3)
    says("cast token ids", graphical.joint_log_probability, cell, params, np.zeros(3), error=TypeError)
    says("at most 2\\*\\*24", graphical.joint_table, cell, params, 20, VOCAB)
    says('order of a chain, or "table"', graphical.free_parameters, "tables", 3, 3, error=TypeError)
    says("length >= 1", graphical.free_parameters, 1, 3, 0)
    says(
        "one a row \\(2,\\)",
        graphical.joint_log_probability,
        cell,
        params,
        np.zeros((2, 3), int),
        start=np.zeros(3, int),
    )
    for size in (VOCAB - 1, VOCAB + 1):
        says(f"vocab_size={size}, but the cell gives 3 logits", graphical.joint_table, cell, params, 2, size)


def test_a_start_beyond_the_dtype_of_the_tokens():
    cell, params = elman()
    narrow, wide = (
        graphical.joint_log_probability(cell, params, np.zeros((1, 2), dtype), start=300) for dtype in (np.uint8, int)
    )
    np.testing.assert_array_equal(narrow, wide)


def test_tokens_of_sharded_rows():
    cell, params = elman()
    tokens = jnp.array([[1, 2, 0], [2, 2, 1]])
    expected = graphical.joint_log_probability(cell, params, tokens)
    explicit = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        rows = jax.sharding.reshard(tokens, jax.sharding.PartitionSpec("rows"))
        found = graphical.joint_log_probability(cell, params, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
