"""What a step computes from what: the analysis behind `jaxseq.core.scan`.

`analyse` sorts the equations of one step by what they depend on: constants, the inputs, or the carry. From that it
decides what leaves the loop, and which constants have their gradient formed after it.
"""

import collections
import dataclasses
import enum
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxseq.core.equations import dtype, inline, sharding, size, variables

_SUMS = frozenset(("add", "add_any"))
_RESHAPING = frozenset(("reshape", "squeeze", "transpose"))
_EXPANDING = frozenset(("broadcast_in_dim", "iota"))
_LINEAR = _SUMS | {"sub", "mul", "select_n", "broadcast_in_dim"}
# linear in what they read from, and worth more than a pass over memory
_LOOKUPS = frozenset(("gather", "dynamic_slice"))
_PRODUCTS = _LOOKUPS | {"dot_general", "conv_general_dilated"}

# what `vmap` refuses or computes otherwise
_OPAQUE = frozenset(("pure_callback", "ffi_call", "rng_bit_generator"))

_NO_MESH = jax.sharding.AbstractMesh((), ())

_CHECKPOINTS = frozenset(("checkpoint", "remat2"))

# What costs about as much to compute as to read back. (A slice is smaller than what it is taken from.)
_SLICES = frozenset(("slice", "split", "unstack"))
RECOMPUTED = (_LINEAR | _EXPANDING | _RESHAPING).union(
    "neg sign abs floor ceil round max min clamp square one_minus_square integer_pow eq ne lt le gt ge and or not xor "
    "is_finite shift_left shift_right_logical shift_right_arithmetic real imag complex conj convert_element_type copy "
    "stop_gradient concatenate pad stack tile rev".split()
)
ELEMENTWISE = frozenset(
    "tanh logistic exp exp2 expm1 log log1p log2 sin cos tan sinh cosh asin acos atan atan2 asinh acosh atanh erf erfc "
    "erf_inv lgamma digamma sqrt rsqrt cbrt pow div".split()
)


# XLA:CPU runs so many kernels of a loop one after the other, and more than that by a scheduler, which costs more than
# a tiny step (`execute_sequential_num_thunks_threshold`).
_SEQUENTIAL_KERNELS = 8


class Depends(enum.IntEnum):
    """What a variable of a step depends on, at most."""

    CONSTANTS = 0
    INPUTS = 1
    CARRY = 2


class Term(NamedTuple):
    """An equation of the loop, with those of its operands whose tangents are taken outside the loop."""

    equation: core.JaxprEqn
    positions: tuple[int, ...]  # of the deferred operands
    path: tuple[core.JaxprEqn, ...]  # changes of shape between its result and the variable of its slot
    made: list[Any]  # its operands that vary in the loop
    saved: list[Any]  # those whose values its derivative reads

    @property
    def deferred(self) -> set[Any]:
        """The constants and series whose tangents are taken outside."""
        return {self.equation.invars[i] for i in self.positions}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One step, sorted; what it computes where, and by which variables values are known."""

    before: list[core.JaxprEqn]  # of constants: computed once
    ahead: list[core.JaxprEqn]  # of inputs: computed for all steps at once
    loop: list[core.JaxprEqn]
    captured: list[core.Var]
    inputs: list[core.Var]
    varies: list[bool]  # False for each part of the carry that the step hands on unchanged: it is captured
    carry_in: list[core.Var]
    carry_out: list[Any]
    ys: list[Any]
    constants: list[core.Var]  # what the loop reads of constants
    series: list[core.Var]  # what the loop reads of arrays [time, ...]
    slots: dict[core.Var, list[Term]]  # by the variables at which tangents enter from outside the loop
    deferred: dict[int, tuple[int, ...]]  # the positions of the deferred operands, by the id of their equation
    live: frozenset[core.Var]  # constants and series that the loop also reads undeferred
    room: int  # the size up to which arrays of every step are stored
    has_checkpoint: bool  # a `jax.checkpoint` in the step says itself what is saved


def analyse(jaxpr: Any, carry_size: int) -> Plan | None:
    """The plan of the step `jaxpr`, whose first `carry_size` inputs are the carry, or None if it must run as it is."""
    atoms = [*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars, *(v for e in jaxpr.eqns for v in (*e.invars, *e.outvars))]
    if jaxpr.effects or not all(_is_array(atom.aval) for atom in atoms):
        return None
    return _Analysis(jaxpr, carry_size).plan()


def _is_array(aval: Any) -> bool:
    """Whether `aval` is an array of known size: neither a reference nor of a symbolic shape."""
    return hasattr(aval, "dtype") and all(isinstance(axis, int) for axis in getattr(aval, "shape", (None,)))


class _Analysis:
    """The parts of `analyse`, over what they share."""

    def __init__(self, jaxpr: Any, carry_size: int):
        self.equations, outputs = inline(jaxpr)
        self.captured = jaxpr.constvars
        self.carry_in, self.inputs = jaxpr.invars[:carry_size], jaxpr.invars[carry_size:]
        self.carry_out, self.ys = outputs[:carry_size], outputs[carry_size:]
        self.varies = [after is not before for before, after in zip(self.carry_in, self.carry_out, strict=True)]
        self.outputs = [*itertools.compress(self.carry_out, self.varies), *self.ys]
        self.depends = self._classify()
        # a step stores the gates of what it carries anyway
        self.room = max(4 * _largest(self.carry_in), _largest([*self.inputs, *self.ys]))

        constant = [e for e in self.equations if self._of(e.outvars) == Depends.CONSTANTS]
        ahead = self._ahead()
        self.series = {var for e in ahead for var in e.outvars}.union(self.inputs)
        outside = {id(e) for e in (*constant, *ahead)}
        loop = [e for e in self.equations if id(e) not in outside]
        self.loop = [*self._kept_small(constant, loop), *loop]
        self.made = {var for e in self.loop for var in e.outvars}
        self.carrying = set(itertools.compress(self.carry_in, self.varies))
        self.readers = collections.defaultdict(list)
        for equation in self.loop:
            for var in variables(equation.invars):
                self.readers[var].append(equation)
        for var in variables(self.outputs):
            self.readers[var].append(None)
        self.constant, self.ahead = constant, ahead

    def plan(self) -> Plan:
        deferred = self._deferred()
        live = [v for e in self.loop for i, v in enumerate(e.invars) if i not in deferred.get(id(e), ())]
        live = variables([*live, *self.outputs])
        read = [
            v for v in dict.fromkeys(variables(v for e in self.loop for v in e.invars) + live) if v not in self.made
        ]
        constants = [v for v in read if self.depends[v] == Depends.CONSTANTS]
        series = [v for v in read if v in self.series]
        ahead = _needed(self.ahead, series)
        return Plan(
            before=_needed(self.constant, [*constants, *(v for e in ahead for v in e.invars)]),
            ahead=ahead,
            loop=self.loop,
            captured=[*self.captured, *(v for v, varies in zip(self.carry_in, self.varies, strict=True) if not varies)],
            inputs=self.inputs,
            varies=self.varies,
            carry_in=list(itertools.compress(self.carry_in, self.varies)),
            carry_out=list(itertools.compress(self.carry_out, self.varies)),
            ys=self.ys,
            constants=constants,
            series=series,
            slots=self._slots(deferred),
            deferred=deferred,
            live=frozenset(live).intersection([*constants, *series]),
            room=self.room,
            has_checkpoint=_has_checkpoint(self.loop),
        )

    def _of(self, atoms: Iterable) -> Depends:
        return max((self.depends[var] for var in variables(atoms)), default=Depends.CONSTANTS)

    def _classify(self) -> dict[core.Var, Depends]:
        self.depends = dict.fromkeys(self.captured, Depends.CONSTANTS)
        self.depends.update(dict.fromkeys(self.inputs, Depends.INPUTS))
        for var, varies in zip(self.carry_in, self.varies, strict=True):
            self.depends[var] = Depends.CARRY if varies else Depends.CONSTANTS
        for equation in self.equations:
            stays = _is_elsewhere(equation)  # in the loop, as what depends on the carry does
            self.depends.update(dict.fromkeys(equation.outvars, Depends.CARRY if stays else self._of(equation.invars)))
        return self.depends

    def _ahead(self) -> list[core.JaxprEqn]:
        """The equations of inputs alone that are worth computing for all steps at once, and those that they need."""
        possible, available = [], set(self.inputs)
        for equation in self.equations:
            if self._of(equation.outvars) == Depends.INPUTS and self._may_go_ahead(equation):
                if all(v in available for v in variables(equation.invars) if self.depends[v] == Depends.INPUTS):
                    possible.append(equation)
                    available.update(equation.outvars)
        wanted = []
        for equation in possible:
            if equation.primitive.name in RECOMPUTED | _SLICES:
                continue
            if not self._is_faster_in_loop(equation):
                wanted += equation.outvars
            elif equation.primitive.name in _PRODUCTS:  # its tangent is taken outside all the same
                wanted += equation.invars
        return _needed(possible, wanted)

    def _is_faster_in_loop(self, equation: core.JaxprEqn) -> bool:
        """Whether an equation of inputs is computed faster step by step.

        XLA:CPU does not vectorise an elementwise kernel that slices one step out of what was computed for all. But
        where a step is tiny the number of its kernels decides, and a product with its slice is two of them.
        """
        floats: list[Any] = [
            v for v in variables(equation.invars) if self.depends[v] == Depends.INPUTS and _is_float(v)
        ]
        tiny = equation.primitive.name in _PRODUCTS and _largest([*floats, *equation.outvars]) <= 64
        one_row = all(size(v) == max(v.aval.shape, default=1) for v in floats)
        few = tiny and one_row and self._kernel_count() <= _SEQUENTIAL_KERNELS
        return bool(floats) and (few or not tiny) and jax.default_backend() == "cpu"

    def _kernel_count(self) -> int:
        """About how many kernels a step runs if nothing leaves the loop: products, results and the loop's counter."""
        products = [e for e in self.equations if e.primitive.name in _PRODUCTS and self._of(e.outvars)]
        return 2 * len(products) + len(self.outputs) + 2

    def _may_go_ahead(self, equation: core.JaxprEqn) -> bool:
        name = equation.primitive.name
        if name in _EXPANDING | _OPAQUE or not _is_elementary(equation) or _mixes_rows(equation):
            return False
        if any("rbg" in str(dtype(atom)) for atom in equation.invars):  # such keys give other bits under vmap
            return False
        reads = [a for a in equation.invars if name in _PRODUCTS or self._of([a]) == Depends.INPUTS]
        return _largest(equation.outvars) <= max(self.room, _largest(reads))

    def _kept_small(self, constant: list[core.JaxprEqn], loop: list[core.JaxprEqn]) -> list[core.JaxprEqn]:
        """The broadcasts of constants that the loop reads: cheaper to repeat in it than to read from memory."""
        wanted = set(variables([*(v for e in loop for v in e.invars), *self.outputs]))
        kept = []
        for equation in reversed(constant):
            grows = equation.primitive.name in _EXPANDING and _largest(equation.outvars) > _largest(equation.invars)
            if grows and wanted.intersection(equation.outvars):
                wanted.update(variables(equation.invars))
                kept.append(equation)
        return kept[::-1]

    def _is_constant(self, atom: Any) -> bool:
        return _is_float(atom) and self.depends[atom] == Depends.CONSTANTS and atom not in self.made

    def _is_series(self, atom: Any) -> bool:
        return _is_float(atom) and atom in self.series

    def _deferred(self) -> dict[int, tuple[int, ...]]:
        """By the id of each equation of the loop, the positions of the operands whose tangents are taken outside.

        Outside, a step's result is stored for each step. So it is not to be larger than the kernel that it serves, or
        than what is stored anyway: the gates of what is carried, and the results of other such products.
        """
        deferred = {}
        for equation in self.loop:
            if positions := self._product_positions(equation):
                deferred[id(equation)] = positions
                self.room = max(self.room, _largest(equation.outvars))
        for equation in self.loop:
            if equation.primitive.name in _LINEAR and _largest(equation.outvars) <= self.room:
                deferred[id(equation)] = _where(self._is_constant, equation)
        # the terms of one sum share what is stored
        shared = {self._root(e.outvars[0])[0] for e in self.loop if deferred.get(id(e))}
        for equation in self.loop:
            if equation.primitive.name in _SUMS and self._root(equation.outvars[0])[0] in shared:
                deferred[id(equation)] = _where(lambda v: self._is_constant(v) or self._is_series(v), equation)
        return {key: positions for key, positions in deferred.items() if positions}

    def _product_positions(self, equation: core.JaxprEqn) -> tuple[int, ...]:
        if equation.primitive.name not in _PRODUCTS or _mixes_rows(equation):
            return ()
        constants, series = _where(self._is_constant, equation), _where(self._is_series, equation)
        if series and len(constants) + len(series) == len(equation.invars):
            return tuple(sorted(constants + series))
        if len(constants) != 1:
            return ()
        others = [v for i, v in enumerate(equation.invars) if i not in constants and _is_float(v)]
        kernel = 0 if equation.primitive.name in _LOOKUPS else size(equation.invars[constants[0]])
        limit = max(kernel, self.room)
        return constants if _largest([*others, *equation.outvars]) <= limit else ()

    def _slots(self, deferred: dict[int, tuple[int, ...]]) -> dict[core.Var, list[Term]]:
        slots = collections.defaultdict(list)
        for equation in self.loop:
            if positions := deferred.get(id(equation)):
                inside = [i for i, v in enumerate(equation.invars) if self._is_inside(v)]
                reads = _operands_read(equation)
                made = [equation.invars[i] for i in inside]
                saved = [equation.invars[i] for i in inside if i in reads]
                slot, path = self._root(equation.outvars[0])
                slots[slot].append(Term(equation, positions, path, made, saved))
        return dict(slots)

    def _is_inside(self, atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and (atom in self.made or atom in self.carrying)

    def _root(self, var: Any) -> tuple[core.Var, tuple[core.JaxprEqn, ...]]:
        """Where a tangent can enter instead of at `var`, and the changes of shape up to there: a sum has one slot."""
        path = []
        while len(readers := self.readers[var]) == 1:
            (equation,) = readers
            if equation is None:  # the step returns it
                break
            out = equation.outvars[0]
            if equation.primitive.name in _RESHAPING:
                path.append(equation)
            elif equation.primitive.name not in _SUMS or out.aval.shape != var.aval.shape:
                break
            var = out
        return var, tuple(path)


def _operands_read(equation: core.JaxprEqn) -> range:
    """The positions of the operands whose values the equation's derivative reads: in a choice only the condition."""
    if equation.primitive.name in _SUMS | {"sub", "broadcast_in_dim"}:
        return range(0)
    return range(1) if equation.primitive.name == "select_n" else range(len(equation.invars))


def _is_elementary(equation: core.JaxprEqn) -> bool:
    """Whether an equation holds no loop or branch."""
    inner = list(core.jaxprs_in_params(equation.params))
    known = equation.primitive.name in ("custom_jvp_call", "jit", "pjit")
    return not inner or (known and all(_is_elementary(e) for jaxpr in inner for e in jaxpr.eqns))


def _is_elsewhere(equation: core.JaxprEqn) -> bool:
    """Whether an equation computes on a mesh of other axis types than the step has, as JAX does to look up rows."""
    meshes = [sharding(atom).mesh for atom in (*equation.invars, *equation.outvars)]
    return any(mesh not in (jax.sharding.get_abstract_mesh(), _NO_MESH) for mesh in meshes)


def _mixes_rows(equation: core.JaxprEqn) -> bool:
    """Whether `vmap` over time would merge it with a sharded axis, as it does for convolutions."""
    sharded = any(axis is not None for atom in equation.invars for axis in sharding(atom).spec)
    return sharded and equation.primitive.name == "conv_general_dilated"


def _has_checkpoint(equations: Iterable[core.JaxprEqn]) -> bool:
    """Whether a `jax.checkpoint` is among the equations or in what they call."""
    return any(
        equation.primitive.name in _CHECKPOINTS
        or any(_has_checkpoint(inner.eqns) for inner in core.jaxprs_in_params(equation.params))
        for equation in equations
    )


def _needed(equations: Sequence[core.JaxprEqn], wanted: Iterable) -> list[core.JaxprEqn]:
    """Those of `equations` that the variables `wanted` need."""
    wanted = set(variables(wanted))
    kept = []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(variables(equation.invars))
    return kept[::-1]


def _largest(atoms: Iterable) -> int:
    return max(map(size, atoms), default=0)


def _is_float(atom: Any) -> bool:
    return not isinstance(atom, core.Literal) and jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _where(condition: Any, equation: core.JaxprEqn) -> tuple[int, ...]:
    return tuple(i for i, atom in enumerate(equation.invars) if condition(atom))
