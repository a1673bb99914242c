"""The state of any cell as a vector, and the Jacobian of its step, row by row of the batch."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.cells.pointwise import differs_under_vmap
from jaxseq.core import errors
from jaxseq.core.sharding import spread
from jaxseq.core.unroll import Run
from jaxseq.core.wrapper import Reader


class Beside(NamedTuple):
    """The params of a cell with what else an `Accompanied` cell reads."""

    cell: Any
    more: Any


class Accompanied(Reader):
    """A cell whose params come as `Beside`, with arrays that its unroll reads; private to this package."""

    def inner(self, params: Beside) -> Any:
        return params.cell

    def draw(self, params: Beside, key: Array) -> Beside:
        return params._replace(cell=self.cell.draw(params.cell, key))

    def attach(self, params: Beside, memory: Any, mask: Any = None) -> Beside:
        return params._replace(cell=self.cell.attach(params.cell, memory, mask))


def is_floating(leaf: Any) -> bool:
    """Whether an array holds real floating numbers, which have derivatives."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def check_real(name: str, tree: Any) -> None:
    """Raises TypeError if complex numbers would be taken for constants."""
    if any(jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"Derivatives are those of real numbers, but the {name} holds complex ones: {errors.shape_of(tree)}. Hold "
            "their real and imaginary parts as arrays of their own."
        )


def flatten(state: Any, batch_rank: int) -> tuple[Float[Array, "*batch units"], Callable[[Array], Any]]:
    """The floating numbers of a state in one axis, and the way back, which gives the other arrays as they were."""
    check_real("state", state)
    leaves, tree = jax.tree.flatten(state)
    floating = [leaf for leaf in leaves if is_floating(leaf)]
    if not floating:
        raise TypeError(f"A state without floating numbers has no derivatives: {tree}.")
    dtype = functools.reduce(jnp.promote_types, [leaf.dtype for leaf in floating])
    sizes = [math.prod(leaf.shape[batch_rank:]) for leaf in floating]
    parts = [
        leaf.astype(dtype).reshape(*leaf.shape[:batch_rank], size) for leaf, size in zip(floating, sizes, strict=True)
    ]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[-1])

    def unflatten(vector: Array) -> Any:
        cut = iter(zip(ends, ends[1:], strict=False))

        def back(leaf):
            begin, end = next(cut)
            return vector[..., begin:end].reshape(*vector.shape[:-1], *leaf.shape[batch_rank:]).astype(leaf.dtype)

        return jax.tree.unflatten(tree, [back(leaf) if is_floating(leaf) else leaf for leaf in leaves])

    return jnp.concatenate(parts, axis=-1), unflatten


def on_vectors(step: Callable[[Any], tuple[Any, Any]], state: Any, batch_rank: int) -> tuple[Callable, Array]:
    """A step `state -> (state, y)` as a function of the state's vector to the next vector, and the vector."""
    vector, unflatten = flatten(state, batch_rank)
    return lambda vector: flatten(step(unflatten(vector))[0], batch_rank)[0], vector


def jacobian(function: Callable[[Array], Array], vector: Float[Array, "*batch units"]) -> Array:
    """The Jacobians `[*batch, units', units]` of a function of vectors whose rows do not know of each other."""
    _, push = jax.linearize(function, vector)
    basis = jnp.eye(vector.shape[-1], dtype=vector.dtype)
    return jax.vmap(lambda direction: push(spread(direction, vector)), out_axes=-1)(basis)


def over_time(function: Callable[..., Any], run: Run) -> Callable[..., Any]:
    """A function of one step's arrays as one of those of all steps: at once where that draws the same noise."""
    if run.keys is not None and differs_under_vmap(run.keys):
        return lambda *sequences: jax.lax.map(lambda arrays: function(*arrays), sequences)
    return jax.vmap(function)
