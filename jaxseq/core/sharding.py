"""Where the results of products stand, when arrays say in their types how they are sharded."""

import jax
from jax.sharding import PartitionSpec


def out_sharding(spec: PartitionSpec, *operands: jax.Array) -> PartitionSpec | None:
    """`spec` for a result of `operands` of which one is sharded by its type; else None, and JAX tells it.

    >>> import jax.numpy as jnp
    >>> print(out_sharding(PartitionSpec("data"), jnp.ones(3)))
    None
    """
    is_sharded = any(axis is not None for operand in operands for axis in jax.typeof(operand).sharding.spec)
    return spec if is_sharded else None
