"""Where a dtype is too narrow to compute in."""

import jax.numpy as jnp
from jaxtyping import Array


def at_least_float32(x: Array) -> Array:
    """`x` in float32, or in its own dtype if that is no narrower."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
