"""The spectral radius of a matrix, on any device and under any transformation."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Complex, Float

from jaxseq.core import errors
from jaxseq.core.precision import widen
from jaxseq.core.sharding import leading_spec, placed

_SQUARINGS = 30


def spectral_radius(matrix: Float[Array, "*batch units units"]) -> Float[Array, "*batch"]:
    """The largest magnitude of an eigenvalue.

    It is found among all eigenvalues. JAX has them for CPUs and GPUs alone; on others it is the limit of |A^k|^(1/k)
    (Gelfand's formula), here at k = 2^30 by repeated squaring, to about 6 digits, and too small for matrices far from
    normal, such as a long delay line.

    Derivatives of every order are those of the magnitude of one largest eigenvalue λ, or of a pair λ, λ̄:

        dρ = Re(λ̄ wᴴ dA v / (wᴴ v)) / ρ        where A v = λ v,   wᴴ A = λ wᴴ

    They are taken as 0 where the radius is 0; where λ is a multiple eigenvalue there are none, and numbers without
    meaning or NaN come. They need a CPU or a GPU.

    Raises:
        ValueError: if the last two axes are not of one size.
        TypeError: if the numbers are no floating ones.

    >>> print(spectral_radius(jnp.array([[0.0, 2.0], [-2.0, 0.0]])).round(4))  # eigenvalues 2i and -2i
    2.0
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.shape[-1]:
        raise ValueError(f"spectral_radius needs square matrices [*batch, units, units], got {matrix.shape}.")
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"spectral_radius needs matrices of floating numbers, got {errors.shape_of(matrix)}.")
    whole = placed(matrix, PartitionSpec(*leading_spec(matrix, matrix.ndim - 2), None, None))
    return _radius(widen(whole)).astype(matrix.dtype)


@jax.custom_jvp
def _radius(matrix: Float[Array, "*batch units units"]) -> Float[Array, "*batch"]:
    scale = _scale(matrix)
    largest = functools.partial(lax.platform_dependent, cpu=_by_eigenvalues, cuda=_by_eigenvalues, default=_by_squaring)
    return largest(matrix / scale) * scale[..., 0, 0]


def _by_eigenvalues(matrix):
    return jnp.abs(jnp.linalg.eigvals(matrix)).max(axis=-1)


def _by_squaring(matrix):
    """The limit of |A^k|^(1/k) (Gelfand's formula), at k = 2^30, unless A is far from normal."""

    def normalize(power):
        norm = jnp.linalg.norm(power, axis=(-2, -1), keepdims=True)
        return power / jnp.where(norm > 0, norm, 1), jnp.log(norm[..., 0, 0])

    def square(carry, exponent):  # the power is A^k / c, where log c grows by all norms that were divided by
        power, logarithm = carry
        power, more = normalize(jnp.matmul(power, power, precision=lax.Precision.HIGHEST))
        return (power, logarithm + exponent * more), None

    exponents = 0.5 ** jnp.arange(1, _SQUARINGS + 1, dtype=matrix.dtype)
    (_, logarithm), _ = lax.scan(square, normalize(matrix), exponents)
    return jnp.exp(logarithm)


@_radius.defjvp
def _radius_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (matrix,), (change,) = primals, tangents
    radius = _radius(matrix)
    positive = ~(radius == 0)  # of NaN come NaN
    corner = jnp.zeros_like(matrix).at[..., 0, 0].set(1)
    safe = jnp.where(positive[..., None, None], matrix / _scale(matrix), corner)  # dρ does not depend on the scale
    _, slope = jax.jvp(lambda matrix: jnp.abs(_eigenpair(matrix)[0]), (safe,), (change,))
    return radius, jnp.where(positive, slope, 0)


def _scale(matrix: Float[Array, "*batch units units"]) -> Float[Array, "*batch 1 1"]:
    """A power of 2 near the largest magnitude of an entry: powers of a matrix divided by it stay in range."""
    largest = jnp.abs(lax.stop_gradient(matrix)).max(axis=(-2, -1), keepdims=True)
    most = jnp.finfo(matrix.dtype).maxexp - 28  # the inverse of the scale is a number too
    return jnp.exp2(jnp.clip(jnp.frexp(largest)[1], -most, most).astype(matrix.dtype))


@jax.custom_jvp
def _eigenpair(
    matrix: Float[Array, "*batch units units"],
) -> tuple[Complex[Array, "*batch"], Complex[Array, "*batch units"]]:
    """An eigenvalue of the largest magnitude and its eigenvector, of length 1."""
    values, vectors = jnp.linalg.eig(matrix)
    largest = jnp.abs(values).argmax(axis=-1, keepdims=True)
    vector = jnp.take_along_axis(vectors, largest[..., None, :], axis=-1)
    return jnp.take_along_axis(values, largest, axis=-1)[..., 0], vector[..., 0]


@_eigenpair.defjvp
def _eigenpair_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple, tuple]:
    """(A - λ) dv - v dλ = -dA v, where dv is orthogonal to v."""
    (matrix,), (change,) = primals, tangents
    value, vector = _eigenpair(matrix)
    column = vector[..., None]
    shifted = matrix - value[..., None, None] * jnp.eye(matrix.shape[-1], dtype=value.dtype)
    last_row = jnp.concatenate([column.mT.conj(), jnp.zeros_like(column[..., :1, :])], axis=-1)
    bordered = jnp.concatenate([jnp.concatenate([shifted, -column], axis=-1), last_row], axis=-2)
    right = jnp.concatenate([-change @ column, jnp.zeros_like(column[..., :1, :])], axis=-2)
    solution = jnp.linalg.solve(bordered, right)[..., 0]
    return (value, vector), (solution[..., -1], solution[..., :-1])
