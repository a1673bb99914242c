"""The gradient of a loss with respect to the states of any cell along a sequence."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxseq.core import errors
from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.equations import evaluate, inline, read
from jaxseq.core.sharding import leading_spec, placed
from jaxseq.core.unroll import Run, step_of, unroll_steps
from jaxseq.core.wrapper import Reader
from jaxseq.gradients.jacobians import Accompanied, Beside, check_real, is_floating


def state_gradients(
    cell: Cell,
    params: Params,
    xs: Any,
    loss: Callable[[Any], Float[Array, ""]],
    state: State = None,
    *,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    key: Array | None = None,
) -> list[Float[Array, "*batch_time_features"]]:
    """The gradient of a loss of the outputs with respect to the state after each step, for each array of the state.

    It is the total derivative: the loss depends on the state of step t through all that the step computes from it, such
    as its output or the layers above, and through all later steps. Where `mask` is False it is 0.

    What counts is what the step computes from the arrays that it returns as its state. It misses what a step computes
    beside them from what they are made of: an output that reads a complex number whose parts the state holds, or all
    that one traced call (`jax.checkpoint`, `lax.scan`) gives together with the state.

    Args:
        cell: any cell; arrays of its state that are no floating numbers, which have no gradient, are left out.
        params: its params.
        xs: what it reads.
        loss: a scalar of the outputs `ys`, module-level or not.
        state: the state to start from, by default `initial_state`.
        mask: as for `unroll`, and so are `reset` and `key`.
        reset: gradients do not pass a reset.
        key: for noise.

    Raises:
        TypeError: if the state has no floating numbers, or complex ones.

    >>> import jaxseq as js
    >>> cell = js.Plain(js.Elman(1, 1, activation="identity"))
    >>> params = js.GatedParams(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 0.5), jnp.zeros((1, 1)))
    >>> (hidden,) = state_gradients(cell, params, jnp.ones((3, 1)), lambda ys: ys[-1, 0])
    >>> hidden[:, 0].tolist()
    [0.25, 0.5, 1.0]
    """
    options: Any = {"mask": mask, "reset": reset, "key": key}
    watched = functools.partial(_Watched(cell).unroll, **options)
    last, states = jax.eval_shape(watched, params, xs, state)
    check_real("state", last)
    zeros = [
        placed(jnp.zeros(leaf.shape, leaf.dtype), leading_spec(leaf, leaf.ndim))
        for leaf in jax.tree.leaves(states)
        if is_floating(leaf)
    ]
    if not zeros:
        raise TypeError(f"The state of {cell} has no floating numbers, and so no gradients: {errors.shape_of(last)}.")
    return jax.grad(lambda shifts: loss(_Shifted(cell).unroll(Beside(params, shifts), xs, state, **options)[1]))(zeros)


def stable_norm(vectors: Float[Array, "*batch units"]) -> Float[Array, "*batch"]:
    """The norm along the last axis, also of numbers whose squares no float holds; its gradient at 0 is 0.

    It is inf or NaN where a vector holds inf or NaN.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, initial=0))
    largest = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = jnp.sum((vectors / largest[..., None]) ** 2, axis=-1)
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares))) * largest


class _Watched(Reader, function="state_gradients"):
    """Gives the state after each step instead of outputs."""

    def _unroll(self, params: Params, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        step, inputs = step_of(self.cell, params, xs, run)
        return lax.scan(lambda state, x: (step(state, x)[0],) * 2, state, inputs, length=run.length)


class _Shifted(Accompanied, function="state_gradients"):
    """A cell whose params come with sequences that are added to its states, where its step computes them.

    So all that the step computes from them, such as its output, is shifted with them.
    """

    def _unroll(self, params: Beside, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        shifts = [jnp.moveaxis(shift, len(run.batch_shape), 0) for shift in params.more]
        return unroll_steps(lax.scan, self, params, (xs, shifts), state, run)

    def step(self, params: Beside, state: State, x: Any, key: Array | None = None) -> tuple[State, Any]:
        x, shifts = x
        arguments = (params.cell, state, x, key)
        traced, shapes = jax.make_jaxpr(self.cell.step, return_shape=True)(*arguments)
        equations, outputs = inline(traced.jaxpr)
        values = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        values.update(zip(traced.jaxpr.invars, jax.tree.leaves(arguments), strict=True))
        new = [atom for atom in outputs[: len(jax.tree.leaves(state))] if is_floating(atom.aval)]
        pending = {id(atom): shift for atom, shift in reversed(list(zip(new, shifts, strict=True)))}  # one for each
        for equation in equations:
            evaluate([equation], values)
            for variable in equation.outvars:
                if (shift := pending.pop(id(variable), None)) is not None:
                    values[variable] = values[variable] + shift
        leaves = [read(values, atom) for atom in outputs]  # what no equation computed is shifted here
        leaves = [leaf + pending.get(id(atom), 0) for leaf, atom in zip(leaves, outputs, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
