"""The kernels of a layer, found by the names that `axes()` gives their axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxseq.core import errors
from jaxseq.core.cell import Params, SequenceLayer


def axis_names(layer: SequenceLayer, params: Params) -> list[tuple[str | None, ...]]:
    """The names of the axes of each leaf of the params.

    Raises:
        ValueError: if the params are not those of the layer.
    """
    specs = jax.tree.leaves(layer.axes(), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    if len(specs) != len(jax.tree.leaves(params)):
        raise ValueError(f"{layer} got params of another layer: {errors.shape_of(params)}.")
    return [tuple(spec) for spec in specs]


def map_kernels(
    layer: SequenceLayer, params: Params, role: str, function: Callable[[int, jax.Array], jax.Array]
) -> Params:
    """The params with `function(index, kernel)` of each kernel whose first axis is the role, "input" or "recurrent".

    The function sees gates as the first axis `[gates, features, ..., units]`, also where a kernel has no such axis.

    Raises:
        ValueError: if the role is another, or the params are not those of the layer.
        TypeError: if the layer has no such kernel.
    """
    if role not in ("input", "recurrent"):
        raise ValueError(f'The role of a kernel is "input" or "recurrent", got {role!r}.')
    names = axis_names(layer, params)
    chosen = [len(axes) > 1 and axes[0] == role for axes in names]
    if not any(chosen):
        raise TypeError(
            f'{layer} has no {role} kernel: no array of its axes() begins with "{role}". A cell of your own names them '
            f'there, as PartitionSpec("{role}", "hidden").'
        )
    leaves, tree = jax.tree.flatten(params)

    def replace(index, kernel):
        if "gate" not in names[index]:
            return function(index, kernel[None])[0]
        gate = names[index].index("gate")
        return jnp.moveaxis(function(index, jnp.moveaxis(kernel, gate, 0)), 0, gate)

    new = [
        replace(i, leaf) if is_chosen else leaf for i, (leaf, is_chosen) in enumerate(zip(leaves, chosen, strict=True))
    ]
    return jax.tree.unflatten(tree, new)


def kernel_mask(layer: SequenceLayer, params: Params) -> Any:
    """True for each kernel of the params, what has an axis "input" or "recurrent": not for biases, gains, embeddings.

    Raises:
        ValueError: if the params are not those of the layer.
        TypeError: if the layer has no kernel.
    """
    flags = [not {"input", "recurrent"}.isdisjoint(names) for names in axis_names(layer, params)]
    if not any(flags):
        raise TypeError(f'{layer} has no kernel: no array of its axes() has an axis "input" or "recurrent".')
    return jax.tree.unflatten(jax.tree.structure(params), flags)
