"""Which units a step's tangents come from, read from their equations, and derivatives that make use of it.

A diagonal recurrence is one where the tangent of each unit of the new state depends on that of the same unit alone.
Then one pass with the tangents of all units gives the derivatives of each, where in general each unit takes a pass of
its own. It is the equations of tangents that tell, not those of values: a function may have a derivative of its own
that mixes units where its values do not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxseq.core.equations import apply, inline, read, variables
from jaxseq.gradients.jacobians import is_floating

# what is linear in tangents, number by number
_POINTWISE = frozenset(
    "add add_any sub mul div neg select_n convert_element_type reduce_precision copy real imag complex conj "
    "sharding_constraint reshard pvary optimization_barrier".split()
)


class Units(NamedTuple):
    """A dependence on units, n of them: what has the index i along `axis` depends on unit i mod n alone.

    `read` says that it does so through a product that reads other units too, of which only the own part counts.
    """

    axis: int
    read: bool = False


Dependence = Any  # Units, "all" for any of them, or None


class Own(NamedTuple):
    """A product of all units with a kernel: the operand that holds units, and two axes of the kernel.

    The entries of the kernel where they have the same unit are what a unit reads of itself.
    """

    side: int
    contracted: int
    free: int


class Program(NamedTuple):
    """The equations of a function, those of its inner `jit`s in their place."""

    constants: dict[Any, Any]
    inputs: list[Any]
    equations: list[Any]
    outputs: list[Any]

    def run(self, values: Mapping[Any, Any], own: Mapping[int, Own], size: int) -> list[Any]:
        """The outputs, given the values of inputs or of what is computed from them.

        The products in `own`, by the ids of their equations, are what each of `size` units reads of itself.
        """
        values = {**self.constants, **values}
        for equation in self.equations:
            if all(var in values for var in equation.outvars):
                continue
            operands = [read(values, atom) for atom in equation.invars]
            if id(equation) in own:
                results = [_own_product(equation, own[id(equation)], size, operands)]
            else:
                results = apply(equation, operands)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(values, atom) for atom in self.outputs]


def program(function: Callable, *arguments: Any) -> Program:
    """The equations of a function of trees of arrays, or of their shapes."""
    traced = jax.make_jaxpr(function)(*arguments)
    equations, outputs = inline(traced.jaxpr)
    constants = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    return Program(constants, traced.jaxpr.invars, equations, outputs)


def tangents(function: Callable, tree: Any, *others: Any) -> Program:
    """The equations of the tangents of the floating results of `function(tree, *others)`, given those of the tree.

    The inputs are the leaves of all arguments, and then the tangents of the tree's floating leaves.
    """
    leaves, structure = jax.tree.flatten(tree)
    where = [index for index, leaf in enumerate(leaves) if is_floating(leaf)]

    def push(leaves, others, dots):
        def of_floats(*floats):
            changed = list(leaves)
            for index, leaf in zip(where, floats, strict=True):
                changed[index] = leaf
            results = function(jax.tree.unflatten(structure, changed), *others)
            return list(filter(is_floating, jax.tree.leaves(results)))

        return jax.jvp(of_floats, [leaves[index] for index in where], dots)[1]

    return program(push, leaves, others, [leaves[index] for index in where])


def dependences(
    program: Program, sources: Mapping[Any, Dependence], size: int, *, own: bool = False
) -> tuple[list[Dependence], dict[int, Own]]:
    """How the outputs depend on `size` units, the sources being given; never less than they do.

    With `own` a product that sums over the units, once on the way to an output, counts as if each unit read of it what
    it gives to itself; these products come second.
    """
    found: dict[int, Own] | None = {} if own else None
    known = _follow(program.equations, dict(sources), size, found)
    return [None if isinstance(atom, core.Literal) else known.get(atom) for atom in program.outputs], (found or {})


def diagonal(step: Callable[[Any], Any], state: Any, batch_rank: int) -> Any:
    """The derivative of each floating number of the new state with respect to itself in the state before.

    Of an array of units that reaches itself unit by unit, or by one product with a kernel, it takes one push of a
    perturbation through the step; of another array one for each of its numbers.
    """
    leaves, tree = jax.tree.flatten(state)
    found = list(leaves)
    for index, leaf in enumerate(leaves):
        if not is_floating(leaf):
            continue
        shape = leaf.shape[batch_rank:]
        size = math.prod(shape)

        def advance(leaf, index=index):
            return jax.tree.leaves(step(jax.tree.unflatten(tree, [*leaves[:index], leaf, *leaves[index + 1 :]])))[index]

        traced = tangents(advance, leaf)
        source: Dependence = Units(batch_rank) if len(shape) == 1 else "all"
        (reached,), own = dependences(traced, {traced.inputs[-1]: source}, size, own=True)
        if reached is None or _axis(reached) == batch_rank:
            values = dict(zip(traced.inputs, [leaf, jnp.ones_like(leaf)], strict=True))
            (found[index],) = traced.run(values, own, size)
            continue
        _, push = jax.linearize(advance, leaf)

        def entry(unit, push=push, leaf=leaf, shape=shape, size=size):
            one_hot = jnp.where(jnp.arange(size) == unit, 1, 0).astype(leaf.dtype).reshape(shape)
            pushed = push(jnp.broadcast_to(one_hot, leaf.shape))
            return pushed.reshape(*leaf.shape[:batch_rank], size)[..., unit]

        entries = jnp.moveaxis(lax.map(entry, jnp.arange(size)), 0, -1)
        found[index] = entries.reshape(leaf.shape)
    return jax.tree.unflatten(tree, found)


def _axis(dependence: Dependence) -> int | None:
    return dependence.axis if isinstance(dependence, Units) else None


def _follow(
    equations: Sequence[Any], known: dict[Any, Any], size: int, own: dict[int, Own] | None
) -> dict[Any, Dependence]:
    for equation in equations:
        operands = [known.get(atom) if variables([atom]) else None for atom in equation.invars]
        if any(operand is not None for operand in operands):
            results = _rule(equation, operands, size, own)
            known.update(zip(equation.outvars, results, strict=True))
    return known


def _rule(equation: Any, operands: Sequence[Any], size: int, own: dict[int, Own] | None) -> Sequence[Dependence]:
    """How the results of an equation depend on units, given its operands; "all" where nothing is known."""
    name, parameters = equation.primitive.name, equation.params
    everything: list[Any] = ["all"] * len(equation.outvars)
    if name in ("jit", "pjit", "closed_call"):
        return _inside(parameters["jaxpr" if "jaxpr" in parameters else "call_jaxpr"].jaxpr, operands, size)
    if name in ("checkpoint", "remat2"):
        return _inside(parameters["jaxpr"], operands, size)
    if "all" in operands:
        return everything
    if name in _POINTWISE:
        return [_join(operands)] * len(everything) if _same_rank(equation, operands) else everything
    if name == "dot_general":
        return [_product(equation, operands, size, own)]
    if name == "concatenate":
        joined = _join(operands)
        along = isinstance(joined, Units) and joined.axis == parameters["dimension"]
        whole = all(atom.aval.shape[parameters["dimension"]] % size == 0 for atom in equation.invars)
        return [joined] if whole or not along else everything
    if any(operand is not None for operand in operands[1:]):  # what is written, looked up or branches
        return everything
    moved = _moved(equation, operands[0], size)
    return everything if moved is None else [operands[0]._replace(axis=moved)] * len(everything)


def _moved(equation: Any, units: Units, size: int) -> int | None:
    """The axis of units in the results of an equation that moves or sums numbers; None if they mix."""
    name, parameters, axis = equation.primitive.name, equation.params, units.axis
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        moved = parameters["broadcast_dimensions"][axis]
        return moved if after[moved] == before[axis] else None
    if name == "reshape" and parameters["dimensions"] is None:
        return _reshaped(before, after, axis, size)
    if name == "transpose":
        return parameters["permutation"].index(axis)
    if name == "slice":
        strides = parameters["strides"] or (1,) * len(before)
        begin, whole = parameters["start_indices"][axis] % size == 0, after[axis] % size == 0
        return axis if begin and whole and strides[axis] == 1 else None
    if name == "split":
        whole = all(part % size == 0 for part in parameters["sizes"])
        return axis if whole or parameters["axis"] != axis else None
    gone = {
        "squeeze": parameters.get("dimensions", ()),
        "unstack": (parameters.get("axis"),),
        "reduce_sum": parameters.get("axes", ()),
    }.get(name)
    return None if gone is None or axis in gone else axis - sum(each < axis for each in gone)


def _reshaped(before: Sequence[int], after: Sequence[int], axis: int, size: int) -> int | None:
    """The axis whose index has the same unit: with as many numbers after it, and a multiple of `size` long."""

    behind = math.prod(before[axis + 1 :])
    fitting = (each for each, length in enumerate(after) if math.prod(after[each + 1 :]) == behind and length)
    return next((each for each in fitting if after[each] % size == 0), None)


def _product(equation: Any, operands: Sequence[Any], size: int, own: dict[int, Own] | None) -> Dependence:
    if None not in operands:
        return "all"
    side = 0 if operands[1] is None else 1
    units, other = operands[side], equation.invars[1 - side].aval
    contracting, batch = equation.params["dimension_numbers"]
    if units.axis in batch[side]:
        return units._replace(axis=batch[side].index(units.axis))

    def free(side):
        return [
            axis
            for axis in range(equation.invars[side].aval.ndim)
            if axis not in contracting[side] and axis not in batch[side]
        ]

    first = len(batch[side])
    if units.axis not in contracting[side]:
        return units._replace(axis=first + side * len(free(0)) + free(side).index(units.axis))
    if own is None or units.read or not free(1 - side) or other.shape[free(1 - side)[-1]] % size:
        return "all"
    last = free(1 - side)[-1]
    own[id(equation)] = Own(side, contracting[1 - side][contracting[side].index(units.axis)], last)
    return Units(first + (1 - side) * len(free(0)) + free(1 - side).index(last), read=True)


def _own_product(equation: Any, own: Own, size: int, operands: list[Any]) -> Any:
    """What each unit gives to itself in a product."""
    kernel = operands[1 - own.side]
    unit = [lax.broadcasted_iota("int32", kernel.shape, axis) % size for axis in (own.contracted, own.free)]
    itself = jnp.where(unit[0] == unit[1], kernel, jnp.zeros_like(kernel))
    return apply(equation, [itself, operands[1]] if own.side else [operands[0], itself])[0]


def _inside(jaxpr: Any, operands: Sequence[Dependence], size: int) -> list[Any]:
    """The rule of an equation that calls others."""
    known = {var: each for var, each in zip(jaxpr.invars, operands, strict=True) if each is not None}
    known = _follow(jaxpr.eqns, known, size, None)
    return [known.get(atom) if variables([atom]) else None for atom in jaxpr.outvars]


def _join(operands: Sequence[Any]) -> Dependence:
    """How a number depends on units that is computed from numbers at the same place of several arrays."""
    found = [operand for operand in operands if operand is not None]
    axes: set[Any] = {operand if operand == "all" else operand.axis for operand in found}
    if "all" in axes or len(axes) > 1:
        return "all"
    return Units(axes.pop(), any(operand.read for operand in found)) if found else None


def _same_rank(equation: Any, operands: Sequence[Dependence]) -> bool:
    """Whether all operands that depend on units have the rank of the results."""
    ranks = {atom.aval.ndim for atom, each in zip(equation.invars, operands, strict=True) if each is not None}
    return ranks <= {equation.outvars[0].aval.ndim}
