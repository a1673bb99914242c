"""How the states of a cell change with its params, carried from step to step: what `jaxseq.gradients.online` sums."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.equations import evaluate, variables
from jaxseq.core.precision import widen
from jaxseq.core.sharding import out_sharding
from jaxseq.gradients.forms import Form, floating
from jaxseq.gradients.jacobians import flatten, is_floating, jacobian, on_vectors
from jaxseq.gradients.units import Dependence, Program, Units, dependences, tangents

At = Callable[[tuple[int, ...]], Callable[..., Any]]  # a step (params, state, inputs, key) for a batch shape


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
    rank, size = form.rank, form.size

    def each(reach, before, now):
        if reach == "none":
            return None
        through, count = local.astype(before.dtype), math.prod(before.shape[rank + 1 :])
        if size is None:
            pushed = through @ before.reshape(*before.shape[: rank + 1], count)
        elif reach == "unit":
            rows = before.reshape(*before.shape[: rank + 1], count // size, size)
            pushed = jnp.einsum("...abu,...bru->...aru", through, rows)
        else:
            rows = before.reshape(*before.shape[:rank], before.shape[rank] // size, size, count)
            pushed = jnp.einsum("...abu,...bur->...aur", through, rows)
        return pushed.reshape(before.shape) + now.astype(before.dtype)

    return list(map(each, form.reach, influence, now))


def contract(form: Form, of_state: Array, influence: list[Array | None]) -> list[Array | int]:
    """The gradients with respect to the params from that with respect to the vector of the state."""
    rank, size = form.rank, form.size or 1

    def each(reach, influence):
        if reach == "none":
            return 0
        slopes = of_state.astype(influence.dtype)
        if reach == "all":
            axes = list(range(rank + 1))
            whole = out_sharding(PartitionSpec(), slopes, influence)
            return jnp.tensordot(slopes, influence, (axes, axes), out_sharding=whole)
        units = slopes.reshape(*influence.shape[: rank + 1], 1, size)
        count = math.prod(influence.shape[rank + 1 :])
        rows = influence.reshape(*influence.shape[: rank + 1], count // size, size)
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
    row, given, (params_dots, units) = _traced(form, at, (1,) * rank, params, state, inputs, key)
    sources: dict[Any, Dependence] = dict.fromkeys(units, Units(rank))
    products = dependences(row, sources, size, own=form.by_products)[1]
    chosen = [floating(params)[index] for index in form.own]
    shared = dict(zip([*given[0], *given[2], *given[4]], jax.tree.leaves((chosen, params, key)), strict=True))
    by_row = dict(zip([*given[1], *given[3]], jax.tree.leaves((state, inputs)), strict=True))
    if rank and any(map(_is_key, shared)):
        whole, by_batch, _ = _traced(form, at, form.batch_shape, params, state, inputs, key)
        same = dict(zip([*by_batch[0], *by_batch[2], *by_batch[4]], shared.values(), strict=True))
        for var, value in _noise(row, shared, whole, same, form.batch_shape):
            (shared if value.shape == var.aval.shape else by_row)[var] = value

    dtype = functools.reduce(jnp.promote_types, [var.aval.dtype for var in units])

    def advance(slopes, dots, rows):
        given = [*zip(by_row, rows, strict=True), *zip(units, dots, strict=True)]
        expanded = {var: jnp.expand_dims(leaf, tuple(range(rank))) for var, leaf in given}
        values = {**shared, **expanded, **dict(zip(params_dots, slopes, strict=True))}
        return jnp.stack([leaf.reshape(size).astype(dtype) for leaf in row.run(values, products, size)])

    def pulled(rows):
        at_params = [jnp.zeros(var.aval.shape, var.aval.dtype) for var in params_dots]
        at_state = [jnp.zeros(size, var.aval.dtype) for var in units]
        _, pull = jax.vjp(lambda slopes, dots: advance(slopes, dots, rows), at_params, at_state)
        each = jnp.eye(len(units), dtype=dtype)[:, :, None]
        return jax.vmap(pull)(jnp.broadcast_to(each, (*each.shape[:2], size)))

    for _ in range(rank):
        pulled = jax.vmap(pulled)
    of_params, of_state = pulled(list(by_row.values()))
    local = jnp.stack([each.astype(dtype) for each in of_state], axis=rank + 1)
    return local, dict(zip(form.own, of_params, strict=True))


def _traced(
    form: Form, at: At, batch_shape: tuple[int, ...], params: Any, state: Any, inputs: Any, key: Any
) -> tuple[Program, list[list[Any]], list[list[Any]]]:
    """The tangents of the new state of a step, as a program for a batch of another shape, and its inputs.

    These are the params that change a unit each, the state, all params, the inputs and the key; and the tangents of
    the first two.
    """
    rank, step = len(batch_shape), at(batch_shape)

    def of(given, params, inputs, key):
        floats, rebuild = floats_of(params)
        for index, leaf in zip(form.own, given[0], strict=True):
            floats[index] = leaf
        return step(rebuild(floats), given[1], inputs, key)[0]

    def like(leaf):
        return jax.ShapeDtypeStruct((*batch_shape, *leaf.shape[rank:]), leaf.dtype)

    state, inputs = jax.tree.map(like, (state, inputs))
    chosen = [floating(params)[index] for index in form.own]
    found = tangents(of, (chosen, state), params, inputs, key)
    left = iter(found.inputs)
    counts = [len(jax.tree.leaves(each)) for each in (chosen, state, params, inputs, key)]
    groups = [list(itertools.islice(left, count)) for count in (*counts, len(chosen), len(floating(state)))]
    return found, groups[:5], groups[5:]


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


def floats_of(params: Params) -> tuple[list[Any], Callable[[Sequence[Any]], Params]]:
    """The floating arrays of the params, and the params with others in their place."""
    leaves, tree = jax.tree.flatten(params)

    def rebuild(floats):
        new = iter(floats)
        return jax.tree.unflatten(tree, [next(new) if is_floating(leaf) else leaf for leaf in leaves])

    return floating(params), rebuild
