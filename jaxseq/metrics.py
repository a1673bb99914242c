"""Metrics of sequences: one number over all unmasked steps, whatever the batch.

They average over steps, not over sequences, so a padded batch and its sequences one by one (weighted by their lengths)
give the same. To pool batches, average `losses` first and convert last.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxseq.losses import check_classes, mean


def perplexity(losses: Float[Array, "*batch_time"], mask: Bool[Array, "*batch_time"] | None = None) -> Float[Array, ""]:
    """`exp` of the mean loss a step, for losses in nats such as `losses.cross_entropy` gives; 1 if no step counts.

    Give the mask here too: losses off the mask are zero, and without it they would count as perfect predictions.

    >>> print(perplexity(jnp.log(jnp.array([2.0, 8.0]))).round(3))
    4.0
    """
    return jnp.exp(mean(losses, mask))


def bits_per_symbol(
    losses: Float[Array, "*batch_time"], mask: Bool[Array, "*batch_time"] | None = None
) -> Float[Array, ""]:
    """The mean loss a step in bits, for losses in nats; 0 if no step counts. With characters, bits per character.

    >>> print(bits_per_symbol(jnp.log(jnp.array([2.0, 8.0, 1.0])), jnp.array([True, True, False])).round(3))
    2.0
    """
    return mean(losses, mask) / math.log(2)


def accuracy(
    logits: Float[Array, "*batch_time classes"],
    targets: Int[Array, "*batch_time"],
    mask: Bool[Array, "*batch_time"] | None = None,
) -> Float[Array, ""]:
    """The share of steps whose largest logit is the target's; 0 if no step counts. Of equal logits the first counts.

    Raises:
        TypeError: if targets are not integers or the mask is not boolean.
        ValueError: if the shapes do not belong together.

    >>> logits = jnp.array([[0.1, 0.9], [0.7, 0.3], [0.2, 0.8]])
    >>> accuracy(logits, jnp.array([1, 1, 0]), jnp.array([True, True, False])).item()
    0.5
    """
    logits = jnp.asarray(logits)
    targets = check_classes("accuracy", logits, targets)
    return mean(logits.argmax(axis=-1) == targets.astype(int), mask)
