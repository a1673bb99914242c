"""Where arrays stand, when they say in their types how they are sharded (axes of a mesh of type Explicit).

Elementwise sums and products find the sharding of their result by themselves; but choices (`where`), concatenations and
carries of loops want operands that agree, and what a layer makes anew, such as zeros, is on no mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def out_sharding(spec: PartitionSpec, *operands: jax.Array) -> PartitionSpec | None:
    """`spec` for a result of `operands` of which one is sharded by its type; else None, and JAX tells it.

    >>> print(out_sharding(PartitionSpec("data"), jnp.ones(3)))
    None
    """
    is_sharded = any(axis is not None for operand in operands for axis in jax.typeof(operand).sharding.spec)
    return spec if is_sharded else None


def rows(table: jax.Array, index: jax.Array, mode: str | None = None) -> jax.Array:
    """`table[index]`, sharded as the index is and, over what stands in a row, as the table; below 0 is out of range.

    >>> rows(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0])).tolist()
    [[3.0, 4.0], [1.0, 2.0]]
    """
    table = jnp.asarray(table)
    spec = PartitionSpec(*jax.typeof(index).sharding.spec, *jax.typeof(table).sharding.spec[1:])
    placement = out_sharding(spec, index, table)
    return table.at[index].get(mode=mode, wrap_negative_indices=False, out_sharding=placement)


def leading_spec(tree: Any, count: int) -> PartitionSpec:
    """How the first `count` axes of arrays are sharded: each as in the first array that tells."""
    specs = [jax.typeof(leaf).sharding.spec[:count] for leaf in jax.tree.leaves(tree)]
    found = (next((spec[axis] for spec in specs if spec[axis] is not None), None) for axis in range(count))
    return PartitionSpec(*found)


def placed(tree: Any, spec: PartitionSpec) -> Any:
    """Arrays with their first axes sharded as `spec` says, the others as they are; where nothing is sharded, the same.

    What was made before the mesh was set comes onto it.

    >>> zeros = jnp.zeros((2, 3))
    >>> placed(zeros, leading_spec(jnp.ones(2), 1)) is zeros
    True
    """

    is_explicit = bool(jax.sharding.get_abstract_mesh().explicit_axes)

    def leaf(array):
        own = jax.typeof(array).sharding
        wanted = PartitionSpec(*spec, *own.spec[len(spec) :])
        is_placed = own.spec == wanted and not (own.mesh.empty and is_explicit)
        return array if is_placed else jax.sharding.reshard(array, wanted)

    return jax.tree.map(leaf, tree)


def spread(values: jax.Array, like: jax.Array) -> jax.Array:
    """`values` broadcast to the shape of `like`, and sharded as that is.

    >>> spread(jnp.array([1.0, 2.0]), jnp.zeros((2, 2))).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    return placed(jnp.broadcast_to(values, like.shape), jax.typeof(like).sharding.spec)
