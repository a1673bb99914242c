"""The kernels of a layer, found by the names that `axes()` gives their axes."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxseq.core import errors
from jaxseq.core.layer import Layer, Params
from jaxseq.core.wrapper import follow

Role = Literal["input", "recurrent"]


def kernel_axes(layer: Layer, *roles: Role) -> list[tuple[str | None, ...] | None]:
    """For each leaf of the params the names of its axes if it is a kernel, whose first axis is one of `roles`, or None.

    Raises:
        ValueError: if a role is another.
        TypeError: if the layer has no such kernel.
    """
    for role in roles:
        if role not in ("input", "recurrent"):
            raise ValueError(f'The role of a kernel is "input" or "recurrent", got {role!r}.')
    found = [names if len(names) > 1 and names[0] in roles else None for names in axis_names(layer)]
    if not any(found):
        raise TypeError(
            f'{layer} has no {" or ".join(roles)} kernel: no array of its axes() begins with "{roles[0]}". A cell of '
            f'your own names them there, as PartitionSpec("{roles[0]}", "hidden").'
        )
    return found


def map_kernels(layer: Layer, params: Params, function: Callable[[int, jax.Array], jax.Array], *roles: Role) -> Params:
    """The params with `function(index, kernel)` of each kernel whose first axis is one of `roles`.

    The function sees gates as the first axis `[gates, features, ..., units]`, also where a kernel has no such axis, and
    the blocks of a block-diagonal kernel as gates of their own.
    Raises as `kernel_axes`, and a ValueError if the params are not those of the layer.
    """
    kernels = kernel_axes(layer, *roles)
    bare = layer.attach(params, None)  # a memory has no kernels
    leaves, tree = jax.tree.flatten(bare)
    check_count(layer, bare, len(kernels))

    def replace(index, leaf, names):
        if names is None:
            return leaf
        if "gate" not in names:
            return function(index, leaf[None])[0]
        gate = names.index("gate")
        gates = jnp.moveaxis(leaf, gate, 0)
        blocks = gates.reshape(-1, leaf.shape[-1], leaf.shape[-1]) if names[-1] == "unit" else gates
        return jnp.moveaxis(function(index, blocks).reshape(gates.shape), 0, gate)

    replaced = jax.tree.unflatten(tree, map(replace, range(len(leaves)), leaves, kernels))
    return replaced if jax.tree.structure(params) == tree else follow(params, bare, replaced)


def axis_names(layer: Layer) -> list[tuple[str | None, ...]]:
    """For each leaf of the params the names of its axes."""
    specs = jax.tree.leaves(layer.axes(), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return [tuple(spec) for spec in specs]


def check_count(layer: Layer, params: Params, count: int) -> None:
    """Raises ValueError unless the params have so many leaves."""
    if len(jax.tree.leaves(params)) != count:
        if len(jax.tree.leaves(layer.attach(params, None))) == count:
            raise ValueError(f"{layer} got params that hold an attached vector: give those of init.")
        raise ValueError(f"{layer} got params of another layer: {errors.shape_of(params)}.")
