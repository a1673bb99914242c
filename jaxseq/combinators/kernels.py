"""Reaching the kernels of any cell by the names of their axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxseq.core.cell import Cell


def map_kernels(function: Callable[[Any], Any], cell: Cell, params: Any, names: tuple[str, ...]) -> Any:
    """`params`, or a tree beside them, with `function` of each leaf whose first axis is one of `names` in `axes()`."""
    specs = jax.tree.leaves(cell.axes(), is_leaf=_is_spec)
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_spec)
    chosen = zip(leaves, specs, strict=True)
    return jax.tree.unflatten(tree, [function(leaf) if _named(spec, names) else leaf for leaf, spec in chosen])


def check_kernels(wrapper: Cell, cell: Cell, names: tuple[str, ...]) -> None:
    """Raises TypeError unless the cell has such kernels."""
    if not any(_named(spec, names) for spec in jax.tree.leaves(cell.axes(), is_leaf=_is_spec)):
        kernels = " or ".join(f'"{name}"' for name in names)
        raise TypeError(
            f"{type(wrapper).__name__} changes kernels, but {cell} has none: no array has {kernels} as its first "
            "axis in axes()."
        )


def _named(spec: PartitionSpec, names: tuple[str, ...]) -> bool:
    return len(spec) > 0 and spec[0] in names


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
