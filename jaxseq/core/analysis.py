"""What a step function computes from what: the analysis behind `jaxseq.core.scan`.

`analyse` reads the jaxpr of one step and sorts its equations by what they depend on: constants, the inputs `xs`, or
the carry. From that it decides what leaves the loop, and which constants have their gradient formed after it.
"""

import collections
import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core
from jax.extend import source_info_util as source
from jax.sharding import Sharding

# Equations whose result may be as large as the constant that they read before it is accumulated in the loop instead.
PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "gather", "dynamic_slice"))
_SUMS = frozenset(("add", "add_any"))
_LINEAR = _SUMS | {"sub", "mul", "select_n", "broadcast_in_dim"}
_EXPANDING = frozenset(("broadcast_in_dim", "iota"))
_RESHAPING = frozenset(("reshape", "squeeze", "transpose"))

# What one instruction computes from values at hand; all else is worth keeping, or moving out of the loop.
CHEAP = (
    _LINEAR
    | _EXPANDING
    | _RESHAPING
    | frozenset(
        "neg sign abs floor ceil round max min clamp eq ne lt le gt ge and or not xor is_finite square integer_pow "
        "concatenate pad slice split rev copy convert_element_type stop_gradient real imag shift_left "
        "shift_right_logical shift_right_arithmetic".split()
    )
)


class Depends(enum.IntEnum):
    """What a variable of one step depends on, at most."""

    CONSTANTS = 0
    INPUTS = 1
    CARRY = 2


class Term(NamedTuple):
    """An equation of the loop, and those of its operands whose tangents are taken outside."""

    equation: core.JaxprEqn
    positions: tuple[int, ...]
    path: tuple[core.JaxprEqn, ...]  # changes of shape, between its result and the variable of its slot


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One step, sorted. Variables stand for values; `slots` maps each variable that gets a tangent from outside."""

    before: list[core.JaxprEqn]  # of constants: computed once
    ahead: list[core.JaxprEqn]  # of inputs: computed for all steps at once
    loop: list[core.JaxprEqn]
    captured: list[core.Var]
    inputs: list[core.Var]
    varies: list[bool]  # False for each part of the carry that the step hands on unchanged
    carry_in: list[core.Var]
    carry_out: list[Any]
    ys: list[Any]
    constants: list[core.Var]  # what the loop reads of constants
    series: list[core.Var]  # what the loop reads of arrays [time, ...]
    slots: dict[core.Var, list[Term]]
    deferred: dict[int, tuple[int, ...]]  # by the id of an equation, the positions of its deferred operands
    live: frozenset[core.Var]  # constants and series that are also read in the loop undeferred
    room: int  # elements that a step may store for each array


def read(environment: dict, atom: Any) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, core.Literal) else environment[atom]


def apply(equation: core.JaxprEqn, operands: Sequence, **changed: Any) -> list:
    """Computes one equation, under the names and contexts in which the user wrote it."""
    info = equation.source_info
    names = source.current_name_stack() + info.name_stack
    parameters = equation.primitive.get_bind_params({**equation.params, **changed})
    with source.user_context(info.traceback, name_stack=names), equation.ctx.manager:
        out = equation.primitive.bind(*operands, **parameters)
    return list(out) if equation.primitive.multiple_results else [out]


def evaluate(equations: Iterable[core.JaxprEqn], environment: dict) -> dict:
    """Computes equations in order and adds their results to `environment`."""
    for equation in equations:
        out = apply(equation, [read(environment, atom) for atom in equation.invars])
        environment.update(zip(equation.outvars, out, strict=True))
    return environment


def analyse(jaxpr: Any, carry_size: int) -> Plan | None:
    """The plan of the step `jaxpr`, whose first `carry_size` inputs are the carry, or None if it must run as it is."""
    atoms = [*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars, *(v for e in jaxpr.eqns for v in (*e.invars, *e.outvars))]
    if jaxpr.effects or not all(hasattr(atom.aval, "shape") and hasattr(atom.aval, "dtype") for atom in atoms):
        return None
    equations, outputs = _inline(jaxpr)
    return _Analysis(jaxpr, equations, outputs, carry_size).plan()


def _inline(jaxpr: Any) -> tuple[list[core.JaxprEqn], list]:
    """The equations and outputs of `jaxpr` with those of its inner `jit`s in their place."""
    equations = []

    def visit(jaxpr, environment, names):
        def resolve(atom):
            return atom if isinstance(atom, core.Literal) else environment.get(atom, atom)

        for equation in jaxpr.eqns:
            operands = [resolve(atom) for atom in equation.invars]
            if _is_plain_jit(equation):
                inner = equation.params["jaxpr"].jaxpr
                stack = names + equation.source_info.name_stack
                results = visit(inner, dict(zip(inner.invars, operands, strict=True)), stack)
            else:
                results = [core.Var(var.aval) for var in equation.outvars]
                info = equation.source_info.replace(name_stack=names + equation.source_info.name_stack)
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


def _size(atom: Any) -> int:
    return math.prod(atom.aval.shape)


def _largest(atoms: Iterable) -> int:
    return max(map(_size, atoms), default=0)


def _is_float(atom: Any) -> bool:
    return not isinstance(atom, core.Literal) and jnp.issubdtype(atom.aval.dtype, jnp.inexact)


class _Analysis:
    """The steps of `analyse`, over what they share."""

    def __init__(self, jaxpr: Any, equations: list[core.JaxprEqn], outputs: list, carry_size: int):
        self.jaxpr = jaxpr
        self.equations = equations
        self.carry_in, self.inputs = jaxpr.invars[:carry_size], jaxpr.invars[carry_size:]
        self.carry_out, self.ys = outputs[:carry_size], outputs[carry_size:]
        # the gates of a carried array are what a step stores anyway
        self.room = max(4 * _largest(self.carry_in), _largest([*self.inputs, *self.ys]))
        self.depends = self._classify()

    def plan(self) -> Plan:
        constant = [e for e in self.equations if self._of(e.outvars) == Depends.CONSTANTS]
        ahead = self._ahead()
        outside = {id(e) for e in (*constant, *ahead)}
        loop = [e for e in self.equations if id(e) not in outside]
        loop = [*self._kept_small(constant, loop), *loop]
        made = {var for e in loop for var in e.outvars}
        self.series = {var for e in ahead for var in e.outvars} | set(self.inputs)
        self.made = made

        varies = [after is not before for before, after in zip(self.carry_in, self.carry_out, strict=True)]
        changing = list(itertools.compress(self.carry_out, varies))
        slots, deferred = self._slots(loop)
        undeferred = [atom for e in loop for i, atom in enumerate(e.invars) if i not in deferred.get(id(e), ())] + [
            *changing,
            *self.ys,
        ]
        everything = [atom for e in loop for atom in e.invars] + undeferred
        outer = list(dict.fromkeys(v for v in everything if not isinstance(v, core.Literal) and v not in made))
        constants = [v for v in outer if self.depends[v] == Depends.CONSTANTS]
        series = [v for v in outer if v in self.series]
        ahead = _needed(ahead, series)
        before = _needed(constant, [*constants, *(v for e in ahead for v in e.invars)])
        return Plan(
            before=before,
            ahead=ahead,
            loop=loop,
            captured=[*self.jaxpr.constvars, *(v for v, kept in zip(self.carry_in, varies, strict=True) if not kept)],
            inputs=self.inputs,
            varies=varies,
            carry_in=list(itertools.compress(self.carry_in, varies)),
            carry_out=changing,
            ys=self.ys,
            constants=constants,
            series=series,
            slots=slots,
            deferred=deferred,
            live=frozenset(v for v in undeferred if not isinstance(v, core.Literal)) - made,
            room=self.stored,
        )

    def _of(self, atoms: Iterable) -> Depends:
        return max((self.depends[a] for a in atoms if not isinstance(a, core.Literal)), default=Depends.CONSTANTS)

    def _classify(self) -> dict[core.Var, Depends]:
        self.depends = dict.fromkeys(self.jaxpr.constvars, Depends.CONSTANTS)
        self.depends.update(dict.fromkeys(self.inputs, Depends.INPUTS))
        for before, after in zip(self.carry_in, self.carry_out, strict=True):
            # what the step hands on unchanged is a constant
            self.depends[before] = Depends.CONSTANTS if after is before else Depends.CARRY
        for equation in self.equations:
            self.depends.update(dict.fromkeys(equation.outvars, self._of(equation.invars)))
        return self.depends

    def _ahead(self) -> list[core.JaxprEqn]:
        """The equations of inputs alone that are worth computing for all steps at once, and those that they need."""
        possible, available = [], set(self.inputs)
        for equation in self.equations:
            if self._of(equation.outvars) != Depends.INPUTS or not self._may_go_ahead(equation):
                continue
            if all(v in available for v in equation.invars if self._of([v]) == Depends.INPUTS):
                possible.append(equation)
                available.update(equation.outvars)
        return _needed(possible, [v for e in possible if e.primitive.name not in CHEAP for v in e.outvars])

    def _may_go_ahead(self, equation: core.JaxprEqn) -> bool:
        name = equation.primitive.name
        if name in _EXPANDING or name == "rng_bit_generator" or (name != "custom_jvp_call" and _has_jaxpr(equation)):
            return False
        if any(_is_rbg(atom) for atom in equation.invars):  # its bits change under vmap
            return False
        reads = [a for a in equation.invars if name in PRODUCTS or self._of([a]) == Depends.INPUTS]
        return _largest(equation.outvars) <= max(self.room, _largest(reads))

    def _kept_small(self, constant: list[core.JaxprEqn], loop: list[core.JaxprEqn]) -> list[core.JaxprEqn]:
        """The broadcasts of constants that the loop reads: cheaper to repeat in it than to read from memory."""
        wanted = {v for e in loop for v in e.invars if not isinstance(v, core.Literal)}
        wanted.update(v for v in (*self.carry_out, *self.ys) if not isinstance(v, core.Literal))
        kept = []
        for equation in reversed(constant):
            grows = equation.primitive.name in _EXPANDING and _largest(equation.outvars) > _largest(equation.invars)
            if grows and wanted.intersection(equation.outvars):
                wanted.update(v for v in equation.invars if not isinstance(v, core.Literal))
                kept.append(equation)
        return kept[::-1]

    def _is_constant(self, atom: Any) -> bool:
        return _is_float(atom) and self.depends[atom] == Depends.CONSTANTS and atom not in self.made

    def _is_series(self, atom: Any) -> bool:
        return _is_float(atom) and atom in self.series

    def _slots(self, loop: list[core.JaxprEqn]) -> tuple[dict, dict]:
        """The variables that get a tangent from outside the loop, and the operands deferred for it."""
        uses = collections.Counter(v for e in loop for v in e.invars if not isinstance(v, core.Literal))
        uses.update(2 * [v for v in (*self.carry_out, *self.ys) if not isinstance(v, core.Literal)])
        consumer = {v: e for e in loop for v in e.invars if not isinstance(v, core.Literal)}

        def root(var):
            """Where the tangent can enter instead of at `var`: sums share one slot."""
            path = []
            while uses[var] == 1:
                equation = consumer[var]
                (out, *_) = equation.outvars
                if equation.primitive.name in _RESHAPING:
                    path.append(equation)
                elif equation.primitive.name not in _SUMS or out.aval.shape != var.aval.shape:
                    break
                var = out
            return var, tuple(path)

        chosen: dict[int, tuple[int, ...]] = {}
        self.stored = self.room
        for equation in loop:
            if positions := self._product_positions(equation):
                chosen[id(equation)] = positions
                self.stored = max(self.stored, _largest(equation.outvars))
        for equation in loop:
            if equation.primitive.name in _LINEAR and _largest(equation.outvars) <= self.stored:
                if positions := tuple(i for i, v in enumerate(equation.invars) if self._is_constant(v)):
                    chosen[id(equation)] = positions
        roots = {root(e.outvars[0])[0] for e in loop if id(e) in chosen}
        for equation in loop:
            if equation.primitive.name in _SUMS and root(equation.outvars[0])[0] in roots:
                outer = (i for i, v in enumerate(equation.invars) if self._is_constant(v) or self._is_series(v))
                if positions := tuple(outer):
                    chosen[id(equation)] = positions

        slots = collections.defaultdict(list)
        for equation in loop:
            if positions := chosen.get(id(equation)):
                var, path = root(equation.outvars[0])
                slots[var].append(Term(equation, positions, path))
        return dict(slots), chosen

    def _product_positions(self, equation: core.JaxprEqn) -> tuple[int, ...]:
        if equation.primitive.name not in PRODUCTS:
            return ()
        positions = tuple(i for i, v in enumerate(equation.invars) if self._is_constant(v))
        if len(positions) != 1:
            return ()
        others = [v for i, v in enumerate(equation.invars) if i not in positions and _is_float(v)]
        limit = max(_size(equation.invars[positions[0]]), self.room)
        return positions if _largest([*others, *equation.outvars]) <= limit else ()


def _needed(equations: Sequence[core.JaxprEqn], wanted: Iterable) -> list[core.JaxprEqn]:
    """Those of `equations` that the variables `wanted` need."""
    wanted = {v for v in wanted if not isinstance(v, core.Literal)}
    kept = []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(v for v in equation.invars if not isinstance(v, core.Literal))
    return kept[::-1]


def _has_jaxpr(equation: core.JaxprEqn) -> bool:
    return any(True for _ in core.jaxprs_in_params(equation.params))


def _is_rbg(atom: Any) -> bool:
    return "rbg" in str(atom.aval.dtype)
