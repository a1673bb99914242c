"""Memories that outer products write and the input lets decay, by chunks of steps instead of step by step."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxseq.core.unroll import scan_from_fresh


class Terms(NamedTuple):
    """What a step does to the memory of each head, and how it reads it: arrays `[*leading, head, ...]`."""

    query: Float[Array, "*leading key"]
    key: Float[Array, "*leading key"]
    value: Float[Array, "*leading value"]
    log_decay: Float[Array, "*leading key_or_1"]
    strength: Float[Array, "*leading 1"] | None  # of the delta rule: how much of what the key read is replaced


def chunkwise(terms: Terms, memory: Array, reset: Array | None, size: int) -> tuple[Array, Array]:
    """The last memory and the readings of all steps, `[time, *batch, head, value]`, by chunks of `size` steps.

    The gradient saves the terms and the memory at each chunk's start, and computes what is in between again.
    """
    length = terms.query.shape[0]
    count = -(-length // size)

    def chunks(array):
        array = jnp.pad(array, [(0, count * size - length)] + [(0, 0)] * (array.ndim - 1))
        return array.reshape(count, size, *array.shape[1:])

    body = jax.checkpoint(_chunk, prevent_cse=False)  # a loop needs no barriers
    inputs = jax.tree.map(chunks, (terms, reset))
    memory, readings = scan_from_fresh(lax.scan, body, memory, inputs, count, reverse=False)
    return memory, readings.reshape(count * size, *readings.shape[2:])[:length]


def _chunk(memory: Array, inputs: tuple[Terms, Array | None]) -> tuple[Array, Array]:
    """All steps of a chunk at once, from the memory S at its start.

    With the delta rule what is written solves (I + L) u = β (v - what k reads of S), where L, below the diagonal, has
    what k reads of the steps before, times β.
    """
    terms, reset = inputs
    query, key, value, log_decay, strength = jax.tree.map(lambda array: jnp.moveaxis(array, 0, -2), terms)
    size = query.shape[-2]
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool)), (*query.shape[:-1], size))
    since_start = since_end = jnp.ones((*query.shape[:-1], 1), bool)  # in one segment with the chunk's start, or end
    if reset is not None:
        segment = jnp.moveaxis(jnp.cumsum(reset, axis=0), 0, -1)[..., None, :, None]
        segment = jnp.broadcast_to(segment, since_start.shape)
        visible = visible & (segment == segment.mT)
        since_start, since_end = segment == 0, segment == segment[..., -1:, :]
    # logarithms, up to and with each step: a document's decays of nothing leave those of the next one their digits
    decay = jnp.cumsum(jnp.maximum(log_decay, math.log(jnp.finfo(log_decay.dtype).smallest_subnormal)), axis=-2)
    scores = functools.partial(_scores, decay, visible)
    from_start = jnp.where(since_start, jnp.exp(decay), 0.0)
    to_end = jnp.where(since_end, jnp.exp(decay[..., -1:, :] - decay), 0.0)

    finite = jnp.isfinite(memory).all((-2, -1), keepdims=True)
    given = jnp.where(finite, memory, 0.0)  # 0 * NaN would go past the resets of the chunk
    if strength is not None:
        inverse = _unit_triangular_inverse(strength * scores(key, key))
        value = inverse @ (strength * (value - (key * from_start) @ given))
    after = from_start[..., -1, :, None] * given + (key * to_end).mT @ value
    readings = (query * from_start) @ given + scores(query, key) @ value
    lost = since_start & ~finite
    shown = ~lost & jnp.isfinite(readings).all(-1, keepdims=True)  # elsewhere the gradient stops
    after = jnp.where(lost[..., -1:, :], memory, after)
    return after, jnp.moveaxis(jnp.where(shown, readings, jnp.nan), -2, 0)


def _scores(decay: Array, visible: Array, queries: Array, keys: Array) -> Array:
    """Products of the queries with what is left of the keys of visible steps, `[..., size, size]`."""
    if decay.shape[-1] == 1:
        left = jnp.exp(jnp.where(visible, decay - decay.mT, 0.0))
        return jnp.where(visible, queries @ keys.mT * left, 0.0)
    apart = decay[..., :, None, :] - decay[..., None, :, :]
    left = jnp.exp(jnp.where(visible[..., None], apart, 0.0))
    return jnp.where(visible, jnp.einsum("...id,...jd,...ijd->...ij", queries, keys, left), 0.0)


def _unit_triangular_inverse(lower: Array) -> Array:
    """The inverse of matrices `[..., size, size]` with 1 on the diagonal and `lower` below it, by halves.

    It is as exact as substitution and made of products, where a solver takes the matrices one by one. (A sum of powers
    would cancel.)
    """
    size = lower.shape[-1]
    whole = 1 << (size - 1).bit_length()
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, whole - size)] * 2)
    inverses, half = jnp.ones_like(lower[..., :1, None]), 1  # of blocks on the diagonal
    while half < whole:
        count = whole // (2 * half)
        rows = lower.reshape(*lower.shape[:-2], count, 2, half, whole)[..., 1, :, :]
        blocks = rows.reshape(*rows.shape[:-1], count, 2, half)[..., 0, :]
        corners = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        pairs = inverses.reshape(*lower.shape[:-2], count, 2, half, half)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        below = jnp.concatenate([-second @ corners @ first, second], axis=-1)
        inverses, half = jnp.concatenate([above, below], axis=-2), 2 * half
    return inverses[..., 0, :size, :size]
