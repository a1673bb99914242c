"""CTC equals the enumeration of all alignments, optax and torch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from hypothesis import strategies
from jax.test_util import check_grads

from jaxseq import length_mask
from jaxseq.structured import ctc
from tests.peers import peer
from tests.structured.paths import check, flags, lengths

pytestmark = pytest.mark.usefixtures("float64")
SEEDS = strategies.integers(0, 2**31)
TIME, VOCAB = 4, 3


def collapsed(alignment, blank):
    """The labels of an alignment: repeats merged, blanks dropped."""
    return tuple(label for label, _ in itertools.groupby(alignment) if label != blank)


def enumerated(logits, steps, labels, blank):
    """Every alignment of the labels with the steps of one row, and its log-probability."""
    log_probs = scipy.special.log_softmax(logits, axis=-1)
    for alignment in itertools.product(range(logits.shape[-1]), repeat=len(steps)):
        if collapsed(alignment, blank) == tuple(labels):
            yield alignment, log_probs[steps, list(alignment)].sum()


@functools.partial(jax.jit, static_argnames="blank")
def program(logits, labels, mask, label_mask, blank):
    def total(logits):
        losses = ctc.loss(logits, labels, mask, label_mask, blank=blank)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(logits)
    found = ctc.align(logits, labels, mask, label_mask, blank=blank)
    possible = ctc.feasible(logits, labels, mask, label_mask, blank=blank)
    return losses, gradient, found, possible, ctc.greedy(logits, mask, blank=blank)


@pytest.mark.parametrize("blank", [0, 2])
def test_everything_equals_enumeration(blank):
    @check(SEEDS, lengths(TIME) | flags(TIME), lengths(3) | flags(3))
    def examples(seed, mask, label_mask):
        generator = np.random.default_rng(seed)
        logits = generator.normal(size=(2, TIME, VOCAB))
        labels = (generator.integers(VOCAB - 1, size=(2, 3)) + blank + 1) % VOCAB
        given = np.where(mask[..., None], logits, np.nan), np.where(label_mask, labels, -7)
        found = jax.tree.map(np.asarray, program(*given, mask, label_mask, blank))
        losses, gradient, alignment, possible, decoded = found
        for row in range(2):
            steps, real = np.flatnonzero(mask[row]), np.flatnonzero(label_mask[row])
            paths = list(enumerated(logits[row], steps, labels[row, real], blank))
            assert possible[row] == bool(paths)
            if paths:
                scores = np.array([score for _, score in paths])
                np.testing.assert_allclose(losses[row], -scipy.special.logsumexp(scores), rtol=1e-11, atol=1e-12)
                posterior = np.zeros((TIME, VOCAB))
                for (path, _), weight in zip(paths, scipy.special.softmax(scores), strict=True):
                    posterior[steps, path] += weight
                expected = np.where(mask[row][:, None], scipy.special.softmax(logits[row], axis=-1) - posterior, 0)
                np.testing.assert_allclose(gradient[row], expected, atol=1e-12)
                best = max(paths, key=lambda path: path[1])
                np.testing.assert_allclose(alignment.score[row], best[1], rtol=1e-11, atol=1e-12)
                assert alignment.labels[row, steps].tolist() == list(best[0])
                spans_agree(best[0], steps, real, alignment, row, blank)
            else:
                assert losses[row] == np.inf and alignment.score[row] == -np.inf and not gradient[row].any()
            path = logits[row, steps].argmax(axis=-1).tolist()
            expected = collapsed(path, blank)
            assert decoded.tokens[row].tolist() == [*expected, *[blank] * (TIME - len(expected))]
            assert decoded.lengths[row] == len(expected)
            score = scipy.special.log_softmax(logits[row], axis=-1)[steps].max(axis=-1).sum()
            np.testing.assert_allclose(decoded.score[row], score, rtol=1e-12)

    examples()


def spans_agree(best, steps, real, alignment, row, blank):
    """The runs of equal labels in the best alignment are the spans."""
    spans, positions = np.zeros((3, 2), int), np.full(TIME, -1)
    runs = [list(run) for label, run in itertools.groupby(zip(best, steps, strict=True), lambda item: item[0])]
    for which, run in zip(real, (run for run in runs if run[0][0] != blank), strict=True):
        spans[which] = run[0][1], run[-1][1] + 1
        positions[[step for _, step in run]] = which
    assert alignment.spans[row].tolist() == spans.tolist()
    assert alignment.positions[row].tolist() == positions.tolist()


def sized(seed=0):
    """Feasible rows of several lengths."""
    generator = np.random.default_rng(seed)
    logits, labels = generator.normal(size=(4, 20, 6), scale=3), generator.integers(1, 6, size=(4, 5))
    return logits, labels, length_mask(np.array([20, 12, 15, 1]), 20), length_mask(np.array([5, 5, 0, 1]), 5)


def test_optax_gives_the_same():
    logits, labels, mask, label_mask = sized()

    def theirs(logits):
        return optax.ctc_loss(logits, 1.0 - mask, labels, 1.0 - label_mask)

    def ours(logits):
        return ctc.loss(logits, labels, mask, label_mask)

    np.testing.assert_allclose(ours(logits), jax.jit(theirs)(logits), rtol=1e-9)
    for found, expected in zip(
        *(jax.jit(jax.grad(lambda x, f=f: f(x).sum()))(logits) for f in (ours, theirs)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_torch_gives_the_same():
    torch = peer("torch")
    logits, labels, mask, label_mask = sized(1)
    blank, labels = 5, labels - 1
    given = torch.tensor(logits, requires_grad=True)
    lengths = [torch.tensor(np.asarray(flags.sum(axis=-1))) for flags in (mask, label_mask)]
    log_probs = torch.log_softmax(given, dim=-1).transpose(0, 1)
    ours = ctc.loss(logits, labels, mask, label_mask, blank=blank)
    theirs = torch.nn.CTCLoss(blank=blank, reduction="none")(log_probs, torch.tensor(labels), *lengths)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-10)
    theirs.sum().backward()
    found = jax.grad(lambda x: ctc.loss(x, labels, mask, label_mask, blank=blank).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(found, given.grad, atol=1e-10)


@pytest.mark.slow
def test_derivatives_batches_and_dtypes():
    logits, labels, mask, label_mask = sized(2)
    logits, mask, labels, label_mask = logits[:2, :6], mask[:2, :6], labels[:2, :2], label_mask[:2, :2]
    loss = functools.partial(ctc.loss, labels=labels, mask=mask, label_mask=label_mask)
    check_grads(loss, (logits,), order=2)
    one_by_one = jax.vmap(ctc.loss)(logits, labels, mask, label_mask)
    np.testing.assert_allclose(one_by_one, loss(logits), rtol=1e-12)
    np.testing.assert_allclose(ctc.loss(logits[None], labels[None], mask[None]), loss(logits)[None], rtol=1e-12)
    half = jnp.asarray(logits, jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda logits: loss(logits).sum())(half)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, loss(half.astype(float)).sum(), rtol=1e-6)


def test_second_derivatives_equal_those_of_the_enumeration():
    """Of a row that fits, one that does not, one that needs a class of the logit -inf, and one without steps."""
    logits = np.random.default_rng(4).normal(size=(4, 3, VOCAB))
    logits[2, :, 2] = -np.inf
    labels, mask = np.array([[1, 2], [1, 1], [2, 1], [1, 2]]), np.arange(3) < np.array([3, 2, 3, 0])[:, None]
    paths = [path for path in itertools.product(range(VOCAB), repeat=3) if collapsed(path, 0) == (1, 2)]

    def of_enumeration(logits):
        log_probs = jax.nn.log_softmax(logits)
        return -jax.nn.logsumexp(jnp.stack([sum(log_probs[t, z] for t, z in enumerate(path)) for path in paths]))

    found = jax.jit(jax.vmap(jax.hessian(ctc.loss)))(logits, labels, mask)
    np.testing.assert_allclose(found[0], jax.jit(jax.hessian(of_enumeration))(logits[0]), atol=1e-12)
    assert found[0].any() and not found[1:].any()


def test_impossible_classes():
    """A logit of -inf is a class of probability 0; a row that needs it has no alignment."""
    logits = np.zeros((2, 3, 3))
    logits[..., 2] = -np.inf
    losses, gradient = ctc.loss(logits, np.array([[1, 0], [2, 0]]), None, np.array([[1, 0], [1, 0]], bool)), None
    np.testing.assert_allclose(losses, [np.log(8 / 6), np.inf])  # of eight paths of 0 and 1, 101 and 000 are not 1
    gradient = jax.grad(lambda logits: ctc.loss(logits, np.array([[1], [2]])).sum())(logits)
    assert np.isfinite(gradient).all() and not gradient[1].any()


def test_a_step_without_a_possible_class():
    """All logits are -inf: no alignment, and no gradient; off the mask it is no step."""
    logits = np.zeros((2, 3, 3))
    logits[:, 1] = -np.inf
    mask = np.array([[True, True, True], [True, False, True]])
    losses, gradient, alignment, possible, decoded = program(logits, np.array([[1], [1]]), mask, None, 0)
    np.testing.assert_allclose(losses, [np.inf, np.log(3)])
    assert np.isfinite(gradient).all() and not gradient[0].any() and gradient[1].any()
    assert alignment.score[0] == decoded.score[0] == -np.inf and possible.all()


@pytest.mark.parametrize("batch", [(), (2, 1)])
def test_without_labels_or_steps(batch):
    logits = np.random.default_rng(0).normal(size=(*batch, 3, 4))
    none, one = np.zeros((*batch, 0), int), np.ones((*batch, 1), int)
    blanks = -scipy.special.log_softmax(logits, axis=-1)[..., 0].sum(axis=-1)
    np.testing.assert_allclose(ctc.loss(logits, none), blanks, rtol=1e-12)
    nothing = logits[..., :0, :]
    assert ctc.loss(nothing, none).tolist() == np.zeros(batch).tolist()
    assert ctc.loss(nothing, one).tolist() == np.full(batch, np.inf).tolist()
    found = ctc.align(nothing, none)
    assert found.labels.shape == (*batch, 0) and found.score.tolist() == np.zeros(batch).tolist()
    assert ctc.align(nothing, one).score.tolist() == np.full(batch, -np.inf).tolist()
    assert ctc.greedy(nothing).lengths.tolist() == np.zeros(batch, int).tolist()


def test_ten_thousand_steps_in_float32():
    """Log-probabilities down to -50 a step; float64 is the reference."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(10_000, 5), scale=15), generator.integers(1, 5, size=40)
    run = jax.jit(jax.value_and_grad(ctc.loss))
    (exact, wide), (found, narrow) = run(logits, labels), run(logits.astype(np.float32), labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_allclose(narrow, wide, atol=2e-3)


def test_an_alignment_of_ten_thousand_steps_in_float32():
    """Runs of labels with blanks between them, in which every step is told by its logits."""
    generator = np.random.default_rng(5)
    labels = generator.integers(1, 5, size=40)
    bounds = np.sort(generator.choice(np.arange(1, 10_000), size=80, replace=False))
    state = np.searchsorted(bounds, np.arange(10_000), side="right")
    path = np.where(state % 2 == 1, labels[np.minimum(state // 2, 39)], 0)
    logits = generator.normal(size=(10_000, 5)) + 12 * np.eye(5)[path]
    found = ctc.align(logits.astype(np.float32), labels)
    np.testing.assert_array_equal(found.labels, path)
    np.testing.assert_array_equal(found.spans, bounds.reshape(40, 2))
    score = scipy.special.log_softmax(logits, axis=-1)[np.arange(10_000), path].sum()
    np.testing.assert_allclose(found.score, score, rtol=1e-3)


def test_what_is_no_label_gives_nan():
    """Where labels are traced; concrete ones raise."""
    logits, labels = np.zeros((4, 3, 3)), np.array([[1], [0], [3], [-1]])
    losses, gradient, alignment, possible, _ = program(logits, labels, None, None, 0)
    assert np.isnan(losses).tolist() == np.isnan(alignment.score).tolist() == [False, True, True, True]
    assert possible.tolist() == [True, False, False, False]
    assert np.isfinite(gradient).all()
    for call in (ctc.loss, ctc.align, ctc.feasible):
        with pytest.raises(ValueError, match=r"label 0, which is the blank; if it pads.*length_mask\(lengths, 1\)"):
            call(logits, labels)
        with pytest.raises(ValueError, match="label 3, which is none of the vocab 3"):
            call(logits[2:], labels[2:])
        call(logits, labels, None, labels == 1)


def test_errors():
    logits, labels = np.zeros((2, 4, 3)), np.ones((2, 2), int)
    for call, error, message in (
        (lambda: ctc.loss(logits[0, 0], labels), ValueError, r"floating logits \[\*batch, time, vocab\]"),
        (lambda: ctc.loss(logits, labels[:1]), ValueError, r"integer labels \[\*batch, label\]"),
        (lambda: ctc.loss(logits, labels * 1.0), ValueError, "integer labels"),
        (lambda: ctc.loss(logits, labels, blank=3), ValueError, "blank below the vocab 3, got 3"),
        (lambda: ctc.align(logits, labels, np.ones((2, 4))), TypeError, "boolean mask"),
        (lambda: ctc.feasible(logits, labels, None, np.ones((2, 3), bool)), ValueError, "label_mask of shape"),
        (lambda: ctc.loss(logits, labels, [[1] * 4] * 2), TypeError, "boolean mask"),
        (lambda: ctc.loss(logits, labels, None, [[1] * 2] * 2), TypeError, "boolean label_mask"),
        (lambda: ctc.greedy(logits, blank=-1), ValueError, "static blank"),
        (lambda: jax.jit(lambda b: ctc.loss(logits, labels, blank=b))(0), ValueError, "static blank"),
        (lambda: ctc.loss(logits, labels, blank=True), ValueError, "static blank"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_lists_and_numbers_of_numpy():
    logits, labels = np.random.default_rng(0).normal(size=(1, 3, 3)), np.array([[1, 2]])
    expected = ctc.loss(logits, labels, np.array([[True, False, True]]), np.array([[True, False]]), blank=0)
    found = ctc.loss(logits, [[1, 2]], [[True, False, True]], [[True, False]], blank=np.int64(0))
    np.testing.assert_array_equal(found, expected)
    assert ctc.greedy(logits, blank=np.int32(2)).tokens.shape == (1, 3)
