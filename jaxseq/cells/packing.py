"""The steps of each row that are read, the one after the other, with their positions and segments."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxseq.core.sharding import leading_spec, placed
from jaxseq.core.unroll import Run


class Order(NamedTuple):
    """The steps that are read, in each row the one after the other, and what was read at the end."""

    index: Int[Array, "*batch time"] | None  # where each comes from; None if all are read
    rank: Int[Array, "*batch time"]  # how many are read before each step of the inputs
    keep: Bool[Array, "*batch time"] | None
    position: Int[Array, "*batch time"]
    segment: Int[Array, "*batch time"]
    read: Int[Array, "*batch"]
    last_read: Int[Array, "*batch"]  # since the last reset
    last_position: Int[Array, "*batch"]
    was_reset: Bool[Array, "*batch"]


def order_of(run: Run, start: Array, keep: Array | None, reset: Array | None) -> Order:
    """The order of the steps that begin at position `start`."""
    index, read = None, jnp.full(run.batch_shape, run.length, jnp.int32)
    rank = lax.broadcasted_iota(jnp.int32, (*run.batch_shape, run.length), start.ndim)
    rank = placed(rank, leading_spec(start, start.ndim))
    if keep is not None:
        index = jnp.argsort(~keep, axis=-1, stable=True)
        read = keep.sum(axis=-1, dtype=jnp.int32)
        rank = jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - keep.astype(jnp.int32)
    segment, begin = jnp.zeros_like(rank), jnp.zeros_like(rank)
    if reset is not None:
        segment = jnp.cumsum(reset, axis=-1, dtype=jnp.int32)
        begin = lax.cummax(jnp.where(reset, rank, 0), axis=rank.ndim - 1)
    position = rank - begin + jnp.where(segment == 0, start[..., None], 0)
    last_read, was_reset = read - begin[..., -1], segment[..., -1] > 0
    last_position = last_read + jnp.where(was_reset, 0, start)
    if index is not None:
        position, segment = take(position, index), take(segment, index)
    return Order(index, rank, keep, position, segment, read, last_read, last_position, was_reset)


def take(values: Array, index: Int[Array, "*batch entry"]) -> Array:
    """The entries `[*batch, entry, ...]` of `values` at each row's own index."""
    trailing = tuple(range(index.ndim, values.ndim))
    return jnp.take_along_axis(values, jnp.expand_dims(index, trailing), axis=index.ndim - 1)
