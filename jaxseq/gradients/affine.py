"""Linear recurrences of vectors, all steps at once."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxseq.core.linear_scan import linear_scan


def affine_scan(a: Array, b: Float[Array, "time *batch units"], *, transposed: bool = False) -> Array:
    """All d_t = A_t d_(t-1) + b_t from 0 in parallel, or of the transposed recurrence d_t = A_(t+1)ᵀ d_(t+1) + b_t.

    `a` holds matrices `[time, *batch, units, units]`, or their diagonals, of the shape of `b`.

    >>> affine_scan(jnp.full((3, 1), 2.0), jnp.ones((3, 1)))[:, 0].tolist()
    [1.0, 3.0, 7.0]
    """
    dense = a.ndim > b.ndim
    if transposed:
        a = jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])
    if not dense:
        return linear_scan(a, b, reverse=transposed)[1]

    def combine(first, second):
        (a, b), (next_a, next_b) = first, second
        return next_a @ a, jnp.einsum("...ij,...j->...i", next_a, b) + next_b

    a = jnp.swapaxes(a, -1, -2) if transposed else a
    return lax.associative_scan(combine, (a, b), reverse=transposed)[1]
