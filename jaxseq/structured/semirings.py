"""Semirings: what a dynamic program does with the paths it runs over.

A dynamic program joins the weights along a path with `times` and those of different paths with `sum`. Which numbers
these are decides what it finds (Goodman, Semiring Parsing, Computational Linguistics 1999,
https://aclanthology.org/J99-4004):

    LOG      log Σ exp     the log-partition; its gradients are marginals and expectations
    MAX      max           the score of the best path
    best(k)  the k largest the scores of the k best paths
    COUNT    Σ             how many paths are possible

Counts are floats, exact up to 2^24 in float32 and inf beyond its range. For the log of a count take LOG over potentials
that are 0 where something is possible: `jax.tree.map(lambda part: jnp.where(part > -jnp.inf, 0.0, -jnp.inf), chain)`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Semiring(NamedTuple):
    """Elements are arrays, perhaps with an axis of their own in front (`ranks`).

    `lift` makes elements of log weights, `-inf` for what is impossible; `sum(elements, axis)` joins paths, along an
    axis counted from the end, and `times` the parts of a path; `product(elements, axis)` is `times` along an axis.
    `zero` and `one` are the numbers that change nothing in a sum and a product. With `scaled`, `lift(c)` multiplies by
    exp(c), and long products are kept near 1 by it.
    """

    lift: Callable[[Array], Array]
    sum: Callable[[Array, int], Array]
    times: Callable[[Array, Array], Array]
    product: Callable[[Array, int], Array]
    zero: float
    one: float
    scaled: bool
    ranks: int | None = None


def logsumexp(scores: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """`log Σ exp(scores)` over an axis: -inf, with gradients of 0, where all scores are -inf; of NaN it is NaN.

    >>> print(logsumexp(jnp.log(jnp.array([[1.0, 3.0], [0.0, 0.0]])), -1))
    [1.3862944      -inf]
    """
    largest = lax.stop_gradient(scores.max(axis=axis, keepdims=True, initial=-jnp.inf))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    total = jnp.exp(scores - largest).sum(axis=axis)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + jnp.squeeze(largest, axis))


def _identity(weights):
    return weights


def _max(scores, axis):
    return scores.max(axis=axis, initial=-jnp.inf)


def _possible(weights):
    return (weights > -jnp.inf).astype(weights.dtype)


def _multiply(a, b):
    return jnp.where((a == 0) | (b == 0), 0, a * b)  # also where the other is more than a float can say, inf


def _prod(counts, axis):
    return jnp.where((counts == 0).any(axis=axis), 0, jnp.prod(counts, axis=axis))


LOG = Semiring(_identity, logsumexp, jnp.add, jnp.sum, -jnp.inf, 0.0, scaled=True)
MAX = Semiring(_identity, _max, jnp.add, jnp.sum, -jnp.inf, 0.0, scaled=True)
COUNT = Semiring(_possible, jnp.sum, _multiply, _prod, 0.0, 1.0, scaled=False)


@functools.lru_cache
def best(k: int) -> Semiring:
    """The semiring of the k largest scores: its elements have an axis `[k, ...]` in front, largest first.

    Of equal scores those of the smaller rank, then of the smaller index, come first. Fewer than k paths leave -inf.

    >>> scores = best(2).lift(jnp.array([3.0, 5.0, 4.0]))
    >>> best(2).sum(scores, -1).tolist()
    [5.0, 4.0]
    """

    def largest(scores, axis):
        scores = jnp.moveaxis(jnp.concatenate([*scores], axis), axis, -1)
        missing = max(k - scores.shape[-1], 0)
        scores = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
        return jnp.moveaxis(lax.top_k(scores, k)[0], -1, 0)

    def times(a, b):
        if 1 in (a.shape[0], b.shape[0]):
            return a + b
        return largest(jnp.concatenate([rank + b for rank in a])[..., None], -1)

    def lift(weights):
        return weights[None]

    return Semiring(lift, largest, times, jnp.sum, -jnp.inf, 0.0, scaled=True, ranks=k)


def matmul(
    semiring: Semiring, a: Float[Array, "... left middle"], b: Float[Array, "... middle right"]
) -> Float[Array, "... left right"]:
    """The product of matrices of a semiring, whose intermediate products are computed again for the gradient.

    >>> matmul(MAX, jnp.array([[0.0, 2.0]]), jnp.array([[1.0], [3.0]])).tolist()
    [[5.0]]
    """

    @jax.checkpoint
    def product(a, b):
        return semiring.sum(semiring.times(a[..., :, :, None], b[..., None, :, :]), -2)

    return product(a, b)
