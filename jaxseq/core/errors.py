"""Checks that many parts share: each says what was expected, what came and what to do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

_LONGEST = 96  # characters of a layer in a message


def shortened(text: str) -> str:
    """A text of many parts as a message can begin with it: its beginning.

    >>> shortened("Stack(layers=(" + "LSTM(input_size=64, hidden_size=64), " * 5)
    'Stack(layers=(LSTM(input_size=64, hidden_size=64), LSTM(input_size=64, hidden_size=64), LSTM(...'
    """
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3].rstrip() + "..."


def shape_of(value: Any) -> str:
    """`value` as `float32[3,4]`, and trees of arrays as the tree of that."""

    def short(leaf):
        try:
            return f"{jnp.result_type(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]"
        except TypeError:
            return shortened(repr(leaf))

    return str(jax.tree.map(short, value)).replace("'", "")


def are_sizes(sizes: Any) -> bool:
    """Whether these are a tuple of integers of at least 1."""
    return isinstance(sizes, tuple) and all(type(size) is int and size >= 1 for size in sizes)


def are_known(*given: Any) -> bool:
    """Whether the numbers in arrays can be looked at: they are no tracers, and all of them are on this host."""
    return all(not isinstance(leaf, Tracer) and getattr(leaf, "is_fully_addressable", True) for leaf in given)


def check_features(layer: Any, x: jax.Array, size: int, name: str = "inputs") -> None:
    """Raises ValueError unless `x` is an array whose last axis holds `size` features."""
    if not hasattr(x, "shape"):
        raise ValueError(f"{layer} got {name} {shape_of(x)}, which is no array; it needs {size} features.")
    if jnp.ndim(x) == 0 or x.shape[-1] != size:
        features = f"{x.shape[-1]} features" if jnp.ndim(x) else "no feature axis"
        single = f": of one number a step give {name}[..., None]" if size == 1 else ""
        raise ValueError(
            f"{layer} got {name} with {features} (shape {jnp.shape(x)}); it needs {size} in the last axis{single}."
        )


def check_dtype(layer: Any, x: Any, dtype: Any, name: str = "inputs") -> None:
    """Raises TypeError if `x` holds numbers of another inexact dtype than `dtype`; weakly typed ones fit any."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact) and not jax.typeof(x).weak_type and x.dtype != dtype:
        raise TypeError(f"{layer} has params of {jnp.dtype(dtype)} but got {name} of {x.dtype}: cast one to the other.")


def check_params(layer: Any, params: Any) -> None:
    """Raises unless `params` has the tree and shapes that `layer.init` makes, and one floating dtype."""
    expected = _abstract_params(layer)
    if jax.tree.structure(params) != jax.tree.structure(expected) or any(
        jnp.shape(leaf) != want.shape
        for leaf, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    ):
        raise ValueError(
            f"{layer} got params of another layer: {shape_of(params)}; init(key) makes {shape_of(expected)}."
        )
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    if len(dtypes := {dtype for dtype in dtypes if not jnp.issubdtype(dtype, jnp.integer)}) > 1:
        raise TypeError(f"{layer} got params of {' and '.join(sorted(map(str, dtypes)))}: cast them to one dtype.")


@functools.lru_cache(maxsize=4096)
def _abstract_params(layer: Any) -> Any:
    return jax.eval_shape(layer.init, jax.random.key(0))


def check_tokens(layer: Any, x: jax.Array) -> None:
    """Raises TypeError unless `x` holds integers."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise TypeError(f"{layer} reads tokens, integers, but got {shape_of(x)}: cast token ids with .astype(int).")


def float_dtype(tree: Any) -> Any:
    """The one floating dtype of the arrays in `tree`; None if there is none, or more than one."""
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)}
    floats = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
    return floats.pop() if len(floats) == 1 else None


def check_state(layer: Any, state: Any, expected: Any, any_float: bool = False) -> None:
    """Raises unless `state` is a tree of arrays of the structure, shapes and dtypes of `expected`.

    With `any_float` a floating array fits another: without params nothing says which.
    """
    flags = getattr(state, "dtype", None) == jnp.bool_
    if flags and all(leaf.dtype != jnp.bool_ for leaf in jax.tree.leaves(expected)):
        raise TypeError(
            f"{layer} got flags {shape_of(state)} as the state to start from: give a mask or resets by name, "
            "unroll(params, xs, mask=mask)."
        )
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise TypeError(
            f"{layer} got the state of another cell: {shape_of(state)}; "
            f"it needs {shape_of(expected)}, as initial_state(params, batch_shape) makes it."
        )
    paths = jax.tree.leaves_with_path(expected)
    for (path, want), leaf in zip(paths, jax.tree.leaves(state), strict=True):
        if jnp.shape(leaf) != want.shape:
            raise ValueError(
                f"{layer} got a state{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}; these inputs need "
                f"{want.shape}, the batch axes of the inputs before those of the state itself."
            )
        floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (jnp.result_type(leaf), want.dtype))
        if jnp.result_type(leaf) != want.dtype and not (any_float and floats):
            raise TypeError(
                f"{layer} got a state{jax.tree_util.keystr(path)} of {jnp.result_type(leaf)}; with these params it is "
                f"{want.dtype}: cast one to the other."
            )


def check_flags(layer: Any, flags: Any, name: str, shape: tuple[int, ...]) -> None:
    """Raises unless `flags` (a mask or resets) is boolean and of the shape [*batch, time]."""
    if jnp.result_type(flags) != jnp.bool_:
        cure = "cast it with .astype(bool)" if jnp.shape(flags) == shape else "length_mask(lengths, time) makes one"
        raise TypeError(
            f"{layer} needs a boolean {name}, got {jnp.result_type(flags)}{list(jnp.shape(flags))}: {cure}."
        )
    if jnp.shape(flags) != shape:
        raise ValueError(
            f"{layer} got a {name} of shape {jnp.shape(flags)}; these inputs need [*batch, time] = {shape}."
        )


def check_key(layer: Any, key: Any) -> None:
    """Raises TypeError unless `key` is one random key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and key.ndim == 0 or dtype == jnp.uint32 and key.ndim == 1):
        got = repr(key) if dtype is None else shape_of(key)
        raise TypeError(f"{layer} needs one key, such as jax.random.key(0), got {got}.")


def check_epsilon(layer: Any, epsilon: float) -> None:
    """Raises ValueError unless `epsilon`, added to a mean of squares, is finite and not 0 in float32."""
    least = float(jnp.finfo(jnp.float32).tiny)
    if not least <= epsilon < float("inf"):
        raise ValueError(f"{type(layer).__name__} needs a finite epsilon of at least {least:.1e}, got {epsilon}.")


def check_initial_state(layer: Any, state: Any, single: Any, batch_shape: tuple[int, ...]) -> None:
    """Raises unless `initial_state` puts the batch axes before those of the state `single` of one sequence."""
    for leaf, one in zip(jax.tree.leaves(state), jax.tree.leaves(single), strict=True):
        if jnp.shape(leaf) != (*batch_shape, *one.shape):
            raise ValueError(
                f"{layer}.initial_state(params, {batch_shape}) gave an array of shape {jnp.shape(leaf)}; it needs "
                f"{(*batch_shape, *one.shape)}: batch_shape before the axes of one sequence."
            )


def check_stepped(cell: Any, result: Any, state: Any) -> None:
    """Raises unless `step` gave a pair of a state like the one before and an output."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{cell}.step needs to return (state, y), it returned {shape_of(result)}.")

    def kinds(tree):
        return [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]

    weak = any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))  # takes the type that the step gives it
    if jax.tree.structure(result[0]) != jax.tree.structure(state) or (kinds(result[0]) != kinds(state) and not weak):
        raise TypeError(
            f"{cell}.step needs to keep the tree, shapes and dtypes of the state: it was given {shape_of(state)} and "
            f"returned {shape_of(result[0])}."
        )
