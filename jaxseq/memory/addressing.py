"""How heads find places in a memory, read there and write: what the memory machines share.

A memory is `[*batch, place, word]`; heads weigh its places, `[*batch, head, place]`, and keep their words beside them.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SMALL = 1e-6  # beside squared norms: the direction of an empty place is 0, with a finite slope
_EMPTY = 1e-16  # weights at most so large count as none


def cosine_similarity(
    keys: Float[Array, "*batch head word"], memory: Float[Array, "*batch place word"]
) -> Float[Array, "*batch head place"]:
    """The cosines of the angles between keys and words: u · v / (‖u‖ ‖v‖), with ‖u‖ = √(u · u + 1e-6).

    A word of zeros is at a right angle to every key.

    >>> cosine_similarity(jnp.array([[3.0, 4.0]]), jnp.array([[6.0, 8.0], [0.0, 0.0]])).round(3).tolist()
    [[1.0, 0.0]]
    """
    return jnp.einsum("...hw,...pw->...hp", _directions(keys), _directions(memory))


def _directions(words: Array) -> Array:
    return words * jax.lax.rsqrt(jnp.square(words).sum(axis=-1, keepdims=True) + _SMALL)


def content_weights(
    keys: Float[Array, "*batch head word"],
    strengths: Float[Array, "*batch head"],
    memory: Float[Array, "*batch place word"],
) -> Float[Array, "*batch head place"]:
    """Weights by content: the softmax of `strengths` times the cosines of keys and words."""
    return _weigh(cosine_similarity(keys, memory), strengths)


def _weigh(scores: Array, strengths: Array) -> Array:
    """The softmax of scores times strengths >= 0, however large those: the largest product is 0 without rounding."""
    scores = scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    return jax.nn.softmax(strengths[..., None] * scores, axis=-1)


def interpolate(gates: Float[Array, "*batch head"], new: Array, old: Array) -> Float[Array, "*batch head place"]:
    """`new` weights where the gate of a head is 1, `old` ones where it is 0."""
    gates = gates[..., None]
    return gates * new + (1 - gates) * old


def rotate(
    weights: Float[Array, "*batch head place"], shifts: Float[Array, "*batch head shift"]
) -> Float[Array, "*batch head place"]:
    """Weights turned around the memory by a circular convolution with those of shifts -n, ..., 0, ..., n.

    >>> rotate(jnp.array([[1.0, 0.0, 0.0, 0.0]]), jnp.array([[0.25, 0.0, 0.75]])).tolist()
    [[0.0, 0.75, 0.0, 0.25]]
    """
    reach = shifts.shape[-1] // 2
    turned = (shifts[..., n : n + 1] * jnp.roll(weights, n - reach, axis=-1) for n in range(2 * reach + 1))
    return functools.reduce(operator.add, turned)


def sharpen(
    weights: Float[Array, "*batch head place"], powers: Float[Array, "*batch head"]
) -> Float[Array, "*batch head place"]:
    """Weights to the power of at least 1 and normalised again, w^γ / Σ w^γ, as a softmax of γ log w.

    However large the power they sum to 1. Those below 1e-16 count as that, and have no gradient.

    >>> sharpen(jnp.array([[0.2, 0.2, 0.0]]), jnp.array([500.0])).tolist()
    [[0.5, 0.5, 0.0]]
    """
    return _weigh(jnp.log(jnp.maximum(weights, _EMPTY)), powers)


def read(
    memory: Float[Array, "*batch place word"], weights: Float[Array, "*batch head place"]
) -> Float[Array, "*batch head word"]:
    """The words that heads read: r = Σ_p w_p M_p."""
    return jnp.einsum("...hp,...pw->...hw", weights, memory)


def write(
    memory: Float[Array, "*batch place word"],
    weights: Float[Array, "*batch head place"],
    erase: Float[Array, "*batch head word"],
    add: Float[Array, "*batch head word"],
) -> Float[Array, "*batch place word"]:
    """The memory after all heads have erased, and then all have added: M_p Π_h (1 - w_hp e_h) + Σ_h w_hp a_h."""
    for head in range(weights.shape[-2]):
        memory = memory * (1 - weights[..., head, :, None] * erase[..., head, None, :])
    return memory + jnp.einsum("...hp,...hw->...pw", weights, add)
