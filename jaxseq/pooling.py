"""One output of a whole sequence: what a cell gave at each step, pooled over time.

Every function takes the outputs `[*batch, time, *features]`, or a tree of them, and gives `[*batch, *features]`. Off
the mask (`bool[*batch, time]`, True where a step counts, gaps allowed) nothing that stands there, NaN too, reaches
value or gradient. A row without any step gives zeros.

Which axis is time a mask tells, or `rank`, the number of axes of one step's output: 0 for numbers or tokens, 1 for
vectors, 3 for images, a tree of ranks for a tree of outputs. Without either, outputs of up to three axes are vectors.
"""

import builtins
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxseq.core import errors, masks


def last(ys: Any, mask: Bool[Array, "*batch time"] | None = None, *, rank: Any = None) -> Any:
    """The output of the last unmasked step of each row.

    >>> ys = jnp.array([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    >>> last(ys).tolist()
    [[3.0], [6.0]]
    >>> last(ys, jnp.array([[True, True, False], [False, False, False]])).tolist()
    [[2.0], [0.0]]
    """

    def leaf(y, mask, time):
        steps = jax.lax.broadcasted_iota(jnp.int32, mask.shape, time)
        latest = jnp.max(steps, axis=time, keepdims=True, where=mask, initial=-1)
        return masks.zero_unless(steps == latest, y).sum(axis=time, dtype=y.dtype)

    return _pool("last", leaf, ys, mask, rank)


def mean(ys: Any, mask: Bool[Array, "*batch time"] | None = None, *, rank: Any = None) -> Any:
    """The mean over the unmasked steps of each row. Half-precision outputs are summed in float32.

    Raises:
        TypeError: if the outputs are not floating.

    >>> ys = jnp.array([[[1.0], [2.0], [6.0]], [[4.0], [5.0], [6.0]]])
    >>> mean(ys).tolist()
    [[3.0], [5.0]]
    >>> mean(ys, jnp.array([[True, False, True], [False, False, False]])).tolist()
    [[3.5], [0.0]]
    """

    def leaf(y, mask, time):
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise TypeError(f"mean needs floating outputs, got {errors.shape_of(y)}: cast them with .astype(float).")
        with jax.numpy_dtype_promotion("standard"):  # a choice of ours, whatever the caller lets promote by itself
            wide = jnp.promote_types(y.dtype, jnp.float32)
        total = masks.zero_unless(mask, y.astype(wide)).sum(axis=time)
        count = jnp.maximum(mask.sum(axis=time), 1).astype(wide)
        count = jnp.expand_dims(count, tuple(range(count.ndim, total.ndim)))
        return (total / jnp.broadcast_to(count, total.shape)).astype(y.dtype)

    return _pool("mean", leaf, ys, mask, rank)


def max(ys: Any, mask: Bool[Array, "*batch time"] | None = None, *, rank: Any = None) -> Any:
    """The largest value of each feature over the unmasked steps of each row.

    >>> ys = jnp.array([[[1.0, -9.0], [7.0, -3.0]], [[4.0, -5.0], [5.0, -6.0]]])
    >>> max(ys).tolist()
    [[7.0, -3.0], [5.0, -5.0]]
    >>> max(ys, jnp.array([[True, False], [False, False]])).tolist()
    [[1.0, -9.0], [0.0, 0.0]]
    """

    def leaf(y, mask, time):
        if y.dtype == jnp.bool_:
            least = False
        else:
            least = -jnp.inf if jnp.issubdtype(y.dtype, jnp.floating) else jnp.iinfo(y.dtype).min
        largest = masks.select(mask, y, jnp.full_like(y, least)).max(axis=time, initial=jnp.asarray(least, y.dtype))
        return masks.zero_unless(mask.any(axis=time), largest)

    return _pool("max", leaf, ys, mask, rank)


def _pool(name: str, leaf: Callable[..., Array], ys: Any, mask: Array | None, rank: Any) -> Any:
    """`leaf(y, mask, time)` of each array in `ys`, once the shapes are known to belong together."""

    def pooled(y, rank):
        y = jnp.asarray(y)
        if rank is None and mask is None and y.ndim > 3:
            raise ValueError(
                f"{name} cannot tell the time axis of {errors.shape_of(y)}: give a mask, or say the rank of one step's "
                "output, such as rank=1 for vectors or rank=3 for images."
            )
        if rank is None:
            lengths = mask is not None and jnp.result_type(mask) != jnp.bool_ and jnp.ndim(mask) == y.ndim - 2
            rank = 1 if mask is None or lengths else builtins.max(0, y.ndim - jnp.ndim(mask))
        if not 0 <= rank < y.ndim:
            raise ValueError(
                f"{name} needs outputs [*batch, time] with {rank} more axes (rank={rank}), got {errors.shape_of(y)}: "
                "say the rank of one step's output, or give a mask."
            )
        steps = y.shape[: y.ndim - rank]
        flags = jnp.ones(steps, bool) if mask is None else jnp.asarray(mask)
        errors.check_flags(name, flags, "mask", steps)
        return leaf(y, flags, len(steps) - 1)

    if rank is None or isinstance(rank, int):
        return jax.tree.map(lambda y: pooled(y, rank), ys)
    return jax.tree.map(pooled, ys, rank)
