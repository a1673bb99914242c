"""What filters and choices check of logits, and how they read numbers that may differ by row."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxseq.core import errors


def check_logits(name: str, logits: Any) -> jax.Array:
    """Logits as an array; raises unless they are floating and have an axis."""
    logits = jnp.asarray(logits)
    if logits.ndim == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{name} needs floating logits [*batch, vocab], got {errors.shape_of(logits)}.")
    return logits


def per_row(name: str, what: str, value: Any, logits: jax.Array) -> jax.Array:
    """`value` as `[*batch, 1]`, beside the logits."""
    rows = logits.shape[:-1]
    try:
        return jnp.broadcast_to(value, rows)[..., None]
    except ValueError:
        raise ValueError(
            f"{name} needs one {what} for all rows or one that broadcasts to [*batch] = {rows}, the batch axes of its "
            f"logits, got {what} of shape {jnp.shape(value)}."
        ) from None


def wide(logits: jax.Array) -> jax.Array:
    """Logits of float32 or wider."""
    # bfloat16 noise and sums are too coarse: a tail of improbable tokens would be lost; float16 has no small numbers
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
