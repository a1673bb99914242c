"""What the influences of params on a cell's state look like, found in the equations of its step."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxseq.core import errors
from jaxseq.core.cell import Cell, Params, State
from jaxseq.gradients.jacobians import check_real, flatten, is_floating
from jaxseq.gradients.units import Dependence, Units, dependences, tangents

Reach = Literal["none", "unit", "all"]


class Form(NamedTuple):
    """What a cell's influences look like.

    `size` is the number of units of each array of the state where a unit counts for itself alone, and None where the
    Jacobian is dense. `reach` says of each floating array of the params what it changes: no state ("none"), of each
    entry the unit that is its last axis ("unit"), or any.
    """

    batch_shape: tuple[int, ...]
    size: int | None
    reach: tuple[Reach, ...]
    by_products: bool  # SnAp-1: units do read each other, of which their own part is kept

    @property
    def rank(self) -> int:
        """The number of batch axes."""
        return len(self.batch_shape)

    @property
    def own(self) -> list[int]:
        """The positions of the floating arrays of the params of which each entry changes one unit."""
        return [index for index, each in enumerate(self.reach) if each == "unit"]


def form_of(cell: Cell, params: Params, batch_shape: tuple[int, ...], method: Any) -> Form:
    """The smallest form that is right for a cell, found in the equations of its step."""
    if method not in ("rtrl", "snap1"):
        raise ValueError(f'The method of online learning is "rtrl" or "snap1", got {method!r}.')
    check_real("params", params)
    leaves, tree = jax.tree.flatten(params)
    kinds = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _form(cell, tree, kinds, batch_shape, method)


@functools.lru_cache(maxsize=256)
def _form(cell: Cell, tree: Any, kinds: tuple, batch_shape: tuple[int, ...], method: str) -> Form:
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*kind) for kind in kinds])
    state = jax.eval_shape(lambda params: cell.initial_state(params, batch_shape), params)
    jax.eval_shape(lambda state: flatten(state, len(batch_shape))[0], state)  # raises if there are no derivatives
    shapes = {leaf.shape[len(batch_shape) :] for leaf in floating(state)}
    size = math.prod(*shapes) if len(shapes) == 1 and len(next(iter(shapes))) == 1 else None
    floats = floating(params)
    dense = Form(batch_shape, None, ("all",) * len(floats), False)
    try:
        x = jax.eval_shape(lambda params: cell.zero_input(params, batch_shape), params)
    except TypeError:  # the cell does not tell its inputs
        if method == "snap1":
            raise
        return dense
    by_products = method == "snap1"
    diagonal, reaches = size is not None, [{"none"} for _ in floats]
    for key in (None, jax.eval_shape(jax.random.key, 0)):

        def states(given, x, key):
            return cell.initial_state(given[0], batch_shape), cell.step(given[0], given[1], x, key)[0]

        step = tangents(states, (params, state), x, key)
        ends = step.inputs[-len(floats) - len(floating(state)) :]
        last = len(batch_shape)
        if diagonal:
            sources: dict[Any, Dependence] = dict.fromkeys(ends[len(floats) :], Units(last))
            found = dependences(step, sources, size, own=by_products)[0]  # pyright: ignore[reportArgumentType]
            diagonal = {_reach(each, last) for each in found} <= {"none", "unit"}
        for var, reach in zip(ends[: len(floats)], reaches, strict=True):
            shape = var.aval.shape
            unit = size is not None and shape and shape[-1] % size == 0
            source: Dependence = Units(len(shape) - 1) if unit else "all"
            reach |= {_reach(each, last) for each in dependences(step, {var: source}, size or 1)[0]}
    reach = tuple(max(each, key=("none", "unit", "all").index) for each in reaches)
    if by_products:
        _check_snap1(cell, params, state, size, diagonal, reach)
    if not diagonal:
        return dense._replace(reach=tuple("none" if each == "none" else "all" for each in reach))
    return Form(batch_shape, size, reach, by_products)  # pyright: ignore[reportArgumentType]


def _reach(dependence: Dependence, last: int) -> Reach:
    if dependence is None:
        return "none"
    return "unit" if isinstance(dependence, Units) and dependence.axis == last else "all"


def _check_snap1(cell: Cell, params: Params, state: State, size: int | None, diagonal: bool, reach: tuple) -> None:
    if size is None or not all(
        leaf.ndim and leaf.shape[-1] % size == 0
        for leaf, each in zip(floating(params), reach, strict=True)
        if each != "none"
    ):
        raise TypeError(
            "snap1 needs params and a state whose last axis is the units, but the params are "
            f"{errors.shape_of(params)} and the state {errors.shape_of(state)}: use rtrl, or put what reads the cell's "
            f"output into the loss. The cell is {cell}."
        )
    if not diagonal or "all" in reach:
        raise TypeError(
            "snap1 needs a cell where one step's new state of a unit depends on the params of that unit alone, but "
            f"units mix within a step: use rtrl. The cell is {cell}."
        )


def floating(tree: Any) -> list[Any]:
    """The floating arrays of a tree."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]


def check_influence(form: Form, params: Params, state: State, influence: list[Array | None]) -> None:
    """Raises ValueError unless the influence has the form."""
    arrays, numbers = len(floating(state)), sum(math.prod(leaf.shape[form.rank :]) for leaf in floating(state))
    expected = [
        None if reach == "none" else (*form.batch_shape, numbers if reach == "all" else arrays, *leaf.shape)
        for reach, leaf in zip(form.reach, floating(params), strict=True)
    ]
    if [None if leaf is None else leaf.shape for leaf in influence] != expected:
        raise ValueError(
            f"The carry has influences of another cell or method, {errors.shape_of(influence)}; it needs arrays of the "
            f"shapes {expected}: start, and go on, with the same cell, batch axes and method."
        )
