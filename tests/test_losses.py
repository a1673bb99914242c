"""Losses: against torch and by hand; nothing off the mask reaches value or gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxseq import losses
from tests.peers import peer

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 5)).astype(np.float32)
CLASSES = RNG.integers(0, 5, size=(2, 3))
BITS = RNG.integers(0, 2, size=(2, 3, 5))
REALS = RNG.normal(size=(2, 3, 5)).astype(np.float32)
WEIGHTS = RNG.normal(size=(2, 3)).astype(np.float32)
MASK = np.array([[True, False, True], [False, True, False]])

LOSSES = {
    "cross_entropy": (losses.cross_entropy, CLASSES),
    "smoothed": (lambda *args: losses.cross_entropy(*args, label_smoothing=0.1), CLASSES),
    "binary_cross_entropy": (functools.partial(losses.binary_cross_entropy, rank=1), BITS),
    "squared_error": (functools.partial(losses.squared_error, rank=1), REALS),
}
every_loss = pytest.mark.parametrize("loss, targets", LOSSES.values(), ids=LOSSES)


def close(ours, theirs, tolerance=1e-6):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def torch_loss(name, targets, logits):
    torch = peer("torch")
    functional = torch.nn.functional
    targets = torch.tensor(targets)
    if name == "binary_cross_entropy":
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").sum(-1)
    if name == "squared_error":
        return functional.mse_loss(logits, targets, reduction="none").sum(-1)
    smoothing = 0.1 if name == "smoothed" else 0.0
    return functional.cross_entropy(logits.mT, targets, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_torch(name):
    torch = peer("torch")
    loss, targets = LOSSES[name]
    logits = torch.tensor(LOGITS, requires_grad=True)
    theirs = torch_loss(name, targets, logits)
    (theirs * torch.tensor(WEIGHTS)).sum().backward()
    ours, pullback = jax.vjp(lambda logits: loss(logits, jnp.asarray(targets)), jnp.asarray(LOGITS))
    close(ours, theirs.detach())
    close(pullback(jnp.asarray(WEIGHTS))[0], logits.grad)


@every_loss
def test_gradient_of_the_sum_is_the_sum_of_the_steps_gradients(loss, targets):
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(targets)
    whole = jax.grad(lambda logits: loss(logits, targets).sum())(logits)
    steps = [jax.grad(lambda logits, t=t: loss(logits, targets)[:, t].sum())(logits) for t in range(3)]
    close(whole, sum(steps))
    for t, step in enumerate(steps):  # and each step's gradient stays at its step
        assert not np.delete(np.asarray(step), t, axis=1).any()


@every_loss
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_nothing_passes_off_the_mask(loss, targets, garbage):
    clean = jnp.asarray(LOGITS)
    dirty = jnp.where(MASK[..., None], clean, garbage)
    bad = garbage if np.issubdtype(targets.dtype, np.floating) else 2**31 - 1
    dirty_targets = np.where(MASK[..., None] if targets.ndim == 3 else MASK, targets, bad).astype(targets.dtype)

    def masked(logits):
        return loss(logits, jnp.asarray(dirty_targets), jnp.asarray(MASK))

    values, pullback = jax.vjp(masked, dirty)
    expected, expected_pullback = jax.vjp(lambda logits: loss(logits, jnp.asarray(targets)), clean)
    np.testing.assert_array_equal(values, np.where(MASK, expected, 0))
    (gradient,) = pullback(jnp.ones_like(values))
    (expected_gradient,) = expected_pullback(jnp.ones_like(values))
    np.testing.assert_array_equal(gradient, np.where(MASK[..., None], expected_gradient, 0))


@every_loss
def test_gradients_numerically(loss, targets):
    with jax.enable_x64(True):
        logits = jnp.asarray(LOGITS, jnp.float64)
        values = loss(logits, jnp.asarray(targets), jnp.asarray(MASK))
        assert values.dtype == jnp.float64
        check_grads(lambda logits: loss(logits, jnp.asarray(targets), jnp.asarray(MASK)), (logits,), order=2)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(loss, targets, dtype):
    logits = jnp.asarray(LOGITS, dtype)
    targets = jnp.asarray(targets)
    values, pullback = jax.vjp(lambda logits: loss(logits, targets), logits)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, loss(logits.astype(jnp.float32), targets))
    assert pullback(jnp.ones_like(values))[0].dtype == dtype


@every_loss
@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 2)])
def test_any_batch_axes(loss, targets, shape):
    logits, targets = jnp.asarray(LOGITS[0]), jnp.asarray(targets[0])
    batch = [jnp.broadcast_to(part, (*shape, *part.shape)) for part in (logits, targets)]
    close(loss(*batch), jnp.broadcast_to(loss(logits, targets), (*shape, 3)))


@every_loss
def test_no_steps(loss, targets):
    assert loss(jnp.asarray(LOGITS[:, :0]), jnp.asarray(targets[:, :0])).shape == (2, 0)


def test_forbidden_classes():
    logits = jnp.array([1.0, 2.0, -jnp.inf])
    allowed = losses.cross_entropy(logits, jnp.array(0))
    close(allowed, losses.cross_entropy(logits[:2], jnp.array(0)))
    gradient = jax.grad(lambda logits: losses.cross_entropy(logits, jnp.array(0)))(logits)
    close(gradient, jnp.append(jax.nn.softmax(logits[:2]) - jnp.array([1.0, 0.0]), 0.0))
    assert losses.cross_entropy(logits, jnp.array(2)) == jnp.inf


def test_traced_smoothing():
    smoothed = jax.jit(lambda amount: losses.cross_entropy(jnp.asarray(LOGITS), CLASSES, label_smoothing=amount))
    for amount in (0.0, 0.1, 1.0):
        close(smoothed(amount), losses.cross_entropy(jnp.asarray(LOGITS), CLASSES, label_smoothing=amount))
    forbidden = jnp.array([1.0, 2.0, -jnp.inf])
    unsmoothed = jax.jit(lambda amount: losses.cross_entropy(forbidden, jnp.array(0), label_smoothing=amount))
    close(unsmoothed(0.0), losses.cross_entropy(forbidden, jnp.array(0)))


def test_derivative_by_the_smoothing():
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(CLASSES)
    log_softmax = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    by_hand = np.take_along_axis(log_softmax, CLASSES[..., None], -1)[..., 0] - log_softmax.mean(-1)
    for amount in (0.0, 0.3):
        close(jax.jacobian(lambda a: losses.cross_entropy(logits, targets, label_smoothing=a))(amount), by_hand, 1e-5)


def test_large_logits_without_smoothing():
    logits = jnp.full(5, 1e38).at[1].set(0.0)  # their sum is infinite in float32
    close(losses.cross_entropy(logits, jnp.array(1)), 1e38)


@pytest.mark.parametrize(
    "logit, target, expected, slope",
    [
        (np.inf, 1, 0, 0),
        (-np.inf, 0, 0, 0),
        (np.inf, 0, np.inf, 1),
        (-np.inf, 1, np.inf, -1),
        (np.inf, 0.5, np.inf, 0.5),
    ],
)
def test_certain_bits(logit, target, expected, slope):
    loss = functools.partial(losses.binary_cross_entropy, rank=0)
    value, gradient = jax.value_and_grad(loss)(jnp.float32(logit), jnp.float32(target))
    assert value == expected and gradient == slope


def test_binary_derivative_by_the_target():
    for target in (0.0, 0.3, 1.0):
        gradient = jax.grad(functools.partial(losses.binary_cross_entropy, rank=0), argnums=1)(1.5, target)
        close(gradient, -1.5)


@every_loss
def test_under_strict_promotion(loss, targets):
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(targets)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = targets.astype(jnp.uint8)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = loss(logits, targets, jnp.asarray(MASK))
        half = loss(logits.astype(jnp.bfloat16), targets)
        assert losses.mean(jnp.asarray(MASK)).dtype == half.dtype == jnp.float32
    np.testing.assert_array_equal(strict, loss(logits, targets, jnp.asarray(MASK)))


@pytest.mark.parametrize("target", [-1, 5, 300])
def test_targets_out_of_range_show(target):
    assert np.isnan(losses.cross_entropy(jnp.asarray(LOGITS[0]), jnp.full(3, target))).all()


def test_byte_targets():
    logits = jnp.zeros((1, 300)).at[0, 7].set(5.0)
    bytes_ = losses.cross_entropy(logits, jnp.array([7], jnp.uint8))
    close(bytes_, losses.cross_entropy(logits, jnp.array([7])))


def test_binary_targets_may_be_booleans_or_probabilities():
    logits = jnp.array([[0.5, -2.0]])
    by_hand = -np.log(1 / (1 + np.exp(-0.5))) - np.log(1 - 1 / (1 + np.exp(2.0)))
    close(losses.binary_cross_entropy(logits, jnp.array([[True, False]]), rank=1), np.array([by_hand]))
    half = losses.binary_cross_entropy(logits, jnp.full((1, 2), 0.5), rank=1)
    ones, zeros = (losses.binary_cross_entropy(logits, jnp.full((1, 2), bit), rank=1) for bit in (1, 0))
    close(half, (ones + zeros) / 2)


@pytest.mark.parametrize("loss", [losses.binary_cross_entropy, losses.squared_error])
def test_rank_says_which_axes_belong_to_a_step(loss):
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(BITS)
    scalars = loss(logits, targets, rank=0)
    assert scalars.shape == (2, 3, 5)
    close(loss(logits, targets, rank=1), scalars.sum(-1))
    close(loss(logits, targets, jnp.ones((2, 3), bool)), scalars.sum(-1))  # the mask tells
    close(loss(logits, targets, jnp.ones((2, 3, 5), bool)), scalars)
    close(loss(logits, targets, jnp.array([True, False]), rank=2), [scalars[0].sum(), 0.0])
    close(loss(logits[..., 0], targets[..., 0], jnp.asarray(MASK), rank=0), np.where(MASK, scalars[..., 0], 0))


def test_mean():
    values = jnp.asarray(WEIGHTS)
    close(losses.mean(values), WEIGHTS.mean())
    close(losses.mean(values, jnp.asarray(MASK)), WEIGHTS[MASK].mean())
    gradient = jax.grad(losses.mean)(values, jnp.zeros((2, 3), bool))
    assert losses.mean(values, jnp.zeros((2, 3), bool)) == 0 and not gradient.any()
    assert losses.mean(jnp.zeros((2, 0))) == 0
    assert losses.mean(jnp.ones(1000, jnp.bfloat16)).dtype == jnp.float32


def test_mean_of_masked_losses_is_that_of_the_steps_alone():
    logits, mask = jnp.asarray(LOGITS), jnp.asarray(MASK)
    masked = losses.mean(losses.cross_entropy(logits, CLASSES, mask), mask)
    close(masked, losses.cross_entropy(logits[MASK], CLASSES[MASK]).mean())


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: losses.cross_entropy(jnp.ones((2, 5)), jnp.ones(2)), TypeError, r"integer targets.*float32\[2\]"),
        (lambda: losses.cross_entropy(jnp.ones((2, 5), int), jnp.ones(2, int)), TypeError, "floating logits.*int32"),
        (lambda: losses.cross_entropy(jnp.ones((2, 5)), jnp.ones((2, 5), int)), ValueError, r"\(2, 5\) and .*\(2, 5\)"),
        (lambda: losses.cross_entropy(jnp.ones((2, 3, 5)), jnp.ones(6, int)), ValueError, r"\(2, 3, 5\).*\(6,\)"),
        (lambda: losses.cross_entropy(jnp.ones(()), jnp.ones((), int)), ValueError, r"logits of shape \(\)"),
        (
            lambda: losses.cross_entropy(jnp.ones((2, 5)), jnp.ones(2, int), jnp.ones(2)),
            TypeError,
            "cross_entropy needs a boolean mask, got float32",
        ),
        (
            lambda: losses.cross_entropy(jnp.ones((2, 5)), jnp.ones(2, int), jnp.ones((2, 5), bool)),
            ValueError,
            r"mask of shape \(2, 5\).*\(2,\)",
        ),
        (
            lambda: losses.binary_cross_entropy(jnp.ones((2, 3)), jnp.ones(2), rank=1),
            ValueError,
            r"\(2, 3\) and .*\(2,\)",
        ),
        (lambda: losses.squared_error(jnp.ones(()), jnp.ones(()), rank=1), ValueError, "rank=1"),
        (lambda: losses.squared_error(jnp.ones(4), jnp.ones(4)), ValueError, "say rank=0 for one number a step"),
        (lambda: losses.cross_entropy(((), jnp.ones((2, 5))), jnp.ones(2, int)), TypeError, r"return \(state, y\)"),
        (lambda: losses.squared_error(jnp.ones(3, int), jnp.ones(3)), TypeError, "floating predictions, got int32"),
        (
            lambda: losses.squared_error(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(3, bool)),
            ValueError,
            r"mask of shape \(3,\).*\(2,\)",
        ),
        (lambda: losses.mean(jnp.ones(3), jnp.ones(2, bool)), ValueError, r"\(2,\).*\(3,\)"),
    ],
)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()
