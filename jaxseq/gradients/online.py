"""Gradients forward in time: after each step, without storing the steps before.

Real-time recurrent learning carries beside the state its *influence*, the derivative of the state with respect to the
params, and each step gives the gradient of its own loss: memory does not grow with time, and params may change while
the sequence goes on. The influence has the size of state times params; that of the params alone in a diagonal
recurrence and, by the approximation SnAp-1, in others.

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
from jaxseq.core.sharding import leading_spec, placed
from jaxseq.core.unroll import Run, scan_from_fresh, step_of
from jaxseq.gradients.forms import Form, check_influence, form_of
from jaxseq.gradients.influences import At, contract, derivatives, floats_of, initial, push
from jaxseq.gradients.jacobians import Accompanied, Beside, flatten, is_floating

Method = Literal["rtrl", "snap1"]


class Influence(NamedTuple):
    """A state, and how it changes with each floating array of the params, in their order: see `start`."""

    state: Any
    influence: list[Array | None]


def start(cell: Cell, params: Params, batch_shape: tuple[int, ...] = (), *, method: Method = "rtrl") -> Influence:
    """The initial state with its influence.

    "rtrl" is exact for any cell. Of a state of n floating numbers it carries `[*batch, n, *param]` for each array of
    the params, and a step multiplies it by the Jacobian: n² times the params, for small states. Where each unit reads
    no unit but itself, as in an IndRNN, LRU, S5, RGLRU, MinGRU or MinLSTM, with what reads their states after them, it
    carries of the params of a unit the influence on that unit alone, `[*batch, k, *param]` for a state of k arrays, and
    is exact as well. A step then costs about as much as k + 1 steps of back-propagation.

    "snap1" is that for cells whose units do read each other: an approximation which of the state's Jacobian keeps what
    each unit reads of itself, at the same cost. Its loss of each step counts the params of that step exactly. It needs
    a state whose arrays all have the units as their one axis, and params that change the new state of the unit that is
    their last axis alone, the state before being given. So it is in an Elman, LSTM or GRU, but not where units mix
    within a step: a normalisation over units, a gate that multiplies the state before the recurrent product, a layer
    below.

    Params that change no state, those of a readout, carry None. All this is read from the equations of the cell's step:
    what they do not show counts as dense. Influences are held in float32 at least.

    R. J. Williams and D. Zipser, A learning algorithm for continually running fully recurrent neural networks, Neural
    Computation 1, 1989; J. Menick et al., Practical real time recurrent learning with a sparse approximation, ICLR
    2021.

    Raises:
        ValueError: if the method is unknown.
        TypeError: if the state has no floating numbers, or complex ones (LRU and S5 hold their parts); for "snap1" also
            if an array has another last axis, or units mix within a step.

    >>> import jaxseq as js
    >>> cell = js.LSTM(2, 3)
    >>> params = cell.init(jax.random.key(0))
    >>> [leaf.shape for leaf in start(cell, params).influence]
    [(6, 2, 4, 3), (6, 3, 4, 3), (6, 4, 3)]
    >>> [leaf.shape for leaf in start(cell, params, method="snap1").influence]
    [(2, 2, 4, 3), (2, 3, 4, 3), (2, 4, 3)]
    >>> cell = js.MinGRU(2, 3)
    >>> [leaf.shape for leaf in start(cell, cell.init(jax.random.key(0))).influence]
    [(1, 2, 2, 3), (1, 2, 3)]
    """
    form = form_of(cell, params, batch_shape, method)
    return Influence(cell.initial_state(params, batch_shape), initial(form, cell, params))


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
    first = jax.tree.leaves(carry.state)[0]
    form = form_of(cell, params, first.shape[: first.ndim - single[0].ndim], method)
    carry, value, slopes = _advance(form, lambda batch_shape: cell.step, params, carry, x, key, loss)
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
            influence = placed(influence, leading_spec(state, rank))
        for leaf in map(jnp.asarray, jax.tree.leaves(targets)):
            if leaf.shape[: rank + 1] != (*run.batch_shape, run.length):
                raise ValueError(
                    f"These inputs need targets [*batch, time, ...] = {(*run.batch_shape, run.length)}, got "
                    f"{errors.shape_of(targets)}."
                )
        targets = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, rank, 0), targets)
        form = form_of(self.cell, params, run.batch_shape, self.method)

        def at(batch_shape):
            def step(params, state, inputs, key):
                return step_of(self.cell, params, None, run._replace(batch_shape=batch_shape))[0](state, (*inputs, key))

            return step

        def body(carried, arrays):
            carry, sums = carried
            inputs, key, target = arrays

            def loss(y):
                losses = self.loss(y, target)
                if jnp.shape(losses) != run.batch_shape:
                    raise ValueError(
                        f"The loss of one step needs to give [*batch] = {run.batch_shape}, it gave {jnp.shape(losses)}."
                    )
                return jnp.sum(losses if run.keep is None else masks.zero_unless(inputs[1], losses))

            carry, *terms = _advance(form, at, params, carry, inputs, key, loss)
            return (carry, _add_to(sums, tuple(terms))), ()

        slopes = [jnp.zeros_like(leaf) for leaf in floats_of(params)[0]]
        sums = (jnp.zeros((), slopes[0].dtype), slopes)
        first = (Influence(state, influence), jax.tree.map(widen, sums))  # small terms of long sums are not lost
        sequences = ((xs, run.keep, run.reset), run.keys, targets)
        (carry, wide), _ = scan_from_fresh(lax.scan, body, first, sequences, run.length, run.reverse)
        value, slopes = _add_to(sums, wide)
        return (carry, value, _like(params, slopes)), ()


def _advance(
    form: Form, at: At, params: Params, carry: Influence, inputs: Any, key: Any, loss: Callable[[Any], Array]
) -> tuple[Influence, Array, list[Array]]:
    """The next carry, the loss, and its gradient: that of this step, and through the influence that of those before."""
    check_influence(form, params, carry.state, carry.influence)
    vector, unflatten = flatten(carry.state, form.rank)
    floats, rebuild = floats_of(params)

    def value_of(floats, vector):
        state, y = at(form.batch_shape)(rebuild(floats), unflatten(vector), inputs, key)
        return loss(y), state

    (value, state), (direct, of_state) = jax.value_and_grad(value_of, (0, 1), has_aux=True)(floats, vector)
    slopes = [widen(own) + part for own, part in zip(direct, contract(form, of_state, carry.influence), strict=True)]
    local, now = derivatives(form, at, params, carry.state, inputs, key)
    return Influence(state, push(form, local, carry.influence, now)), value, slopes


def _add_to(sums: Any, terms: Any) -> Any:
    """Sums in the dtypes that they have."""
    return jax.tree.map(lambda total, term: total + term.astype(total.dtype), sums, terms)


def _like(params: Params, slopes: list[Array]) -> Params:
    """Gradients of the floating arrays as a tree like the params; others have gradients of the dtype float0."""
    leaves, tree = jax.tree.flatten(params)
    each = iter(slopes)
    none = jax.dtypes.float0
    return jax.tree.unflatten(
        tree,
        [
            next(each).astype(leaf.dtype) if is_floating(leaf) else np.zeros(jnp.shape(leaf), none)
            for leaf in map(jnp.asarray, leaves)
        ],
    )
