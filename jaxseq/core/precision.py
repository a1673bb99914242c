"""Where a dtype is too narrow to compute in."""

import jax.numpy as jnp
from jaxtyping import Array


def widen(x: Array) -> Array:
    """`x` in float32 at least: a decay of 0.999 is 1 in bfloat16."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
