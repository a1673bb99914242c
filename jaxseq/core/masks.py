"""What happens at padded steps and at the starts of segments: one meaning for every layer."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxseq.core import errors, sharding


def length_mask(lengths: Int[Array, "*batch"], time: int) -> Bool[Array, "*batch time"]:
    """The mask of right-padded sequences: True at the first `lengths` steps of each row, at all if it has fewer.

    >>> length_mask(jnp.array([2, 0]), 3).tolist()
    [[True, True, False], [False, False, False]]
    """
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"length_mask needs integer lengths, got {lengths.dtype}.")
    if isinstance(time, float) or jnp.ndim(time) > 0:
        raise TypeError(f"length_mask(lengths, time) needs the number of steps as time, got {errors.shape_of(time)}.")
    steps = jax.lax.broadcasted_iota(lengths.dtype, (*lengths.shape, time), lengths.ndim)
    return steps < lengths[..., None]


def pad(sequences: Sequence[Any], time: int | None = None) -> tuple[Array, Bool[Array, "row time"]]:
    """Sequences `[time, ...]` of different lengths as one array `[row, time, ...]`, 0 after their ends, and its mask.

    `time` is that of the longest one, or as given: few different ones are few compilations.

    >>> tokens, mask = pad([[5, 7, 8], [9]])
    >>> tokens.tolist(), mask.tolist()
    ([[5, 7, 8], [9, 0, 0]], [[True, True, True], [True, False, False]])
    """
    sequences = list(sequences)
    rows = [np.asarray(sequence) for sequence in sequences]
    unknown = next((row.ravel()[0] for row in rows if row.dtype.kind in "OSU" and row.size), None)
    if unknown is not None:
        raise TypeError(f"pad needs numbers, got {unknown!r}: give words their ids, and NaN where a number is missing.")
    if not rows or any(row.ndim == 0 for row in rows):
        raise ValueError(f"pad needs a list of sequences [time, ...], got {errors.shape_of(sequences)}.")
    # an empty list has neither the features nor the dtype of others
    filled = [row for row, given in zip(rows, sequences, strict=True) if len(row) or hasattr(given, "dtype")] or rows
    if len({row.shape[1:] for row in filled}) > 1:
        raise ValueError(f"pad needs sequences of the same features, got shapes {[row.shape for row in rows]}.")
    lengths = np.array([len(row) for row in rows])
    steps = lengths.max().item() if time is None else operator.index(time)
    if steps < lengths.max():
        raise ValueError(f"pad needs time >= {lengths.max()}, the longest sequence, got {steps}.")
    padded = np.zeros((len(rows), steps, *filled[0].shape[1:]), np.result_type(*filled))
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row.reshape(len(row), *place.shape[1:])
    held = jax.dtypes.canonicalize_dtype(padded.dtype)
    if padded.dtype.kind in "iu" and padded.size and not (padded == padded.astype(held)).all():
        raise ValueError(f"pad got {abs(padded).max()}, which {held} cannot hold: see jax_enable_x64.")
    return jnp.asarray(padded), jnp.asarray(np.arange(steps) < lengths[:, None])


class Places(NamedTuple):
    """Of each step: whether it is the first or the last one of its segment, off the mask neither; and the index of the
    unmasked step before it and of that after it, -1 and `time` if there is none. Segments begin at resets.
    """

    first: Bool[Array, "*batch_time"]
    last: Bool[Array, "*batch_time"]
    preceding: Int[Array, "*batch_time"]
    following: Int[Array, "*batch_time"]


def places(
    shape: tuple[int, ...],
    keep: Bool[Array, "*batch_time"] | None,
    reset: Bool[Array, "*batch_time"] | None,
    axis: int = -1,
) -> Places:
    """Where segments begin and end among the steps along an axis of arrays of a shape.

    >>> mask, reset = jnp.array([True, False, True, True]), jnp.array([False, False, False, True])
    >>> found = places((4,), mask, reset)
    >>> found.first.tolist(), found.last.tolist()
    ([True, False, False, True], [False, False, True, True])
    """
    axis %= len(shape)
    time = shape[axis]
    index = jax.lax.broadcasted_iota(int, shape, axis)

    def before(flags):  # the last index with a flag, up to here
        return jax.lax.cummax(jnp.where(flags, index, -1), axis=axis)

    def after(flags):  # the first index with a flag, from the next on
        found = jax.lax.cummin(jnp.where(flags, index, time), axis=axis, reverse=True)
        return jnp.where(index == time - 1, time, jnp.roll(found, -1, axis=axis))

    preceding, following = index - 1, index + 1
    if keep is not None:
        preceding = jnp.where(index == 0, -1, jnp.roll(before(keep), 1, axis=axis))
        following = after(keep)
    begun, ended = (0, time) if reset is None else (jnp.maximum(before(reset), 0), after(reset))
    first, last = preceding < begun, ended <= following
    if keep is not None:
        first, last = keep & first, keep & last
    return Places(first, last, preceding, following)


def select(flags: Bool[Array, "*batch"], chosen: Any, otherwise: Any) -> Any:
    """The rows of `chosen` where `flags`, else those of `otherwise`: trees of arrays `[*batch, ...]`."""

    def leaf(a, b):
        rows, a, b = sharding.placed((flags, a, b), sharding.leading_spec((flags, a, b), flags.ndim))
        axes = tuple(range(flags.ndim, max(jnp.ndim(a), jnp.ndim(b))))
        return jnp.where(jnp.expand_dims(rows, axes), a, b)

    return jax.tree.map(leaf, chosen, otherwise)


def zero_unless(flags: Bool[Array, "*batch"], values: Any) -> Any:
    """`values` where `flags`, else zeros; what stood there, NaN too, reaches neither value nor gradient."""
    return select(flags, values, jax.tree.map(jnp.zeros_like, values))


def hold(step: Callable[..., Any], start: Any) -> Callable[..., Any]:
    """A step `(state, x) -> (state, y)` as `(state, (x, keep))`: not `keep` holds the state and outputs zero.

    There the step is computed from `start`, and the caller gives x = 0: a `where` on the results alone would let the
    gradient of NaN through.
    """

    def held(state, inputs):
        x, keep = inputs
        new_state, y = step(select(keep, state, start), x)
        return select(keep, new_state, state), zero_unless(keep, y)

    return held


def lose(flags: Bool[Array, "*batch"], values: Any, xs: Array, params: Any) -> Any:
    """`values` where not `flags`, else NaN, whose gradients with respect to inputs `[*batch, feature]` and params are
    not finite either: checks of gradients find what a loss lost. What has no effect on the loss has none on them.
    """
    floats = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    total = xs.sum(axis=-1) + sum(jnp.sum(leaf).astype(xs.dtype) for leaf in floats)
    huge = jnp.where(flags, jnp.finfo(xs.dtype).max, jnp.ones_like(total))
    nan = total * huge * huge + jnp.nan  # twice, so that a cotangent overflows unless it is 0

    def leaf(array):
        spoilt = jnp.expand_dims(nan.astype(array.dtype), tuple(range(flags.ndim, array.ndim)))
        return select(flags, spoilt, array)

    return jax.tree.map(leaf, values)


def contain(
    unroll: Callable[[Array, Any], tuple[Any, Array]], params: Any, xs: Array, state: Any, run: Any
) -> tuple[Any, Array]:
    """`unroll(xs, state) -> (state, ys)` for products over many steps, in which 0 * NaN would reach all of them.

    A step whose inputs are not finite is read as zeros. The outputs from there to the next reset are NaN, and so is
    the last state if none follows.
    """
    finite = jnp.isfinite(xs).all(axis=-1)
    order = jnp.cumsum(jnp.ones_like(finite, jnp.int32), axis=0) - 1  # sharded as the inputs are
    if run.reverse:
        order = run.length - 1 - order
    events = jnp.where(finite, 0, 2 * order + 1)  # odd where NaN begins, even where it ends
    if run.reset is not None:
        events = jnp.where(finite & run.reset, 2 * order, events)
    lost = jax.lax.cummax(events, axis=0, reverse=run.reverse) % 2 == 1
    state, ys = unroll(zero_unless(finite, xs), state)
    shown, last = lost if run.keep is None else lost & run.keep, 0 if run.reverse else -1
    return lose(lost[last], state, xs[last], params), lose(shown, ys, xs, params)


def reset_where(cell: Any, params: Any, state: Any, done: Bool[Array, "*batch"]) -> Any:
    """The state for the next step where some rows have ended: `initial_state` where `done`, else `state`.

    For loops that call `step` themselves; `unroll` takes `reset` instead.

    >>> import jaxseq as js
    >>> cell = js.Elman(2, 3)
    >>> params = cell.init(jax.random.key(0))
    >>> state = js.ElmanState(hidden=jnp.ones((2, 3)))
    >>> reset_where(cell, params, state, jnp.array([True, False])).hidden.tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    done = jnp.asarray(done)
    errors.check_flags(cell, done, "done", done.shape)
    start = cell.initial_state(params, done.shape)
    errors.check_state(cell, state, start)
    return select(done, start, state)
