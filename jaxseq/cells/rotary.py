"""Positions as rotations of queries and keys."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxseq.core.precision import widen


def rotary(
    x: Float[Array, "*batch head feature"], position: Int[Array, "*batch"], base: float = 10_000.0
) -> Float[Array, "*batch head feature"]:
    """Turns the features of queries or keys by their position, so that products of two tell their distance alone.

    Features i and i + n/2, of n, are the parts of a complex number that is turned by position * base^(-2i/n). The
    positions are integers of -2³¹ to 2³¹ - 1, and their angles as exact at the last as at the first.

    J. Su et al., RoFormer: enhanced Transformer with rotary position embedding, arXiv:2104.09864, 2021.

    >>> rotary(jnp.array([[1.0, 0.0]]), jnp.array(0)).tolist()
    [[1.0, 0.0]]
    """
    half = x.shape[-1] // 2
    wide = widen(x)
    angles = _angles(position[..., None, None], base ** (-np.arange(half) / half), wide.dtype)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    real, imaginary = jnp.split(wide, 2, axis=-1)
    turned = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _angles(position: Int[Array, "*batch 1 1"], rates: np.ndarray, dtype: Any) -> Float[Array, "*batch 1 rate"]:
    """`position * rates` up to whole turns.

    float32 cannot hold a large product. So each byte of the position is multiplied by what 1, 2⁸, 2¹⁶ or 2²⁴ steps
    turn, in units of 2⁻³² turns: integers that overflow drop whole turns.
    """

    def along(rates):
        return jnp.expand_dims(rates, range(position.ndim - 1))

    if dtype == jnp.float64:
        return position.astype(dtype) * along(rates)
    position = position.astype(jnp.int32)
    turns: Any = 0
    for shift in (0, 8, 16, 24):
        byte = position >> shift if shift == 24 else (position >> shift) & 255  # the highest has the sign
        units = np.round(rates / (2 * np.pi) * 2**shift % 1 * 2**32).astype(np.uint64) % 2**32
        turns = turns + byte.astype(jnp.uint32) * along(units.astype(np.uint32))
    return turns.astype(jnp.int32).astype(dtype) * (2 * np.pi / 2**32)
