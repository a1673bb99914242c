"""How the states of a cell change with its params, carried from step to step: what `jaxseq.gradients.online` sums."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxseq.core import errors
from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.equations import evaluate, variables
from jaxseq.core.precision import widen
from jaxseq.gradients.jacobians import check_real, flatten, is_floating, jacobian, on_vectors
from jaxseq.gradients.units import Dependence, Program, Units, dependences, program

Reach = Literal["none", "unit", "all"]
At = Callable[[tuple[int, ...]], Callable[..., Any]]  # a step (params, state, inputs, key) for a batch shape


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
        return len(self.batch_shape)


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
    shapes = {leaf.shape[len(batch_shape) :] for leaf in _floating(state)}
    size = math.prod(*shapes) if len(shapes) == 1 and len(next(iter(shapes))) == 1 else None
    floats = _floating(params)
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
        step = program(
            lambda params, state, x, key: (
                cell.initial_state(params, batch_shape),
                cell.step(params, state, x, key)[0],
            ),
            *(params, state, x, key),
        )
        step = step._replace(outputs=[atom for atom in step.outputs if is_floating(atom.aval)])
        count = len(kinds)
        units = [var for var in step.inputs[count : count + len(jax.tree.leaves(state))] if is_floating(var.aval)]
        last = len(batch_shape)
        if diagonal:
            sources: dict[Any, Dependence] = dict.fromkeys(units, Units(last))
            found = dependences(step, sources, size, own=by_products)[0]  # pyright: ignore[reportArgumentType]
            diagonal = {_reach(each, last) for each in found} <= {"none", "unit"}
        for var, reach in zip(filter(lambda var: is_floating(var.aval), step.inputs[:count]), reaches, strict=True):
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


def _states_of(cell: Cell, batch_shape: tuple[int, ...]) -> Callable[..., Any]:
    """The state that a cell starts with, and that after a step."""
    return lambda params, *arguments: (cell.initial_state(params, batch_shape), cell.step(params, *arguments)[0])


def _reach(dependence: Dependence, last: int) -> Reach:
    if dependence is None:
        return "none"
    return "unit" if isinstance(dependence, Units) and dependence.axis == last else "all"


def _check_snap1(cell: Cell, params: Params, state: State, size: int | None, diagonal: bool, reach: tuple) -> None:
    if size is None or not all(
        leaf.ndim and leaf.shape[-1] % size == 0
        for leaf, each in zip(_floating(params), reach, strict=True)
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


def initial(form: Form, cell: Cell, params: Params) -> list[Array | None]:
    """How the initial state changes with the params."""
    state = cell.initial_state(params, form.batch_shape)

    def at(batch_shape):
        return lambda params, state, inputs, key: (cell.initial_state(params, batch_shape), None)

    now = derivatives(form, at, params, state, None, None)[1]
    return [None if leaf is None else widen(leaf) for leaf in now]  # small changes of long sums are not lost


def derivatives(
    form: Form, at: At, params: Params, state: State, inputs: Any, key: Array | None
) -> tuple[Array, list[Array | None]]:
    """How the state after a step changes with the one before, and with the params of that step."""
    floats, rebuild = floats_of(params)
    now: list[Array | None] = [None] * len(floats)
    everywhere = [index for index, each in enumerate(form.reach) if each == "all"]
    step = at(form.batch_shape)
    if everywhere:

        def of_params(chosen):
            changed = list(floats)
            for index, leaf in zip(everywhere, chosen, strict=True):
                changed[index] = leaf
            return flatten(step(rebuild(changed), state, inputs, key)[0], form.rank)[0]

        for index, leaf in zip(everywhere, jax.jacfwd(of_params)([floats[i] for i in everywhere]), strict=True):
            now[index] = leaf
    if form.size is None:
        return jacobian(*on_vectors(lambda state: step(params, state, inputs, key), state, form.rank)), now
    local, own = _own(form, at, params, state, inputs, key)
    for index, leaf in own.items():
        now[index] = leaf
    return local, now


def push(form: Form, local: Array, influence: list[Array | None], now: list[Array | None]) -> list[Array | None]:
    """The influence after a step: what is before it, through the Jacobian, and what the step's own params add."""
    rank = form.rank

    def each(reach, before, now):
        if reach == "none":
            return None
        through, count = local.astype(before.dtype), math.prod(before.shape[rank + 1 :])
        if form.size is None:
            pushed = through @ before.reshape(*before.shape[: rank + 1], count)
        elif reach == "unit":
            rows = before.reshape(*before.shape[: rank + 1], count // form.size, form.size)
            pushed = jnp.einsum("...abu,...bru->...aru", through, rows)
        else:
            rows = before.reshape(*before.shape[:rank], before.shape[rank] // form.size, form.size, count)
            pushed = jnp.einsum("...abu,...bur->...aur", through, rows)
        return pushed.reshape(before.shape) + now.astype(before.dtype)

    return list(map(each, form.reach, influence, now))


def contract(form: Form, of_state: Array, influence: list[Array | None]) -> list[Array | int]:
    """The gradients with respect to the params from that with respect to the vector of the state."""
    rank = form.rank

    def each(reach, influence):
        if reach == "none":
            return 0
        slopes = of_state.astype(influence.dtype)
        if reach == "all":
            axes = list(range(rank + 1))
            return jnp.tensordot(slopes, influence, (axes, axes))
        units = slopes.reshape(*influence.shape[: rank + 1], 1, form.size)
        count = math.prod(influence.shape[rank + 1 :])
        rows = influence.reshape(*influence.shape[: rank + 1], count // form.size, form.size)
        return (units * rows).sum(axis=tuple(range(rank + 1))).reshape(influence.shape[rank + 1 :])

    return list(map(each, form.reach, influence))


def _own(
    form: Form, at: At, params: Params, state: State, inputs: Any, key: Array | None
) -> tuple[Array, dict[int, Array]]:
    """Of each unit the derivatives `[*batch, arrays, arrays, units]`, and `[*batch, arrays, *param]`.

    One backward pass for each array of the state, row by row: what comes back from the sum of all units is to each
    unit, and to the params that belong to it, what that unit alone gives.
    """
    rank, size = form.rank, form.size or 1
    row, groups = _traced(at, (1,) * rank, params, state, inputs, key)
    units = [var for var in groups[1] if is_floating(var.aval)]
    sources: dict[Any, Dependence] = dict.fromkeys(units, Units(rank))
    products = dependences(row, sources, size, own=form.by_products)[1]
    shared = dict(zip([*groups[0], *groups[3]], jax.tree.leaves((params, key)), strict=True))
    by_row = dict(zip([*groups[1], *groups[2]], jax.tree.leaves((state, inputs)), strict=True))
    if rank and any(map(_is_key, shared)):
        whole, (of_params, _, _, of_key) = _traced(at, form.batch_shape, params, state, inputs, key)
        given = dict(zip([*of_params, *of_key], shared.values(), strict=True))
        for var, value in _noise(row, shared, whole, given, form.batch_shape):
            (shared if value.shape == var.aval.shape else by_row)[var] = value

    floats = [var for var in groups[0] if is_floating(var.aval)]
    own = [index for index, each in enumerate(form.reach) if each == "unit"]
    dtype = functools.reduce(jnp.promote_types, [var.aval.dtype for var in units])

    def advance(slopes, state, rest):
        values = [*zip(units, state, strict=True), *zip(others, rest, strict=True)]
        rows = {var: jnp.expand_dims(leaf, tuple(range(rank))) for var, leaf in values}
        changed = {floats[index]: leaf for index, leaf in zip(own, slopes, strict=True)}
        outputs = row.run({**shared, **rows, **changed}, products, size)
        return jnp.stack([leaf.reshape(size).astype(dtype) for leaf in outputs if is_floating(leaf)])

    def pulled(state, rest):
        chosen = [shared[floats[index]] for index in own]
        _, pull = jax.vjp(lambda slopes, state: advance(slopes, state, rest), chosen, state)
        each = jnp.eye(len(units), dtype=dtype)[:, :, None]
        return jax.vmap(pull)(jnp.broadcast_to(each, (*each.shape[:2], size)))

    others = [var for var in by_row if var not in units]
    for _ in range(rank):
        pulled = jax.vmap(pulled)
    of_params, of_state = pulled([by_row[var] for var in units], [by_row[var] for var in others])
    local = jnp.stack([each.astype(dtype) for each in of_state], axis=rank + 1)
    return local, dict(zip(own, of_params, strict=True))


def _traced(at: At, batch_shape: tuple[int, ...], params: Params, state: State, inputs: Any, key: Any) -> Any:
    """The new state of a step as a program for a batch of another shape, and its inputs by the arguments."""
    rank, step = len(batch_shape), at(batch_shape)

    def like(leaf):
        return jax.ShapeDtypeStruct((*batch_shape, *leaf.shape[rank:]), leaf.dtype)

    arguments = params, *jax.tree.map(like, (state, inputs)), key
    found = program(lambda *arguments: step(*arguments)[0], *arguments)
    ends = np.cumsum([len(jax.tree.leaves(each)) for each in arguments])
    return found, [found.inputs[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _noise(row: Program, row_keys: Any, whole: Program, given: dict, batch_shape: tuple[int, ...]) -> Any:
    """The random numbers of a batch as variables of the step of one row, with their values."""
    rank = len(batch_shape)
    drawn, _ = _drawn(row, row_keys)
    named, equations = _drawn(whole, given)
    values = evaluate(equations, {**whole.constants, **given})
    for var, name in zip(drawn, named, strict=len(drawn) == len(named)):
        if _is_key(var) or name.aval.shape not in (var.aval.shape, (*batch_shape, *var.aval.shape[rank:])):
            named = []
    if len(drawn) != len(named):
        raise TypeError(
            "The noise of each row cannot be told from that of the others: learn from one row at a time, by vmap over "
            "the rows and their keys."
        )
    return [(var, values[name]) for var, name in zip(drawn, named, strict=True)]


def _drawn(program: Program, given: Any) -> tuple[list[Any], list[Any]]:
    """What other equations read that is computed from keys alone, in order, and the equations that compute it."""
    free, keyed, equations, read = set(program.constants), {var for var in given if _is_key(var)}, [], {}
    for equation in program.equations:
        operands = set(variables(equation.invars))
        if operands <= free:
            free.update(equation.outvars)
            equations.append(equation)
        elif operands <= free | keyed:
            keyed.update(equation.outvars)
            equations.append(equation)
        else:
            read.update(dict.fromkeys(var for var in variables(equation.invars) if var in keyed))
    read.update(dict.fromkeys(var for var in variables(program.outputs) if var in keyed))
    return list(read), equations


def _is_key(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key)


def _floating(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]


def floats_of(params: Params) -> tuple[list[Any], Callable[[Sequence[Any]], Params]]:
    """The floating arrays of the params, and the params with others in their place."""
    leaves, tree = jax.tree.flatten(params)

    def rebuild(floats):
        new = iter(floats)
        return jax.tree.unflatten(tree, [next(new) if is_floating(leaf) else leaf for leaf in leaves])

    return _floating(params), rebuild
