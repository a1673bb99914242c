"""Equations of a jaxpr: computing them, and the parts of their derivatives that `jaxseq.core.scan` rearranges."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.extend import source_info_util as source
from jax.sharding import Sharding


def read(environment: Mapping, atom: Any) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, core.Literal) else environment[atom]


def variables(atoms: Iterable) -> list[core.Var]:
    """Those of `atoms` that are no literals."""
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def size(atom: Any) -> int:
    """The number of elements of a variable or literal."""
    return math.prod(atom.aval.shape)


def dtype(atom: Any) -> Any:
    """The dtype of a variable or literal."""
    return atom.aval.dtype


def sharding(atom: Any) -> Any:
    """How a variable or literal is sharded, as far as its type says."""
    return atom.aval.sharding


def apply(equation: core.JaxprEqn, operands: Sequence, **changed: Any) -> list:
    """Computes one equation, under the names and contexts in which the user wrote it, with `changed` parameters."""
    info = equation.source_info
    names = source.current_name_stack() + info.name_stack
    parameters = equation.primitive.get_bind_params({**equation.params, **changed})
    with source.user_context(info.traceback, name_stack=names), equation.ctx.manager:
        out = equation.primitive.bind(*operands, **parameters)
    return list(out) if equation.primitive.multiple_results else [out]


def evaluate(equations: Iterable[core.JaxprEqn], environment: dict) -> dict:
    """Computes equations in order, and adds their results to `environment`."""
    for equation in equations:
        out = apply(equation, [read(environment, atom) for atom in equation.invars])
        environment.update(zip(equation.outvars, out, strict=True))
    return environment


def inline(jaxpr: Any) -> tuple[list[core.JaxprEqn], list]:
    """The equations and outputs of `jaxpr` with those of its inner `jit`s in their place."""
    equations = []

    def visit(jaxpr, environment, names):
        def resolve(atom):
            return atom if isinstance(atom, core.Literal) else environment.get(atom, atom)

        for equation in jaxpr.eqns:
            operands = [resolve(atom) for atom in equation.invars]
            stack = names + equation.source_info.name_stack
            if _is_plain_jit(equation):
                inner = equation.params["jaxpr"].jaxpr
                results = visit(inner, dict(zip(inner.invars, operands, strict=True)), stack)
            else:
                results = [core.Var(var.aval) for var in equation.outvars]
                info = equation.source_info.replace(name_stack=stack)
                equations.append(equation.replace(invars=operands, outvars=results, source_info=info))
            environment.update(zip(equation.outvars, results, strict=True))
        return [resolve(atom) for atom in jaxpr.outvars]

    outputs = visit(jaxpr, {}, source.new_name_stack())
    return equations, outputs


def _is_plain_jit(equation: core.JaxprEqn) -> bool:
    parameters = equation.params
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    placed = any(isinstance(s, Sharding) for s in (*parameters["in_shardings"], *parameters["out_shardings"]))
    return not placed and not parameters["jaxpr"].consts and not parameters["compiler_options_kvs"]


@jax.custom_jvp
def perturbed(value: jax.Array, zero: jax.Array) -> jax.Array:
    """`value`, with the tangent of `zero` added to its own: of `zero` it reads nothing else."""
    return value


@functools.partial(perturbed.defjvp, symbolic_zeros=True)
def _perturbed_jvp(primals: Any, tangents: Any) -> Any:
    value, zero = tangents
    if isinstance(value, SymbolicZero) or isinstance(zero, SymbolicZero):
        return primals[0], zero if isinstance(value, SymbolicZero) else value
    return primals[0], value + zero


def transposed_kernel(equation: core.JaxprEqn, side: int, kernel: jax.Array) -> tuple[jax.Array, dict] | None:
    """For a product whose operand `side` is `kernel`: the kernel with its contracted axes last, and how to read it.

    None if the product is of another kind.
    """
    if equation.primitive.name != "dot_general":
        return None
    contracting, batch = equation.params["dimension_numbers"]
    if batch[side]:
        return None
    free = [axis for axis in range(kernel.ndim) if axis not in contracting[side]]
    last = list(contracting)
    last[side] = tuple(range(len(free), kernel.ndim))
    return lax.transpose(kernel, (*free, *contracting[side])), {"dimension_numbers": (tuple(last), batch)}


def product(equation: core.JaxprEqn, side: int, operands: Sequence, transposed: tuple[jax.Array, dict]) -> list:
    """A product with a constant kernel whose tangent, and so whose backward product, reads the kernel transposed."""
    parameters = transposed[1]

    def pair(other, kernel):
        return [other, kernel] if side else [kernel, other]

    @jax.custom_jvp
    def multiply(other, kernel, transposed):
        return apply(equation, pair(other, kernel))

    @functools.partial(multiply.defjvp, symbolic_zeros=True)
    def multiply_jvp(primals, tangents):
        other, kernel, transposed = primals
        out = multiply(*primals)
        parts = []
        if not isinstance(tangents[0], SymbolicZero):
            parts += apply(equation, pair(tangents[0], transposed), **parameters)
        if not isinstance(tangents[1], SymbolicZero):
            parts += apply(equation, pair(other, tangents[1]))
        return out, [sum(parts[1:], parts[0])]

    return multiply(operands[1 - side], operands[side], transposed[0])


def tangent_over_time(
    equation: core.JaxprEqn, operands: Sequence, timed: Sequence[bool], dots: Mapping[int, jax.Array], length: int
) -> jax.Array:
    """The tangent of one equation at all steps, for the tangents `dots` of some of its operands (by position).

    `timed` says which operands (and their tangents) are arrays `[time, ...]`; the others are constants.
    """
    if _is_plain_product(equation) and sum(timed) == 1 and (side := timed.index(False)) in dots:
        out = _product_over_time(equation, side, operands, dots[side])
        rest = {position: dot for position, dot in dots.items() if position != side}
        return out + tangent_over_time(equation, operands, timed, rest, length) if rest else out
    positions = list(dots)

    def tangent(operands, dots):
        def of_perturbed(*values):
            changed = dict(zip(positions, values, strict=True))
            (out,) = apply(equation, [changed.get(i, operand) for i, operand in enumerate(operands)])
            return out

        return jax.jvp(of_perturbed, [operands[i] for i in positions], dots)[1]

    axes = [0 if varies else None for varies in timed]
    over_time = jax.vmap(tangent, in_axes=(axes, [axes[i] for i in positions]), axis_size=length)
    return over_time(list(operands), list(dots.values()))


def _is_plain_product(equation: Any) -> bool:
    """Whether a product has no batch axes and nothing is known to be sharded, on a CPU."""
    return (
        equation.primitive.name == "dot_general"
        and not equation.params["dimension_numbers"][1][0]
        and equation.outvars[0].aval.sharding.mesh.empty
        and jax.default_backend() == "cpu"
    )


def _product_over_time(equation: core.JaxprEqn, side: int, operands: Sequence, dot: jax.Array) -> jax.Array:
    """`equation` with `dot` for its operand `side` at all steps, as one product of matrices.

    Its transpose is a product of the layout that XLA:CPU multiplies fastest: it would transpose the cotangent, which
    is the larger operand. The barrier keeps the smaller one as it is transposed here.
    """
    other = operands[1 - side]
    contracting = equation.params["dimension_numbers"][0]
    inner = [axis + 1 for axis in contracting[1 - side]]
    outer = [axis for axis in range(other.ndim) if axis not in inner]
    free = [axis for axis in range(dot.ndim) if axis not in contracting[side]]
    depth = math.prod(other.shape[axis] for axis in inner)
    rows, columns = [other.shape[axis] for axis in outer], [dot.shape[axis] for axis in free]

    other = lax.optimization_barrier(lax.transpose(other, (*inner, *outer)).reshape(depth, math.prod(rows)))
    dot = lax.transpose(dot, (*contracting[side], *free)).reshape(depth, math.prod(columns))
    (out,) = apply(equation, [other, dot], dimension_numbers=(((0,), (0,)), ((), ())))
    out = out.reshape(*rows, *columns)
    return out if side else jnp.moveaxis(out, range(1, len(rows)), range(1 + len(columns), out.ndim))
