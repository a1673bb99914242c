"""Losses of sequences: one value a step, zero off the mask.

Every loss gives `[*batch, time]`, so the reduction is the caller's, in sight: `losses.sum()` is the loss of the
sequences (its gradient is the sum of the steps' gradients), `mean(losses, mask)` that of a step.

Off the mask (`bool[*batch, time]`, True where a step counts) value and gradient are zero whatever stands there, also
NaN, infinities and class numbers out of range. Losses of half-precision arrays are computed and returned in float32:
a sum of many bfloat16 values would keep two digits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Num

from jaxseq.core import errors, masks


def cross_entropy(
    logits: Float[Array, "*batch_time classes"],
    targets: Int[Array, "*batch_time"],
    mask: Bool[Array, "*batch_time"] | None = None,
    *,
    label_smoothing: float | Float[Array, ""] = 0.0,
) -> Float[Array, "*batch_time"]:
    """Cross-entropy in nats of each step's softmax with its class.

    `-Σ_c q_c log softmax(logits)_c` with `q_c = (1 - ε) [c = target] + ε / classes` and ε = `label_smoothing`
    (Szegedy et al., Rethinking the Inception Architecture, 2016, arXiv:1512.00567), a number or a traced scalar.
    A class with the logit `-inf` has probability zero. Unmasked targets outside `[0, classes)` give NaN.

    Raises:
        TypeError: if targets are not integers, logits not floating or the mask not boolean.
        ValueError: if the shapes do not belong together.

    >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    >>> print(cross_entropy(logits, jnp.array([1, 2])).round(3))
    [1.386 0.223]
    """
    logits = _floating("cross_entropy", "logits", logits)
    targets = check_classes("cross_entropy", logits, targets)
    classes = logits.shape[-1]
    targets = jnp.where(targets < 0, classes, targets.astype(int))  # a negative index would count from the end
    logits, targets = _on_mask("cross_entropy", mask, targets.shape, (logits, targets))
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    smoothing = jnp.asarray(label_smoothing, logits.dtype)
    # without smoothing a logit of -inf must not become 0 * inf; the others keep the derivative by the smoothing
    spread = jnp.where((smoothing == 0) & jnp.isneginf(logits), 0, logits)
    uniform = jax.nn.logsumexp(logits, axis=-1) - (spread / classes).sum(axis=-1)  # a sum of large ones could overflow
    return _on_mask("cross_entropy", mask, targets.shape, (1 - smoothing) * hard + smoothing * uniform)


def binary_cross_entropy(
    logits: Float[Array, "*batch_time_outputs"],
    targets: Num[Array, "*batch_time_outputs"] | Bool[Array, "*batch_time_outputs"],
    mask: Bool[Array, "*batch_time"] | None = None,
    *,
    rank: int | None = None,
) -> Float[Array, "*batch_time"]:
    """Cross-entropy in nats of each step's sigmoids with their targets, summed over the step's outputs.

    `-Σ_o y_o log σ(logits_o) + (1 - y_o) log(1 - σ(logits_o))`, the targets y being booleans or numbers in [0, 1].
    An infinite logit is a certain output: no loss where the target is the same, an infinite one elsewhere.
    The outputs of one step have `rank` axes: 1 as cells give them, `[*batch, time, outputs]`, or 0 for one binary
    output, `[*batch, time]` (or `[*batch]`, of a whole sequence). A mask tells it; without one it has to be said.

    Raises:
        TypeError: if logits are not floating or the mask is not boolean.
        ValueError: if the shapes do not belong together, or nothing tells the rank.

    >>> chords = jnp.array([[1, 0, 1], [0, 0, 1]])
    >>> print(binary_cross_entropy(jnp.zeros((2, 3)), chords, rank=1).round(3))  # three times ln 2
    [2.079 2.079]
    >>> binary_cross_entropy(jnp.zeros((2, 3)), chords, rank=0).shape
    (2, 3)
    """
    return _elementwise("binary_cross_entropy", _sigmoid_cross_entropy, logits, targets, mask, rank)


def squared_error(
    predictions: Float[Array, "*batch_time_features"],
    targets: Num[Array, "*batch_time_features"],
    mask: Bool[Array, "*batch_time"] | None = None,
    *,
    rank: int | None = None,
) -> Float[Array, "*batch_time"]:
    """Squared distance of each step's prediction from its target, `Σ_f (prediction_f - target_f)²`.

    One step's prediction has `rank` axes, which the sum runs over: 0 for a number, 1 for a vector, 3 for an image. A
    mask tells it; without one it has to be said.

    Raises:
        TypeError: if predictions are not floating or the mask is not boolean.
        ValueError: if the shapes do not belong together, or nothing tells the rank.

    >>> squared_error(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros((2, 2)), rank=1).tolist()
    [5.0, 25.0]
    """
    return _elementwise("squared_error", optax.squared_error, predictions, targets, mask, rank)


def mean(
    values: Num[Array, "*batch_time"] | Bool[Array, "*batch_time"], mask: Bool[Array, "*batch_time"] | None = None
) -> Float[Array, ""]:
    """The mean of `values` over the steps of the mask, all steps without one; 0 if there are none.

    >>> mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])).item()
    2.0
    """
    values = jnp.asarray(values)
    values = values.astype(_at_least_float32(values.dtype))
    values = _on_mask("mean", mask, values.shape, values)
    count = values.size if mask is None else jnp.sum(mask)
    return values.sum() / jnp.maximum(count, 1).astype(values.dtype)


def check_classes(name: str, logits: Array, targets: Any) -> Int[Array, "*batch_time"]:
    """The targets as an array; raises unless they are integers, one for each row of logits."""
    targets = jnp.asarray(targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(
            f"{name} needs integer targets, one class a step, got {errors.shape_of(targets)}: "
            "for targets of 0 and 1 use binary_cross_entropy, for real ones squared_error."
        )
    if logits.shape[:-1] != targets.shape or logits.ndim == 0:
        raise ValueError(
            f"{name} needs logits [*batch, time, classes] and targets [*batch, time], "
            f"got logits of shape {logits.shape} and targets of shape {targets.shape}."
        )
    return targets


def _sigmoid_cross_entropy(logits, targets):
    def part(weight, logits):  # weight * log(1 + exp(logits)), where 0 * inf is 0
        return weight * jax.nn.softplus(jnp.where((weight == 0) & jnp.isposinf(logits), 0, logits))

    return part(targets, -logits) + part(1 - targets, logits)


def _elementwise(name, loss, predictions, targets, mask, rank):
    predictions, targets = _floating(name, "predictions", predictions), jnp.asarray(targets)
    if rank is None:
        if mask is None:
            raise ValueError(
                f"{name} cannot tell the outputs of one step from steps in predictions of shape {predictions.shape}: "
                "say rank=0 for one number a step, rank=1 for a vector a step, or give a mask."
            )
        rank = predictions.ndim - jnp.ndim(mask)
    if predictions.shape != targets.shape or not 0 <= rank <= predictions.ndim:
        raise ValueError(
            f"{name} needs predictions and targets of one shape [*batch, time] with {rank} more axes (rank={rank}), "
            f"got predictions of shape {predictions.shape} and targets of shape {targets.shape}."
        )
    steps = predictions.shape[: predictions.ndim - rank]
    predictions, targets = _on_mask(name, mask, steps, (predictions, targets.astype(predictions.dtype)))
    losses = loss(predictions, targets).sum(axis=tuple(range(len(steps), predictions.ndim)))
    return _on_mask(name, mask, steps, losses)


def _floating(name, what, values):
    if isinstance(values, tuple):
        raise TypeError(f"{name} needs {what}, got a tuple of {len(values)}: unroll and step return (state, y).")
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name} needs floating {what}, got {errors.shape_of(values)}.")
    return values.astype(_at_least_float32(values.dtype))


def _at_least_float32(dtype):
    with jax.numpy_dtype_promotion("standard"):  # a choice of ours, whatever the caller lets promote by itself
        return jnp.promote_types(dtype, jnp.float32)


def _on_mask(name, mask, steps, values):
    if mask is None:
        return values
    errors.check_flags(name, mask, "mask", steps)
    return masks.zero_unless(jnp.asarray(mask), values)
