"""The engine: `scan`, a drop-in for `jax.lax.scan` whose gradient is organised as the fastest RNN kernels organise it.

Autodiff of a scanned step carries the gradients of the weights through the backward loop and adds a small product to
each of them in each step. Here the step is read as a jaxpr (`analysis.py`), and four things happen, one function each:

1. *Hoist* (`_hoist`): what depends on constants alone is computed once, and products of the inputs alone for all
   steps at once, before the loop.
2. *Defer* (`_outside_tangent`): where an equation of the loop is linear in a constant, as a product with a kernel or
   the sum with a bias, the constant's tangent does not enter the loop as such. It enters as a sequence
   `[time, ...]`, one product over all steps, added where the equation stands (`_perturbed`). Transposed, this forms
   the gradient of the constant once, after the backward loop, from the inputs that the forward loop saved.
3. *Save what is expensive, recompute what is cheap* (`_worth_saving`): a `jax.checkpoint` policy on the step.
4. *Transpose kernels once* (`_product`): the backward loop reads each kernel transposed, outside of it.

All of it is a rule of forward differentiation, built from JAX's own transformations. So reverse mode is its transpose,
and higher derivatives, `vmap`, `jit`, `checkpoint` and `shard_map` need nothing of their own.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxseq.core.analysis import CHEAP, Plan, Term, analyse, apply, evaluate, read


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """A plan, and how `lax.scan` is to run it."""

    plan: Plan
    length: int
    reverse: bool
    unroll: int | bool


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """Folds `f(carry, x) -> (carry, y)` over the leading axis of `xs`: `jax.lax.scan`, with a faster gradient.

    Arguments, results and errors are those of `jax.lax.scan`, and so is every transformation of it: only the order in
    which sums are formed differs, hence results up to rounding. A step with effects runs under `jax.lax.scan` itself.

    Args:
      f: one step, `(carry, x) -> (carry, y)`; what it closes over is differentiated too.
      init: the first carry, a pytree.
      xs: a pytree of arrays `[time, ...]`, or None with `length`.
      length: the number of steps, needed if `xs` has no leaves.
      reverse: from the last step to the first; `ys` keep the order of `xs`.
      unroll: how many steps one iteration of the loop computes.

    Returns:
      The last carry, and `ys` of leaves `[time, ...]`.

    Raises:
      TypeError: the carry that `f` returns differs from the one it is given, in structure, shape or dtype.

    >>> kernel = jnp.full((3, 3), 0.1)
    >>> def step(h, x):
    ...     h = jnp.tanh(x + h @ kernel)
    ...     return h, h
    >>> h, hs = scan(step, jnp.zeros(3), jnp.ones((5, 3)))
    >>> h.shape, hs.shape
    ((3,), (5, 3))
    """
    options = {"length": length, "reverse": reverse, "unroll": unroll}
    if jax.config.jax_disable_jit:
        return lax.scan(f, init, xs, **options)
    body, step, out = _trace(f, init, xs, options)
    carry, tree = jax.tree.flatten(init)
    inputs = jax.tree.leaves(xs)
    steps = jnp.shape(inputs[0])[0] if inputs else length
    plan = analyse(body.jaxpr, len(carry)) if steps else None
    if plan is None:
        return lax.scan(step, init, xs, **options)

    carry = [_promote(leaf, var.aval) for leaf, var in zip(carry, body.jaxpr.invars, strict=False)]
    constants, series = _hoist(plan, body.consts, carry, inputs, steps)
    varying = [leaf for leaf, varies in zip(carry, plan.varies, strict=True) if varies]
    varying, ys = _run(_Loop(plan, steps, reverse, unroll), constants, varying, series)
    last = iter(varying)
    carry = [next(last) if varies else leaf for leaf, varies in zip(carry, plan.varies, strict=True)]
    return jax.tree.unflatten(tree, carry), jax.tree.unflatten(jax.tree.structure(out[1]), ys)


def _trace(f: Callable, init: Any, xs: Any, options: dict) -> tuple[Any, Callable, Any]:
    """The jaxpr of one step as `lax.scan` traces it, with its checks and types; the step it stands for; the results."""
    traced = []

    @functools.wraps(f)
    def step(carry, x):
        body, out = jax.make_jaxpr(lambda carry, x: f(carry, x), return_shape=True)(carry, x)

        def evaluated(carry, x):
            results = core.jaxpr_as_fun(body)(*jax.tree.leaves((carry, x)))
            return jax.tree.unflatten(jax.tree.structure(out), results)

        traced.append((body, evaluated))
        return evaluated(carry, x)

    out = jax.eval_shape(lambda init, xs: lax.scan(step, init, xs, **options), init, xs)
    return *traced[-1], out


def _promote(leaf: Any, aval: Any) -> Any:
    """A weakly typed leaf of the first carry, in the type that the step gives it."""
    return lax.convert_element_type(leaf, aval.dtype) if jax.typeof(leaf).weak_type and not aval.weak_type else leaf


def _hoist(plan: Plan, captured: list, carry: list, inputs: list, steps: int) -> tuple[list, list]:
    """What the loop reads of constants, and of arrays `[time, ...]`: computed before it."""
    unchanged = [leaf for leaf, varies in zip(carry, plan.varies, strict=True) if not varies]
    constants = evaluate(plan.before, dict(zip(plan.captured, [*captured, *unchanged], strict=True)))

    def ahead(*x):
        environment = evaluate(plan.ahead, constants | dict(zip(plan.inputs, x, strict=True)))
        return [environment[var] for var in plan.series]

    series = jax.vmap(ahead, axis_size=steps)(*inputs) if plan.series else []
    return [constants[var] for var in plan.constants], series


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(loop: _Loop, constants: list, init: list, series: list) -> tuple[list, list]:
    """The loop itself, over what was hoisted."""
    plan = loop.plan
    fixed = dict(zip(plan.constants, constants, strict=True))

    def step(carry, x):
        environment = fixed | dict(zip(plan.carry_in, carry, strict=True)) | dict(zip(plan.series, x, strict=True))
        evaluate(plan.loop, environment)
        return [read(environment, v) for v in plan.carry_out], [read(environment, v) for v in plan.ys]

    return lax.scan(step, init, series, loop.length, loop.reverse, loop.unroll)


@functools.partial(_run.defjvp, symbolic_zeros=True)
def _run_jvp(loop: _Loop, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The loop and its tangent: linear in what stays in the loop, and in the sequences that enter each slot."""
    plan = loop.plan
    constants, init, series = primals
    fixed = dict(zip(plan.constants, constants, strict=True))
    timed = OrderedDict(zip(plan.series, series, strict=True))
    dots = _perturbations(plan.constants + plan.series, tangents[0] + tangents[2])
    carry_dots = _perturbations(plan.carry_in, tangents[1])

    terms = {slot: [term for term in terms if _active(term, dots)] for slot, terms in plan.slots.items()}
    terms = {slot: active for slot, active in terms.items() if active}
    saved = _saved(plan, [term for active in terms.values() for term in active], fixed, timed)
    zeros = _zeros(loop, fixed, init, timed, terms)
    live_constants = OrderedDict((var, fixed[var]) for var in plan.constants if var in plan.live and var in dots)
    live_series = OrderedDict((var, timed[var]) for var in plan.series if var in plan.live and var in dots)
    live_carry = OrderedDict((v, leaf) for v, leaf in zip(plan.carry_in, init, strict=True) if v in carry_dots)
    transposed = _transposed(plan, fixed)

    def run(carry, constants, series, slots):
        @functools.partial(jax.checkpoint, policy=_worth_saving(plan.room), prevent_cse=False)
        def step(carry, x):
            here, x, slots = x
            environment = {**fixed, **here, **constants, **x, **dict(zip(plan.carry_in, carry, strict=True))}
            outside = {**fixed, **here}
            for equation in plan.loop:
                deferred = plan.deferred.get(id(equation), ())
                operands = [
                    read(outside if i in deferred else environment, atom) for i, atom in enumerate(equation.invars)
                ]
                if id(equation) in transposed:
                    out = _product(equation, deferred[0], operands, transposed[id(equation)])
                else:
                    out = apply(equation, operands)
                environment.update(zip(equation.outvars, out, strict=True))
                for var in equation.outvars:
                    if var in slots:
                        environment[var] = _perturbed(environment[var], slots[var])
            return [read(environment, v) for v in plan.carry_out], (
                [read(environment, v) for v in plan.ys],
                [environment[v] for v in saved],
            )

        init_ = [carry.get(var, leaf) for var, leaf in zip(plan.carry_in, init, strict=True)]
        last, (ys, kept) = lax.scan(step, init_, (timed, series, slots), loop.length, loop.reverse, loop.unroll)
        return (last, ys), kept

    live = (live_carry, live_constants, live_series)
    out, linear, kept = jax.linearize(run, *live, OrderedDict((slot, zeros[slot]) for slot in terms), has_aux=True)
    sequences = {**timed, **zeros, **dict(zip(saved, kept, strict=True))}
    slots = OrderedDict(
        (slot, functools.reduce(jnp.add, [_outside_tangent(term, fixed, sequences, dots) for term in active]))
        for slot, active in terms.items()
    )
    dots = carry_dots | dots
    return out, linear(*(OrderedDict((var, dots[var]) for var in part) for part in live), slots)


def _perturbations(variables: list, tangents: list) -> dict:
    return {
        var: dot
        for var, dot in zip(variables, tangents, strict=True)
        if not isinstance(dot, jax.custom_derivatives.SymbolicZero) and dot.dtype != jax.dtypes.float0
    }


def _active(term: Term, dots: dict) -> bool:
    return any(term.equation.invars[i] in dots for i in term.positions)


def _operands_read(equation: Any) -> tuple[int, ...]:
    """The positions whose values the equation's derivative reads: none in a sum, the condition in a choice."""
    name = equation.primitive.name
    if name in ("add", "add_any", "sub", "broadcast_in_dim"):
        return ()
    return (0,) if name == "select_n" else tuple(range(len(equation.invars)))


def _saved(plan: Plan, terms: list[Term], fixed: dict, timed: dict) -> list:
    """The variables of the loop that the terms read after it."""
    found = [
        term.equation.invars[i] for term in terms for i in _operands_read(term.equation) if i not in term.positions
    ]
    return list(dict.fromkeys(v for v in found if not isinstance(v, core.Literal) and v not in fixed | timed))


def _zeros(loop: _Loop, fixed: dict, init: list, timed: dict, terms: dict) -> dict:
    """Zeros `[time, ...]` for each slot and operand of a term, typed as one step makes them; its values go unused."""
    plan = loop.plan
    first = {var: lax.index_in_dim(leaf, 0, keepdims=False) for var, leaf in timed.items()}
    environment = evaluate(plan.loop, {**fixed, **first, **dict(zip(plan.carry_in, init, strict=True))})
    wanted = [v for active in terms.values() for term in active for v in term.equation.invars]
    wanted = [*terms, *(v for v in wanted if not isinstance(v, core.Literal) and v not in fixed | timed)]
    zeros = OrderedDict((var, jnp.zeros_like(environment[var])) for var in wanted)
    return jax.vmap(lambda _: zeros)(jnp.arange(loop.length)) if zeros else {}


def _outside_tangent(term: Term, fixed: dict, sequences: dict, dots: dict) -> jax.Array:
    """What the deferred operands of one equation add to the tangent of its slot, at all steps: one product or sum."""
    equation = term.equation
    active = [i for i in term.positions if equation.invars[i] in dots]
    operands = [read({**fixed, **sequences}, atom) for atom in equation.invars]
    axes = [None if isinstance(atom, core.Literal) or atom in fixed else 0 for atom in equation.invars]

    def tangent(operands, dots):
        def of_active(*values):
            (out,) = apply(equation, [dict(zip(active, values, strict=True)).get(i, o) for i, o in enumerate(operands)])
            return out

        _, out = jax.jvp(of_active, [operands[i] for i in active], dots)
        for reshape in term.path:
            (out,) = apply(reshape, [out])
        return out

    in_axes = (axes, [axes[i] for i in active])
    size = {"axis_size": next(iter(sequences.values())).shape[0]}
    return jax.vmap(tangent, in_axes, **size)(operands, [dots[equation.invars[i]] for i in active])


@jax.custom_jvp
def _perturbed(value: jax.Array, zero: jax.Array) -> jax.Array:
    """`value`, with the tangent of `zero` added to its own: it reads nothing of `zero` but its tangent."""
    return value


@functools.partial(_perturbed.defjvp, symbolic_zeros=True)
def _perturbed_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    value_dot, zero_dot = (None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t for t in tangents)
    if value_dot is None or zero_dot is None:
        return primals[0], tangents[0] if zero_dot is None else zero_dot
    return primals[0], value_dot + zero_dot


def _transposed(plan: Plan, fixed: dict) -> dict:
    """By the id of each product of the loop with a kernel: the kernel transposed, and the product that reads it."""
    found = {}
    for equation in plan.loop:
        positions = plan.deferred.get(id(equation), ())
        if equation.primitive.name != "dot_general" or len(positions) != 1:
            continue
        (side,) = positions
        contracting, batch = equation.params["dimension_numbers"]
        if batch[0]:
            continue
        kernel = fixed[equation.invars[side]]
        free = [axis for axis in range(kernel.ndim) if axis not in contracting[side]]
        flipped = list(contracting)
        flipped[side] = tuple(range(len(free), kernel.ndim))
        found[id(equation)] = (
            lax.transpose(kernel, (*free, *contracting[side])),
            {"dimension_numbers": (tuple(flipped), batch)},
        )
    return found


def _product(equation: Any, side: int, operands: list, transposed: tuple) -> list:
    """A product with a kernel, whose tangent, and so whose backward product, reads the kernel transposed."""
    kernel, numbers = transposed

    @jax.custom_jvp
    def product(other, kernel):
        return apply(equation, [other, operands[side]] if side else [operands[side], other])

    @functools.partial(product.defjvp, symbolic_zeros=True)
    def product_jvp(primals, tangents):
        other_dot, _ = tangents
        if isinstance(other_dot, jax.custom_derivatives.SymbolicZero):
            return product(*primals), [jnp.zeros_like(out) for out in product(*primals)]
        pair = [other_dot, primals[1]] if side else [primals[1], other_dot]
        return product(*primals), apply(equation, pair, **numbers)

    return product(operands[1 - side], kernel)


def _worth_saving(room: int) -> Callable[..., bool]:
    """The policy of `jax.checkpoint`: not what is cheap, nor what is elementwise and large."""

    def policy(primitive, *avals, **_):
        if primitive.name in CHEAP:
            return False
        return primitive.name not in _ELEMENTWISE or max(aval.size for aval in avals) <= room

    return policy


_ELEMENTWISE = frozenset(
    "tanh logistic exp exp2 expm1 log log1p sin cos tan erf erfc sqrt rsqrt cbrt pow div sinh cosh".split()
)
