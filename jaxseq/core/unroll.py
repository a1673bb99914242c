"""What stands between `unroll` and `_unroll`: checks, defaults, and time moved to the front."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from jaxseq.core import errors, masks, sharding


class Run(NamedTuple):
    """What an unroll does besides reading inputs; arrays are time-major."""

    length: int
    batch_shape: tuple[int, ...]
    reverse: bool
    keep: Bool[Array, "time *batch"] | None  # the mask
    reset: Bool[Array, "time *batch"] | None
    keys: Array | None  # one key a step


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def unroll_checked(layer, reverse, length, params, xs, state, mask, reset, key):
    """`layer.unroll`: checks, fills in what was left out, moves time to the front once, and calls `layer._unroll`."""
    xs, state = jax.tree.map(jnp.asarray, (xs, state))
    _check_tree(layer, xs)
    if isinstance(layer.input_rank, int):  # the parts of a tree may differ: who reads one checks it
        _check_array(layer, params, xs)
    leading = _leading_axes(layer, params, xs, state, mask, reset, length)
    *batch_shape, length = leading
    for flags, name in ((mask, "mask"), (reset, "reset")):
        if flags is not None:
            errors.check_flags(layer, flags, name, leading)

    keys = None
    if key is not None:
        draw_key, step_key = jax.random.split(key)
        params = layer.draw(params, draw_key)
        keys = jax.random.split(step_key, length)
    if state is None:
        state = layer.initial_state(params, tuple(batch_shape))
        errors.check_initial_state(layer, state, _single_state(layer, params), tuple(batch_shape))
    else:
        expected = jax.eval_shape(lambda params: layer.initial_state(params, tuple(batch_shape)), params)
        errors.check_state(layer, state, expected, any_float=not jax.tree.leaves(params))
    time = len(batch_shape)
    over_batch = sharding.leading_spec((xs, mask, reset, state), time)
    xs, state, mask, reset = sharding.placed((xs, state, mask, reset), over_batch)
    params = sharding.placed(params, PartitionSpec())
    if mask is not None:
        xs = masks.zero_unless(mask, xs)

    xs, mask, reset = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, time, 0), (xs, mask, reset))
    run = Run(length, tuple(batch_shape), reverse, keep=mask, reset=reset, keys=keys)
    with jax.named_scope(type(layer).__name__):
        state, ys = layer._unroll(params, xs, state, run)
    return state, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, time), ys)


def unroll_steps(scan: Callable[..., Any], cell: Any, params: Any, xs: Any, state: Any, run: Run) -> Any:
    """The default `_unroll`: `cell.step` under `scan`, with the mask, resets and keys of `run`."""
    body, inputs = step_of(cell, params, xs, run)
    return scan_from_fresh(scan, body, state, inputs, run.length, run.reverse)


def step_of(cell: Any, params: Any, xs: Any, run: Run) -> tuple[Callable[..., Any], Any]:
    """A step `(state, inputs) -> (state, y)` with the mask, resets and keys of `run`, and its inputs `[time, ...]`."""
    fresh = run.keep is not None or run.reset is not None
    start = cell.initial_state(params, run.batch_shape) if fresh else None

    def step(state, inputs):
        result = cell.step(params, state, *inputs)
        errors.check_stepped(cell, result, state)
        return result

    def body(state, inputs):
        x, keep, reset, key = inputs
        if reset is not None:
            state = masks.select(reset, start, state)
        return step(state, (x, key)) if keep is None else masks.hold(step, start)(state, ((x, key), keep))

    return body, (xs, run.keep, run.reset, run.keys)


def scan_from_fresh(
    scan: Callable[..., Any], body: Callable[..., Any], state: Any, xs: Any, length: int, reverse: bool
):
    """`scan` from a state with the sharding and varying axes that a step gives it: fresh zeros know of no mesh."""

    def typed(leaf, after):
        return leaf if jax.typeof(leaf) == jax.typeof(after) else leaf + jnp.zeros_like(after)

    def first(x):
        if length:
            return x[0]
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(first(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return x.sum(axis=0).astype(x.dtype)  # a sum of nothing, of the type of a step

    if not jax.sharding.get_abstract_mesh().empty:
        after, _ = body(state, jax.tree.map(first, xs))  # only its types are used
        state = jax.tree.map(typed, state, after)
    known = bool(jax.tree.leaves(xs))  # a symbolic length is read from them, and only from them
    return scan(body, state, xs, length=None if known else length, reverse=reverse)


def scan_chunks(
    chunk: Callable[..., Any], state: Any, steps: Any, length: int, every: int, reverse: bool
) -> tuple[Any, Any]:
    """Folds `chunk(state, steps, length) -> (state, ys)` over chunks of `every` steps; the last may be shorter."""
    count, rest = divmod(length, every)

    def whole_chunks(state):
        chunks = jax.tree.map(lambda leaf: leaf[: count * every].reshape(count, every, *leaf.shape[1:]), steps)

        def body(state, steps):
            return chunk(state, steps, every)

        state, ys = scan_from_fresh(lax.scan, body, state, chunks, count, reverse)
        return state, jax.tree.map(lambda leaf: leaf.reshape(count * every, *leaf.shape[2:]), ys)

    def short_chunk(state):
        return chunk(state, jax.tree.map(lambda leaf: leaf[count * every :], steps), rest)

    if not count:
        return short_chunk(state)
    if not rest:
        return whole_chunks(state)
    if reverse:
        state, last = short_chunk(state)
        state, ys = whole_chunks(state)
    else:
        state, ys = whole_chunks(state)
        state, last = short_chunk(state)
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), ys, last)


def _needs(layer) -> str:
    return f"{layer} reads inputs [*batch, time, *features] with features of rank {layer.input_rank}"


def _check_tree(layer, xs) -> None:
    """Raises ValueError unless the inputs are the tree of arrays that the layer reads."""
    if jax.tree.structure(xs) == jax.tree.structure(layer.input_rank):
        return
    if layer.input_rank is None:
        raise ValueError(f"{layer} reads no inputs, but got {errors.shape_of(xs)}: give None, and length=.")
    if xs is None:
        raise ValueError(f"{_needs(layer)}, but got None; a layer without inputs declares input_rank = None.")
    if isinstance(layer.input_rank, tuple) and hasattr(xs, "shape"):
        count, names = len(layer.input_rank), f"({', '.join(layer.input_names)}), " if layer.input_names else ""
        raise ValueError(
            f"{layer} reads {count} inputs at each step, {names}of ranks {layer.input_rank}, but got one array "
            f"{errors.shape_of(xs)}: give a tuple of {count} arrays [*batch, time, *features]."
        )
    raise ValueError(
        f"{_needs(layer)}, but got {errors.shape_of(xs)}: another tree. A list is one too (jnp.asarray makes it an "
        "array), and a cell that reads trees declares input_rank as the tree of their ranks."
    )


def _check_array(layer, params, x) -> None:
    """Raises unless the one array that the layer reads has the dtype and the features of its inputs."""
    dtype = errors.float_dtype(params)
    if dtype is not None:
        errors.check_dtype(layer, x, dtype)
    if layer.input_rank == 1 and isinstance(size := getattr(layer, "input_size", None), int):
        errors.check_features(layer, x, size)
    if layer.input_rank == 0:
        errors.check_tokens(layer, x)
    elif layer.input_rank == 1 and jnp.issubdtype(x.dtype, jnp.integer) and dtype is not None:
        raise TypeError(
            f"{layer} reads vectors, but got {errors.shape_of(x)}: a cell that reads tokens declares "
            "input_rank = 0, and integers that are features are cast with .astype(float)."
        )


def _leading_axes(layer, params, xs, state, mask, reset, length) -> tuple[int, ...]:
    """The shape [*batch, time], from the inputs or, without any, from the masks, or the state and `length`."""
    if length is not None and length < 0:
        raise ValueError(f"{layer} got length={length}; it needs 0 or more steps.")
    ranks = jax.tree.leaves(layer.input_rank)
    found = {x.shape[: max(x.ndim - rank, 0)] for x, rank in zip(jax.tree.leaves(xs), ranks, strict=True)}
    if () in found:
        raise ValueError(f"{_needs(layer)}, but got {errors.shape_of(xs)}.")
    if not found:
        flags = mask if mask is not None else reset
        if flags is not None:
            found.add(flags.shape)
        elif length is not None:
            found.add((*_state_batch(layer, params, state), length))
        else:
            raise ValueError(f"{layer} got no inputs: say how many steps with length=.")
    if len(found) > 1:
        raise ValueError(f"{layer} got inputs whose [*batch, time] axes differ: {sorted(found)}.")
    (leading,) = found
    if length is not None and length != leading[-1]:
        raise ValueError(f"{layer} got length={length}, but its inputs have {leading[-1]} steps.")
    return leading


def _state_batch(layer, params, state) -> tuple[int, ...]:
    """The batch axes of a state: those that the state of a single sequence lacks."""
    single, leaves = jax.tree.leaves(_single_state(layer, params)), jax.tree.leaves(state)
    return leaves[0].shape[: leaves[0].ndim - single[0].ndim] if leaves and single else ()


def _single_state(layer, params):
    """The abstract state of one sequence, without the memory, which may be that of a batch."""
    return jax.eval_shape(lambda params: layer.initial_state(layer.attach(params, None), ()), params)
