"""The transducer's loss equals the enumeration of all ways through the lattice, and Graves' recurrence in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies
from jax.test_util import check_grads

from jaxseq import length_mask
from jaxseq.structured import transducer
from tests.structured.paths import check, flags, lengths

pytestmark = pytest.mark.usefixtures("float64")
SEEDS = strategies.integers(0, 2**31)
TIME, COUNT, VOCAB = 3, 2, 4


def random_joint(seed, batch=(2,), time=TIME, count=COUNT):
    """Log-probabilities, and labels that are no blank, 0."""
    generator = np.random.default_rng(seed)
    log_probs = scipy.special.log_softmax(generator.normal(size=(*batch, time, count + 1, VOCAB), scale=2), axis=-1)
    return log_probs, generator.integers(1, VOCAB, size=(*batch, count))


@jax.jit
def program(log_probs, labels, mask, label_mask):
    def total(log_probs):
        losses = transducer.loss(transducer.lattice(log_probs, labels), mask, label_mask)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(log_probs)
    return losses, gradient


def ways(steps, count):
    """Every order of one blank a step, the last of them at the end, and `count` labels (None)."""
    for places in itertools.combinations(range(len(steps) - 1 + count), count):
        blanks = iter(steps)
        yield [None if place in places else next(blanks) for place in range(len(steps) - 1 + count)] + [steps[-1]]


@check(SEEDS, lengths(TIME) | flags(TIME), strategies.tuples(*[strategies.integers(0, COUNT)] * 2))
def test_losses_equal_enumeration(seed, mask, counts):
    log_probs, labels = random_joint(seed)
    log_probs[0, 1, 0, 0] = -np.inf  # no blank there
    label_mask = np.array(length_mask(np.array(counts), COUNT))
    given = np.where(mask[..., None, None], log_probs, np.nan)
    losses, gradient = program(given, np.where(label_mask, labels, -1), mask, label_mask)
    assert np.isfinite(gradient).all()
    for row, count in enumerate(counts):
        steps = np.flatnonzero(mask[row]).tolist()
        if not steps:
            assert losses[row] == (np.inf if count else 0)
            continue
        scores, used = [], []
        for way in ways(steps, count):
            remaining, labelled, score, uses = list(steps), 0, 0.0, np.zeros((TIME, COUNT + 1, VOCAB))
            for move in way:
                place = (remaining[0], labelled, 0 if move is not None else labels[row, labelled])
                score += log_probs[row][place]
                uses[place] += 1
                if move is None:
                    labelled += 1
                else:
                    remaining.pop(0)
            scores.append(score)
            used.append(uses)
        np.testing.assert_allclose(losses[row], -scipy.special.logsumexp(scores), rtol=1e-11, atol=1e-12)
        if np.isfinite(losses[row]):
            expected = -np.tensordot(scipy.special.softmax(scores), used, axes=1)
            np.testing.assert_allclose(gradient[row], expected, atol=1e-12)
        else:
            assert not gradient[row].any()


def forward(log_probs, labels):
    """Graves 2012, equations 16 to 18, of one row."""
    time, states = log_probs.shape[:2]
    alpha = np.full((time, states), -np.inf)
    alpha[0, 0] = 0
    for t, u in itertools.product(range(time), range(states)):
        if t:
            alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t - 1, u] + log_probs[t - 1, u, 0])
        if u:
            alpha[t, u] = np.logaddexp(alpha[t, u], alpha[t, u - 1] + log_probs[t, u - 1, labels[u - 1]])
    return -(alpha[-1, -1] + log_probs[-1, -1, 0])


@pytest.mark.parametrize("batch", [(), (2, 1)])
@pytest.mark.parametrize(("time", "count"), [(7, 5), (5, 7), (1, 3), (4, 0)])
def test_the_recurrence_of_the_paper(batch, time, count):
    log_probs, labels = random_joint(0, batch, time, count)
    found = transducer.loss(transducer.lattice(log_probs, labels))
    expected = [forward(log_probs[index], labels[index]) for index in np.ndindex(*batch)]
    np.testing.assert_allclose(found, np.reshape(expected, batch), rtol=1e-12)


def test_without_steps():
    log_probs, labels = random_joint(0, time=0)
    assert transducer.loss(transducer.lattice(log_probs, labels)).tolist() == [np.inf, np.inf]
    assert transducer.loss(transducer.lattice(log_probs[:, :, :1], labels[:, :0])).tolist() == [0, 0]
    no_labels = np.zeros((2, COUNT), bool)
    assert transducer.loss(transducer.lattice(log_probs, labels), None, no_labels).tolist() == [0, 0]


def test_ten_thousand_steps_in_float32():
    """With the same probabilities everywhere, -ln of C(T - 1 + U, U) alignments of T blanks and U labels each."""
    time, count = 10_000, 3
    blank, label = np.log(0.9), np.log(0.02)
    lattice = transducer.Lattice(
        jnp.full((time, count + 1), blank, jnp.float32), jnp.full((time, count), label, jnp.float32)
    )
    ways = scipy.special.gammaln(time + count) - scipy.special.gammaln(count + 1) - scipy.special.gammaln(time)
    loss, gradient = jax.jit(jax.value_and_grad(transducer.loss))(lattice)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, -(ways + time * blank + count * label), rtol=1e-5)
    np.testing.assert_allclose(gradient.blank.sum(), -time, rtol=1e-3)
    np.testing.assert_allclose(gradient.label.sum(axis=0), -np.ones(count), rtol=1e-3)


@pytest.mark.slow
def test_derivatives_vmap_and_half_precision():
    log_probs, labels = random_joint(1)
    mask, label_mask = np.array([[1, 1, 1], [1, 0, 1]], bool), np.array([[1, 1], [1, 0]], bool)

    def loss(log_probs, labels=labels, mask=mask, label_mask=label_mask):
        return transducer.loss(transducer.lattice(log_probs, labels), mask, label_mask)

    check_grads(loss, (log_probs,), order=2)
    np.testing.assert_allclose(jax.vmap(loss)(log_probs, labels, mask, label_mask), loss(log_probs), rtol=1e-12)
    half = jnp.asarray(log_probs, jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda log_probs: loss(log_probs).sum())(half)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, loss(half.astype(float)).sum(), rtol=1e-6)


def test_what_stands_in_the_padding_does_not_matter():
    log_probs, labels = random_joint(2)
    mask, label_mask = np.array([[1, 1, 0], [1, 1, 0]], bool), np.array([[1, 0], [1, 0]], bool)
    expected = program(log_probs, labels, mask, label_mask)
    spoilt = np.where(mask[..., None, None], log_probs, np.nan)
    spoilt[:, :, 2] = np.inf
    found = program(spoilt, np.where(label_mask, labels, 99), mask, label_mask)
    np.testing.assert_allclose(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1])
    assert np.isnan(program(log_probs, labels * 99, mask, label_mask)[0]).all()


def test_the_joint_network_step_by_step_gives_the_same():
    generator = np.random.default_rng(3)
    kernel, encoded, predicted = (
        generator.normal(size=shape) for shape in ((5, VOCAB), (2, TIME, 5), (2, COUNT + 1, 5))
    )
    _, labels = random_joint(3)
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)

    def joint(kernel, encoded, predicted):
        return jnp.tanh(encoded + predicted) @ kernel

    def in_steps(kernel, encoded, predicted):
        steps = functools.partial(joint, kernel)
        return transducer.loss(transducer.joint_lattice(steps, encoded, predicted, labels, mask), mask).sum()

    def at_once(kernel, encoded, predicted):
        logits = joint(kernel, encoded[:, :, None], predicted[:, None])
        return transducer.loss(transducer.lattice(jax.nn.log_softmax(logits), labels), mask).sum()

    found, expected = (
        jax.value_and_grad(f, argnums=(0, 1, 2))(kernel, jnp.asarray(encoded), predicted) for f in (in_steps, at_once)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    everything = f"{TIME}x{COUNT + 1}x{VOCAB}x"
    assert everything not in jax.jit(jax.grad(in_steps)).lower(kernel, encoded, predicted).as_text()
    assert everything in jax.jit(jax.grad(at_once)).lower(kernel, encoded, predicted).as_text()


def test_padding_of_the_joint_network_reaches_no_gradient():
    generator = np.random.default_rng(3)
    kernel, encoded, predicted = (
        generator.normal(size=shape) for shape in ((5, VOCAB), (2, TIME, 5), (2, COUNT + 1, 5))
    )
    labels, mask = np.array([[1, 2], [3, 0]]), np.array([[1, 1, 1], [1, 1, 0]], bool)
    label_mask = np.array([[1, 1], [1, 0]], bool)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def run(kernel, encoded, predicted):
        lattice = transducer.joint_lattice(
            lambda encoded, predicted: jnp.tanh(encoded + predicted) @ kernel,
            encoded,
            predicted,
            labels,
            mask,
            label_mask,
        )
        return transducer.loss(lattice, mask, label_mask).sum()

    expected = run(kernel, encoded, predicted)
    encoded[1, 2], predicted[1, 2] = np.nan, np.nan
    jax.tree.map(np.testing.assert_array_equal, run(kernel, encoded, predicted), expected)
    assert not expected[1][1][1, 2].any() and not expected[1][2][1, 2].any() and expected[1][2][1, 1].any()


def test_logits_are_no_log_probabilities():
    """Where they can be looked at: a loss below 0 would be trained for."""
    log_probs, labels = random_joint(0)
    mask, label_mask = np.array([[1, 1, 0], [1, 1, 1]], bool), np.array([[1, 1], [1, 0]], bool)
    with pytest.raises(ValueError, match=r"got 3\.\d+ for blank and label together: give lattice the jax.nn.log_soft"):
        transducer.loss(transducer.lattice(log_probs + 4, labels))
    known = transducer.lattice(log_probs, labels)
    assert jax.jit(lambda: transducer.loss(known))().shape == (2,)
    positions = np.array([[1, 1, 1], [1, 1, 0]], bool)
    padded = np.where(mask[..., None, None] & positions[:, None, :, None], log_probs, 9)
    transducer.loss(transducer.lattice(padded, labels), mask, label_mask)
    half = jnp.full((1, 1, 2, 2), np.log(0.5), jnp.bfloat16)  # rounded up, so together more than 1
    assert half.astype(float)[0, 0, 0, 0] > np.log(0.5)
    transducer.loss(transducer.lattice(half, jnp.array([[1]])))


def test_errors():
    log_probs, labels = random_joint(0)
    lattice = transducer.lattice(log_probs, labels)
    for call, error, message in (
        (lambda: transducer.lattice(log_probs[0, 0], labels), ValueError, "floating log_probs"),
        (lambda: transducer.lattice(log_probs, labels[:, :1]), ValueError, "one more position than labels, 2, got 3"),
        (lambda: transducer.lattice(log_probs, labels, blank=4), ValueError, "blank below the vocab 4"),
        (lambda: transducer.loss(log_probs), TypeError, r"needs a Lattice\(blank, label\)"),
        (lambda: transducer.loss(transducer.Lattice(lattice.blank, lattice.blank)), ValueError, r"label \[\*batch"),
        (lambda: transducer.loss(lattice, np.ones((2, 3))), TypeError, "boolean mask"),
        (lambda: transducer.loss(lattice, [[1] * 3] * 2), TypeError, "boolean mask"),
        (lambda: transducer.joint_lattice(None, log_probs[0], labels, labels), ValueError, "encoded"),
        (
            lambda: transducer.joint_lattice(None, log_probs[:, 0], log_probs[:, 0, :2], labels),
            ValueError,
            r"joint_lattice needs predicted \[\*batch, label \+ 1, features\], 3 positions for 2 labels, got 2",
        ),
        (lambda: jax.jit(lambda b: transducer.lattice(log_probs, labels, blank=b))(0), ValueError, "static blank"),
    ):
        with pytest.raises(error, match=message):
            call()
