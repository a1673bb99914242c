"""The engine: `scan`, a drop-in for `jax.lax.scan` whose gradient is organised as the fastest RNN kernels organise it.

Autodiff of a scanned step carries the gradients of the weights through the backward loop and adds a small product to
each of them in each step. Here the step is read as a jaxpr (`analysis.py`), and four things happen:

1. *Hoist* (`_hoist`): what depends on constants alone is computed once, and what is worth it of the inputs alone for
   all steps at once, before the loop.
2. *Defer* (`_outside`): where an equation of the loop is linear in a constant, as a product with a kernel or the sum
   with a bias, the constant's tangent does not enter the loop as such. It enters as a sequence `[time, ...]`, one
   product over all steps, added where the equation stands. Transposed, this forms the gradient of the constant once,
   after the backward loop, from the inputs that the forward loop saved.
3. *Save what is expensive, recompute what is cheap* (`_worth_saving`): a `jax.checkpoint` policy on the step.
4. *Transpose kernels once* (`_transposed`): the backward loop reads each kernel transposed outside of it.

All of it is one rule of forward differentiation (`_run_jvp`), built from JAX's own transformations. So reverse mode is
its transpose, and higher derivatives, `vmap`, `jit`, `checkpoint` and `shard_map` need nothing of their own.
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from jaxseq.core import equations
from jaxseq.core.analysis import ELEMENTWISE, RECOMPUTED, Plan, Term, analyse
from jaxseq.core.equations import evaluate, read
from jaxseq.core.sharding import placed


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """Folds `f(carry, x) -> (carry, y)` over the leading axis of `xs`: `jax.lax.scan`, with a faster gradient.

    Arguments, results, errors and transformations are those of `jax.lax.scan`; only the order in which sums are formed
    differs, hence results up to rounding. A step with effects, or of symbolic shapes, runs under `jax.lax.scan` itself.

    The gradient holds the products' cotangents of all steps at once, as fast kernels do: it may need up to about twice
    the memory, which `Remat` bounds for any cell. A `jax.checkpoint` in the step is obeyed; what it encloses is
    differentiated, and what is around it saved, as `jax.lax.scan` does it, so let it enclose what follows the products.
    Outside of `jit`, `grad` and `vmap` trace the step anew at each call. Where the rule of a `custom_jvp` is not the
    derivative, second derivatives depend on the order of modes, and so they may differ here.

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

    >>> import jax.numpy as jnp
    >>> kernel = jnp.full((3, 3), 0.1)
    >>> def step(h, x):
    ...     h = jnp.tanh(x + h @ kernel)
    ...     return h, h
    >>> h, hs = scan(step, jnp.zeros(3), jnp.ones((5, 3)))
    >>> h.shape, hs.shape
    ((3,), (5, 3))
    """
    options = {"length": length, "reverse": reverse, "unroll": unroll}
    if _is_untransformed():
        return lax.scan(f, init, xs, **options)
    traced = _trace(f, init, xs, options)
    carry, inputs = jax.tree.leaves(init), jax.tree.leaves(xs)
    steps: Any = jax.typeof(inputs[0]).shape[0] if inputs else length
    plan = analyse(traced.body.jaxpr, len(carry)) if isinstance(steps, int) and steps else None
    if plan is None:
        return lax.scan(traced.step, init, xs, **options)

    carry = [_promote(leaf, var.aval) for leaf, var in zip(carry, traced.body.jaxpr.invars, strict=False)]
    constants, series = _hoist(plan, traced.body.consts, carry, inputs, steps)
    varying = [leaf for leaf, varies in zip(carry, plan.varies, strict=True) if varies]
    varying, ys = _run(_Loop(plan, steps, reverse, unroll), constants, varying, series)
    last = iter(varying)
    carry = [next(last) if varies else leaf for leaf, varies in zip(carry, plan.varies, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(init), carry), jax.tree.unflatten(traced.ys_tree, ys)


def _is_untransformed() -> bool:
    """Whether nothing is traced: then no gradient is wanted, and `lax.scan` remembers what it compiled for `f`."""
    disabled = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
    return disabled or type(core.find_top_trace(())).__name__ == "EvalTrace"


@dataclasses.dataclass(frozen=True, eq=False)
class _Traced:
    """A step as a jaxpr, and as a function that does not trace it again."""

    body: Any
    step: Callable
    ys_tree: Any


def _trace(f: Callable, init: Any, xs: Any, options: dict) -> _Traced:
    """Traces one step as `lax.scan` does it: with its checks, its errors, and its promotion of weak types."""
    traced = []

    @functools.wraps(f)
    def step(carry, x):
        body, out = jax.make_jaxpr(lambda carry, x: f(carry, x), return_shape=True)(carry, x)

        def evaluated(carry, x):
            results = core.jaxpr_as_fun(body)(*jax.tree.leaves((carry, x)))
            return jax.tree.unflatten(jax.tree.structure(out), results)

        traced.append((body, evaluated))
        return evaluated(carry, x)

    _, ys = jax.eval_shape(lambda init, xs: lax.scan(step, init, xs, **options), init, xs)
    body, evaluated = traced[-1]
    return _Traced(body, evaluated, jax.tree.structure(ys))


def _promote(leaf: Any, aval: Any) -> Any:
    """A weakly typed leaf of the first carry in the type that the step gives it, as `lax.scan` has it."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """A plan, and how `lax.scan` is to run it."""

    plan: Plan
    length: int
    reverse: bool
    unroll: int | bool

    def scan(self, step: Callable, init: Any, xs: Any) -> tuple[Any, Any]:
        return lax.scan(step, init, xs, self.length, self.reverse, self.unroll)

    def named(self, constants: list, carry: list, series: list) -> tuple[OrderedDict, ...]:
        """The inputs of the loop by their variables."""
        names = self.plan.constants, self.plan.carry_in, self.plan.series
        return tuple(
            OrderedDict(zip(*pair, strict=True)) for pair in zip(names, (constants, carry, series), strict=True)
        )

    def results(self, environment: Mapping) -> tuple[list, list]:
        """The carry and outputs of one step."""
        return [read(environment, atom) for atom in self.plan.carry_out], [read(environment, a) for a in self.plan.ys]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(loop: _Loop, constants: list, init: list, series: list) -> tuple[list, list]:
    """The loop itself, over what was hoisted."""

    def step(carry, x):
        fixed, carry, x = loop.named(constants, carry, x)
        return loop.results(evaluate(loop.plan.loop, {**fixed, **carry, **x}))

    return loop.scan(step, init, series)


@functools.partial(_run.defjvp, symbolic_zeros=True)
def _run_jvp(loop: _Loop, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The loop, and its tangent: linear in what stays in the loop, and in the sequences that enter it in each slot."""
    inputs = loop.named(*primals)
    dots = {var: dot for part in loop.named(*tangents) for var, dot in part.items() if _is_perturbed(dot)}
    terms = {
        slot: active
        for slot, terms in loop.plan.slots.items()
        if (active := [term for term in terms if not dots.keys().isdisjoint(term.deferred)])
    }
    saved = [var for active in terms.values() for term in active for var in term.saved]
    zeros = _zeros(loop, inputs, [*terms, *(var for active in terms.values() for term in active for var in term.made)])

    within = loop.plan.live.union(loop.plan.carry_in).intersection(dots)
    live = [OrderedDict((var, value) for var, value in part.items() if var in within) for part in inputs]
    slots = OrderedDict((slot, zeros[slot]) for slot in terms)
    run = _tangible(loop, inputs, list(dict.fromkeys(saved)))
    results, linear, kept = jax.linearize(run, live, slots, has_aux=True)

    constants, _, series = inputs
    over_time = {**series, **zeros, **kept}
    slots = OrderedDict()
    for slot, active in terms.items():
        parts = [_outside(term, constants, over_time, dots, loop.length) for term in active]
        slots[slot] = placed(functools.reduce(jnp.add, parts), jax.typeof(zeros[slot]).sharding.spec)
    return results, linear([OrderedDict((var, dots[var]) for var in part) for part in live], slots)


def _is_perturbed(dot: Any) -> bool:
    return not isinstance(dot, SymbolicZero) and jnp.result_type(dot) != jax.dtypes.float0


def _tangible(loop: _Loop, inputs: tuple, saved: list[core.Var]) -> Callable:
    """The loop as a function of its live inputs and of the slots: what is deferred has no tangent in it.

    Deferred operands are closed over, so that an outer differentiation still sees them. Besides its results the
    function returns the values at all steps of the variables `saved`.
    """
    plan = loop.plan
    constants, init, series = inputs
    transposed = _transposed(plan, constants)

    def run(live, slots):
        @_saving(plan)
        def step(carry, inputs):
            x, live_x, entering = inputs
            outside = {**constants, **x}
            environment = {**outside, **live[0], **live_x, **dict(zip(plan.carry_in, carry, strict=True))}
            for equation in plan.loop:
                deferred = plan.deferred.get(id(equation), ())
                operands = [
                    read(outside if i in deferred else environment, atom) for i, atom in enumerate(equation.invars)
                ]
                if id(equation) in transposed:
                    out = equations.product(equation, deferred[0], operands, transposed[id(equation)])
                else:
                    out = equations.apply(equation, operands)
                for var, value in zip(equation.outvars, out, strict=True):
                    environment[var] = equations.perturbed(value, entering[var]) if var in entering else value
            carry, ys = loop.results(environment)
            return carry, (ys, OrderedDict((var, environment[var]) for var in saved))

        carry, (ys, kept) = loop.scan(step, list({**init, **live[1]}.values()), (series, live[2], slots))
        return (carry, ys), kept

    return run


def _zeros(loop: _Loop, inputs: tuple, wanted: list[core.Var]) -> dict[core.Var, jax.Array]:
    """Zeros `[time, ...]` for variables of the loop, typed (and sharded) as a step makes them: no value is read."""

    @jax.jit  # so that no step runs: dead code goes
    def zeros(inputs):
        constants, init, series = inputs
        first = {var: lax.index_in_dim(leaf, 0, keepdims=False) for var, leaf in series.items()}
        environment = evaluate(loop.plan.loop, {**constants, **init, **first})
        of_a_step = OrderedDict((var, jnp.zeros_like(environment[var])) for var in wanted)
        return jax.vmap(lambda _: of_a_step)(jnp.arange(loop.length))

    return zeros(inputs) if wanted else {}


def _outside(term: Term, constants: Mapping, over_time: Mapping, dots: Mapping, length: int) -> jax.Array:
    """What the deferred operands of one equation add to the tangent of its slot, at all steps: one product or sum."""
    atoms = term.equation.invars
    operands = [read({**constants, **over_time}, atom) for atom in atoms]
    timed = [not isinstance(atom, core.Literal) and atom in over_time for atom in atoms]
    perturbed = {i: dots[atoms[i]] for i in term.positions if atoms[i] in dots}
    out = equations.tangent_over_time(term.equation, operands, timed, perturbed, length)
    for reshape in term.path:
        (out,) = jax.vmap(lambda out, reshape=reshape: equations.apply(reshape, [out]))(out)
    return out


def _transposed(plan: Plan, constants: Mapping) -> dict:
    """By the id of each product of the loop with a kernel: the kernel transposed, and how to read it."""
    found = {}
    for equation in plan.loop:
        positions = plan.deferred.get(id(equation), ())
        if len(positions) == 1 and equation.invars[positions[0]] in constants:
            kernel = constants[equation.invars[positions[0]]]
            found[id(equation)] = equations.transposed_kernel(equation, positions[0], kernel)
    return {key: kernel for key, kernel in found.items() if kernel is not None}


def _saving(plan: Plan) -> Callable:
    """`jax.checkpoint` with the policy.

    Not for complex steps, whose saved values it cannot mark, nor where the step says itself what to save.
    """
    is_complex = any(jnp.issubdtype(equations.dtype(var), jnp.complexfloating) for e in plan.loop for var in e.outvars)
    if is_complex or plan.has_checkpoint:
        return lambda step: step
    return functools.partial(jax.checkpoint, policy=_worth_saving(plan.room), prevent_cse=False)


def _worth_saving(room: int) -> Callable[..., bool]:
    """The policy of `jax.checkpoint`: not what is cheap, nor what is elementwise and large."""

    def policy(primitive, *avals, **_):
        if primitive.name in RECOMPUTED:
            return False
        return primitive.name not in ELEMENTWISE or max(aval.size for aval in avals) <= room

    return policy
