"""The spectral radius of a matrix, on any device and under any transformation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxseq.core.precision import widen

_SQUARINGS = 30


def spectral_radius(matrix: Float[Array, "*batch units units"]) -> Float[Array, "*batch"]:
    """The largest magnitude of an eigenvalue, to about 7 digits.

    It is the limit of |A^k|^(1/k) (Gelfand's formula), here at k = 2^30, by repeated squaring: also where the largest
    eigenvalues are a complex pair, or several of one magnitude, over which a power iteration does not settle.

    Raises:
        ValueError: if the last two axes are not of one size.

    >>> print(spectral_radius(jnp.array([[0.0, 2.0], [-2.0, 0.0]])).round(4))  # eigenvalues 2i and -2i
    2.0
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"spectral_radius needs square matrices [*batch, units, units], got {matrix.shape}.")

    def normalize(power):
        norm = jnp.linalg.norm(power, axis=(-2, -1), keepdims=True)
        return power / jnp.where(norm > 0, norm, 1), jnp.log(norm[..., 0, 0])

    def square(carry, exponent):  # of the norm that a squaring adds
        power, logarithm = carry
        power, more = normalize(jnp.matmul(power, power, precision=lax.Precision.HIGHEST))
        return (power, logarithm + exponent * more), None

    wide = widen(matrix)
    exponents = 0.5 ** jnp.arange(1, _SQUARINGS + 1, dtype=wide.dtype)
    (_, logarithm), _ = lax.scan(square, normalize(wide), exponents)
    return jnp.exp(logarithm).astype(matrix.dtype)
