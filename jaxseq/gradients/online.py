"""Gradients forward in time: after each step, without storing the steps before.

Real-time recurrent learning carries beside the state its *influence*, the derivative of the state with respect to the
params, and each step gives the gradient of its own loss: memory does not grow with time, and params may change while
the sequence goes on. The influence has the size of state times params, or, by the approximation SnAp-1, of the params.

>>> import jaxseq as js
>>> cell = js.GRU(2, 3)
>>> @jax.jit
... def update(params, carry, x, target):
...     carry, value, gradient = step(cell, params, carry, x, lambda y: jnp.mean((y - target) ** 2))
...     return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient), carry
>>> params = cell.init(jax.random.key(0))
>>> carry = start(cell, params, (4,))
>>> for x, target in [(jnp.ones((4, 2)), jnp.zeros((4, 3)))] * 5:
...     params, carry = update(params, carry, x, target)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.precision import widen
from jaxseq.core.unroll import Run, scan_from_fresh, step_of
from jaxseq.gradients.jacobians import Accompanied, Beside, check_real, flatten, is_floating, jacobian, on_vectors

Method = Literal["rtrl", "snap1"]


class Influence(NamedTuple):
    """A state, and how it changes with each floating array of the params, in their order: see `start`."""

    state: Any
    influence: list[Array]


def start(cell: Cell, params: Params, batch_shape: tuple[int, ...] = (), *, method: Method = "rtrl") -> Influence:
    """The initial state with its influence.

    "rtrl" is exact for any cell. Of a state of n floating numbers it carries `[*batch, n, *param]` for each array of
    the params. "snap1" carries `[*batch, arrays of the state, *param]`: of each param only the influence on the unit
    that it belongs to. It needs a cell whose params and state all have the units as their last axis, and where the new
    state of unit j depends, the state before being given, on the params of unit j alone. So it is in an Elman, LSTM or
    GRU, but not where units mix within a step: a normalisation over units, a gate that multiplies the state before the
    recurrent product, a layer above another. Such cells are found, by a step with random numbers, and refused. What the
    state before gives to a step's loss is an approximation, exact where no unit reads the state of another, as in an
    IndRNN. It saves memory rather than time: with n units and k arrays of state, a step costs n k pushes of a
    perturbation through the step.

    R. J. Williams and D. Zipser, A learning algorithm for continually running fully recurrent neural networks, Neural
    Computation 1, 1989; J. Menick et al., Practical real time recurrent learning with a sparse approximation, ICLR
    2021.

    Raises:
        ValueError: if the method is unknown.
        TypeError: if the state has no floating numbers, or complex ones; for "snap1" also if an array has another last
            axis, or units mix within a step.

    >>> import jaxseq as js
    >>> cell = js.LSTM(2, 3)
    >>> params = cell.init(jax.random.key(0))
    >>> [leaf.shape for leaf in start(cell, params).influence]
    [(6, 2, 4, 3), (6, 3, 4, 3), (6, 4, 3)]
    >>> [leaf.shape for leaf in start(cell, params, method="snap1").influence]
    [(2, 2, 4, 3), (2, 3, 4, 3), (2, 4, 3)]
    """
    state = cell.initial_state(params, batch_shape)
    kind = _kind(cell, params, state, len(batch_shape), method)
    return Influence(state, kind.immediate(lambda params: cell.initial_state(params, batch_shape), params))


def step(
    cell: Cell,
    params: Params,
    carry: Influence,
    x: Any,
    loss: Callable[[Any], Float[Array, ""]],
    key: Array | None = None,
    *,
    method: Method = "rtrl",
) -> tuple[Influence, Float[Array, ""], Params]:
    """One step, with the gradient of a loss of its output through all steps before.

    Args:
        cell: any cell, see `start`.
        params: the same as before for exact gradients, or a little changed in the meantime, as online learning does.
        carry: what `start` or the step before gave.
        x: the input `[*batch, *features]`.
        loss: a scalar of the output y of this step.
        key: for the noise of the step.
        method: that of `start`.

    Returns:
        The next carry, the loss, and its gradient, a tree like the params.
    """
    single = jax.tree.leaves(jax.eval_shape(cell.initial_state, params))
    rank = jax.tree.leaves(carry.state)[0].ndim - single[0].ndim
    kind = _kind(cell, params, carry.state, rank, method)
    carry, value, slopes = _advance(lambda params, state: cell.step(params, state, x, key), kind, params, carry, loss)
    return carry, value, _like(params, slopes)


def gradient(
    cell: Cell,
    params: Params,
    xs: Any,
    loss: Callable[[Any, Any], Float[Array, "*batch"]],
    targets: Any = None,
    carry: Influence | None = None,
    *,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    key: Array | None = None,
    method: Method = "rtrl",
) -> tuple[Influence, Float[Array, ""], Params]:
    """The gradient of the sum of all steps' losses over a whole sequence, in memory that does not grow with it.

    With "rtrl" it is that of back-propagation through `cell.unroll`, also into a learned initial state.

    Args:
        cell: any cell, see `start`.
        params: its params.
        xs: the inputs `[*batch, time, ...]`.
        loss: `(y, target) -> [*batch]`, the losses of one step; off the mask they do not count.
        targets: `[*batch, time, ...]`, a tree; None if the loss needs none, which then gets None.
        carry: where an earlier part of the sequence ended; by default `start`.
        mask: as for `unroll`, and so are `reset` and `key`.
        reset: what was before a reset has no influence.
        key: for noise.
        method: "rtrl" or "snap1".

    Returns:
        The carry at the end, the sum of the losses, and its gradient, a tree like the params.

    >>> import jaxseq as js
    >>> cell = js.Elman(2, 3)
    >>> params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 10, 2))
    >>> _, value, slopes = gradient(cell, params, xs, lambda y, target: jnp.sum(y**2, axis=-1))
    >>> expected = jax.grad(lambda params: jnp.sum(cell.unroll(params, xs)[1] ** 2))(params)
    >>> bool(jnp.allclose(slopes.recurrent_kernel, expected.recurrent_kernel, atol=1e-4))
    True
    """
    drawn, pull = params, lambda slopes: (slopes,)
    if key is not None:
        errors.check_key(cell, key)
        drawn, pull = jax.vjp(lambda params: cell.draw(params, jax.random.split(key)[0]), params)
    state, influence = (None, None) if carry is None else carry
    learner = _Learner(cell, loss, method)
    given = Beside(drawn, (targets, influence))
    learned, _ = learner.unroll(given, xs, state, mask=mask, reset=reset, key=key)
    end, value, slopes = learned
    return end, value, pull(slopes)[0]


class _Learner(Accompanied, function="online.gradient"):
    """Learns online; its params are those of the cell, drawn already, the targets, and the influence to start with."""

    loss: Callable[..., Any]
    method: str

    def draw(self, params: Any, key: Array) -> Any:
        return params

    def _unroll(self, params: Any, xs: Any, state: State, run: Run) -> tuple[Any, Any]:
        params, (targets, influence) = params
        rank = len(run.batch_shape)
        if influence is None:
            influence = start(self.cell, params, run.batch_shape, method=self.method).influence  # pyright: ignore
        targets = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, rank, 0), targets)
        inputs = step_of(self.cell, params, xs, run)[1]
        kind = _kind(self.cell, params, state, rank, self.method)

        def body(carried, arrays):
            carry, sums = carried
            inputs, target = arrays

            def advance(params, state):
                return step_of(self.cell, params, None, run)[0](state, inputs)

            def loss(y):
                losses = self.loss(y, target)
                if jnp.shape(losses) != run.batch_shape:
                    raise ValueError(
                        f"The loss of one step needs to give [*batch] = {run.batch_shape}, it gave {jnp.shape(losses)}."
                    )
                return jnp.sum(losses if run.keep is None else masks.zero_unless(inputs[1], losses))

            carry, *terms = _advance(advance, kind, params, carry, loss)
            return (carry, _add_to(sums, tuple(terms))), ()

        slopes = [jnp.zeros_like(leaf) for leaf in _floats(params)[0]]
        sums = (jnp.zeros((), slopes[0].dtype), slopes)
        first = (Influence(state, influence), jax.tree.map(widen, sums))  # small terms of long sums are not lost
        (carry, wide), _ = scan_from_fresh(lax.scan, body, first, (inputs, targets), run.length, run.reverse)
        value, slopes = _add_to(sums, wide)
        return (carry, value, _like(params, slopes)), ()


def _advance(
    advance: Callable[[Params, State], Any], kind: Any, params: Params, carry: Influence, loss: Callable[[Any], Array]
) -> tuple[Influence, Array, list[Array]]:
    """The next carry, the loss, and its gradient: that of this step, and through the influence that of those before."""
    vector, unflatten = flatten(carry.state, kind.rank)
    floats, rebuild = _floats(params)

    def value_of(floats, vector):
        state, y = advance(rebuild(floats), unflatten(vector))
        return loss(y), state

    (value, state), (direct, of_state) = jax.value_and_grad(value_of, (0, 1), has_aux=True)(floats, vector)
    slopes = [own + kind.contract(of_state, part) for own, part in zip(direct, carry.influence, strict=True)]
    function, vector = on_vectors(functools.partial(advance, params), carry.state, kind.rank)
    immediate = kind.immediate(lambda params: advance(params, carry.state)[0], params)
    return Influence(state, kind.push(jacobian(function, vector), carry.influence, immediate)), value, slopes


class _Exact(NamedTuple):
    """Real-time recurrent learning: influences `[*batch, n, *param]`."""

    rank: int

    def immediate(self, state_of: Callable[[Params], State], params: Params) -> list[Array]:
        """How a state changes with the params that make it."""
        floats, rebuild = _floats(params)
        return jax.jacfwd(lambda floats: flatten(state_of(rebuild(floats)), self.rank)[0])(floats)

    def push(self, local: Array, influence: list[Array], immediate: list[Array]) -> list[Array]:
        """The influence after a step whose Jacobian is `local`."""

        def each(before, now):
            flat = before.reshape(*before.shape[: self.rank + 1], math.prod(before.shape[self.rank + 1 :]))
            return (local @ flat).reshape(before.shape) + now

        return list(map(each, influence, immediate))

    def contract(self, of_state: Array, influence: Array) -> Array:
        """The gradient with respect to a param from that with respect to the state."""
        axes = list(range(self.rank + 1))
        return jnp.tensordot(of_state, influence, (axes, axes))


class _Snap1(NamedTuple):
    """SnAp-1: influences `[*batch, arrays, *param]` of each param on its own unit, the last axis."""

    rank: int
    arrays: int

    def immediate(self, state_of: Callable[[Params], State], params: Params) -> list[Array]:
        """How a state changes with the params that make it: one direction for all units, for they do not mix."""
        floats, rebuild = _floats(params)

        def each(index, leaf):
            rows = leaf.reshape(-1, leaf.shape[-1])
            directions = jnp.eye(len(rows), dtype=leaf.dtype)[:, :, None] * jnp.ones_like(rows)

            def vector(changed):
                changed = [*floats[:index], changed.reshape(leaf.shape), *floats[index + 1 :]]
                return self._units(flatten(state_of(rebuild(changed)), self.rank)[0])

            _, push = jax.linearize(vector, rows)
            pushed = jax.vmap(push, out_axes=-2)(directions)  # [*batch, arrays, row, units]
            return pushed.reshape(*pushed.shape[:-2], *leaf.shape)

        return [each(index, leaf) for index, leaf in enumerate(floats)]

    def push(self, local: Array, influence: list[Array], immediate: list[Array]) -> list[Array]:
        """The influence after a step, of whose Jacobian only each unit's own block counts."""
        units = local.shape[-1] // self.arrays
        blocks = local.reshape(*local.shape[:-2], self.arrays, units, self.arrays, units)
        blocks = jnp.diagonal(blocks, axis1=-3, axis2=-1)  # [*batch, arrays, arrays, units]

        def each(before, now):
            rows = before.reshape(*before.shape[: self.rank + 1], math.prod(before.shape[self.rank + 1 : -1]), units)
            return jnp.einsum("...abu,...bru->...aru", blocks, rows).reshape(before.shape) + now

        return list(map(each, influence, immediate))

    def contract(self, of_state: Array, influence: Array) -> Array:
        """The gradient with respect to a param from that with respect to the state."""
        of_state = self._units(of_state)
        kept = math.prod(influence.shape[self.rank + 1 : -1])
        rows = influence.reshape(*of_state.shape[:-1], kept, of_state.shape[-1])
        summed = (of_state[..., None, :] * rows).sum(axis=tuple(range(self.rank + 1)))
        return summed.reshape(influence.shape[self.rank + 1 :])

    def _units(self, vector: Array) -> Array:
        return vector.reshape(*vector.shape[:-1], self.arrays, vector.shape[-1] // self.arrays)


def _kind(cell: Cell, params: Params, state: State, rank: int, method: Any) -> _Exact | _Snap1:
    if method not in ("rtrl", "snap1"):
        raise ValueError(f'The method of online learning is "rtrl" or "snap1", got {method!r}.')
    if method == "rtrl":
        return _Exact(rank)
    floats = [leaf for leaf in jax.tree.leaves(state) if is_floating(leaf)]
    units = {leaf.shape[-1] if leaf.ndim == rank + 1 else None for leaf in floats}
    units |= {leaf.shape[-1] if jnp.ndim(leaf) else None for leaf in _floats(params)[0]}
    if len(units) != 1 or None in units:
        raise TypeError(
            f"snap1 needs params and a state whose last axis is the units, but {cell} has params "
            f"{errors.shape_of(params)} and a state {errors.shape_of(state)}: use rtrl, or put what reads the cell's "
            "output into the loss."
        )
    leaves, tree = jax.tree.flatten(params)
    if _mixes_units(cell, tree, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)):
        raise TypeError(
            f"snap1 needs a cell where one step's new state of a unit depends on the params of that unit alone, but in "
            f"{cell} units mix within a step: use rtrl."
        )
    return _Snap1(rank, len(floats))


@functools.lru_cache(maxsize=64)
def _mixes_units(cell: Cell, tree: Any, kinds: tuple) -> bool:
    """Whether params of some units change the new state of others, at random numbers that saturate no activation."""
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*kind) for kind in kinds])
    units = _floats(params)[0][0].shape[-1]
    bits = np.arange(units) >> np.arange(max(units - 1, 0).bit_length())[:, None] & 1  # each two units differ in one
    chosen = np.concatenate([bits, 1 - bits])

    def generic(key, abstract, scale=1.0):
        def leaf(abstract, key):
            if not is_floating(abstract):
                return jax.lax.full(abstract.shape, 0, abstract.dtype)
            return scale * jax.random.uniform(key, abstract.shape, abstract.dtype, 0.1, 1)

        leaves, tree = jax.tree.flatten(abstract)
        return jax.tree.unflatten(tree, list(map(leaf, leaves, jax.random.split(key, max(len(leaves), 1)))))

    @jax.jit
    def probe(keys):
        given = generic(keys[0], params, 1 / units)
        state = generic(keys[1], jax.eval_shape(cell.initial_state, given))
        x = generic(keys[2], jax.eval_shape(cell.zero_input, given))
        floats, rebuild = _floats(given)
        direction = generic(keys[3], floats)

        def reaches_others(chosen):
            dots = [leaf * jnp.broadcast_to(chosen, leaf.shape).astype(leaf.dtype) for leaf in direction]
            _, dot = jax.jvp(lambda floats: flatten(cell.step(rebuild(floats), state, x)[0], 0)[0], (floats,), (dots,))
            return jnp.any((dot.reshape(dot.size // units, units) != 0) & (chosen == 0))

        return jnp.any(jax.vmap(reaches_others)(jnp.asarray(chosen)))

    with jax.ensure_compile_time_eval():
        return bool(probe(jax.random.split(jax.random.key(0), 4)))


def _add_to(sums: Any, terms: Any) -> Any:
    """Sums in the dtypes that they have."""
    return jax.tree.map(lambda total, term: total + term.astype(total.dtype), sums, terms)


def _floats(params: Params) -> tuple[list[Any], Callable[[list[Any]], Params]]:
    """The floating arrays of the params, and the params with others in their place."""
    check_real("params", params)
    leaves, tree = jax.tree.flatten(params)

    def rebuild(floats):
        new = iter(floats)
        return jax.tree.unflatten(tree, [next(new) if is_floating(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if is_floating(leaf)], rebuild


def _like(params: Params, slopes: list[Array]) -> Params:
    """Gradients of the floating arrays as a tree like the params; others have gradients of the dtype float0."""
    leaves, tree = jax.tree.flatten(params)
    each = iter(slopes)
    none = jax.dtypes.float0
    return jax.tree.unflatten(
        tree, [next(each) if is_floating(leaf) else np.zeros(jnp.shape(leaf), none) for leaf in leaves]
    )
