"""What happens to states and gradients over time: for any cell, at any point of training.

>>> import jaxseq as js
>>> cell = js.Stack((js.Elman(2, 3), js.Dense(3, 1)))
>>> params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 10, 2))
>>> gradient_flow(cell, params, xs, lambda ys: jnp.sum(ys[:, -1] ** 2)).shape
(4, 10)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from jaxseq.core import errors
from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.precision import widen
from jaxseq.core.sharding import leading_spec, placed
from jaxseq.core.unroll import Run, step_of
from jaxseq.core.wrapper import Reader
from jaxseq.gradients.flow import stable_norm
from jaxseq.gradients.flow import state_gradients as state_gradients
from jaxseq.gradients.jacobians import flatten, is_floating, jacobian, on_vectors


def gradient_flow(
    cell: Cell,
    params: Params,
    xs: Any,
    loss: Callable[[Any], Float[Array, ""]],
    state: State = None,
    *,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    key: Array | None = None,
) -> Float[Array, "*batch time"]:
    """The norm of dL/dh_t, the gradient of a loss with respect to the whole state after each step; `plots` draws it.

    Arguments and errors are those of `state_gradients`. A norm that falls towards the first steps vanishes, one that
    grows explodes.

    >>> import jaxseq as js
    >>> cell = js.Elman(2, 3)
    >>> flow = gradient_flow(cell, cell.init(jax.random.key(0)), jnp.ones((5, 2)), lambda ys: ys[-1].sum())
    >>> bool(flow[0] < flow[-1])
    True
    """
    gradients = state_gradients(cell, params, xs, loss, state, mask=mask, reset=reset, key=key)
    single = jax.eval_shape(cell.initial_state, params)
    features = next(leaf.ndim for leaf in jax.tree.leaves(single) if is_floating(leaf))
    return stable_norm(flatten(gradients, gradients[0].ndim - features)[0])


class SingularValues(NamedTuple):
    """Singular values, largest first, of the Jacobians of each step and of their products from the first step on."""

    step: Float[Array, "*batch time units"]
    product: Float[Array, "*batch time units"]


def jacobian_singular_values(
    cell: Cell,
    params: Params,
    xs: Any,
    state: State = None,
    *,
    length: int | None = None,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    key: Array | None = None,
) -> SingularValues:
    """The singular values of d h_t / d h_(t-1) and of d h_t / d h_0 along a sequence, h being the whole state.

    They say how much a step, or all steps so far, stretch the directions of the state; for a product from step s on,
    give the inputs from s on and the state there. Arguments are those of `unroll`. At padding the Jacobian is the
    identity, at a reset it is 0. Of a product, values smaller than its largest by the precision of the dtype are noise.

    >>> import jaxseq as js
    >>> cell = js.Elman(1, 2, activation="identity")
    >>> params = js.initializers.identity(cell, cell.init(jax.random.key(0)), scale=0.5)
    >>> jacobian_singular_values(cell, params, jnp.ones((2, 1))).product.tolist()
    [[0.5, 0.5], [0.25, 0.25]]
    """
    _, (step, product) = _Jacobians(cell).unroll(params, xs, state, length=length, mask=mask, reset=reset, key=key)
    return SingularValues(step, product)


def lyapunov_exponents(
    cell: Cell,
    params: Params,
    xs: Any,
    state: State = None,
    *,
    count: int | None = None,
    discard: int = 0,
    length: int | None = None,
    key: Array | None = None,
) -> Float[Array, "*batch count"]:
    """The Lyapunov exponents along a sequence, the mean growth per step of small changes of the state, largest first.

    In nats per step: positive means chaos, all negative that the cell forgets where it began, near 0 that it keeps.
    Perturbations are pushed through the steps' Jacobians and made orthonormal again by a QR decomposition.

    G. Benettin et al., Lyapunov characteristic exponents for smooth dynamical systems, Meccanica 15, 1980; for
    recurrent networks R. Engelken et al., Lyapunov spectra of chaotic recurrent neural networks, Physical Review
    Research 5, 2023.

    Args:
        cell: any cell; arrays of its state that are no floating numbers count as constants.
        params: its params.
        xs: a long sequence, of which each row has its own exponents; None with `length` for a cell without inputs.
        state: where to start, by default `initial_state`.
        count: how many of the largest exponents; all by default.
        discard: the number of first steps that are read but do not count.
        length: the number of steps, where no input tells.
        key: for noise.

    Raises:
        TypeError: if the state has no floating numbers, or complex ones.
        ValueError: if `count` is not from 1 to the number of units, or `discard` leaves no step.

    >>> import jaxseq as js
    >>> cell = js.Elman(1, 2, activation="identity")
    >>> params = js.initializers.identity(cell, cell.init(jax.random.key(0)), scale=0.5)
    >>> exponents = lyapunov_exponents(cell, params, jnp.ones((10, 1)))
    >>> bool(jnp.allclose(exponents, jnp.log(0.5)))
    True
    """
    _, growth = _Growth(cell, count).unroll(params, xs, state, length=length, key=key)
    steps = growth.shape[-2]
    if not 0 <= discard < steps:
        raise ValueError(f"lyapunov_exponents needs 0 <= discard < {steps}, the number of steps, got {discard}.")
    return -jnp.sort(-growth[..., discard:, :].mean(axis=-2), axis=-1)


class FixedPoints(NamedTuple):
    """The distinct fixed points that were found, slowest first.

    `speed` is 1/2 |F(h) - h|^2; `eigenvalues` are those of the step's Jacobian at the point, largest first; `starts` is
    how many starts led to each.
    """

    state: Any
    speed: Float[np.ndarray, "points"]
    eigenvalues: Complex[np.ndarray, "points units"]
    starts: np.ndarray


def fixed_points(
    cell: Cell,
    params: Params,
    x: Any,
    starts: State,
    *,
    steps: int = 2000,
    optimizer: optax.GradientTransformation | None = None,
    tolerance: float = 1e-8,
    distance: float = 1e-2,
) -> FixedPoints:
    """The states that a constant input leaves where they are, found by descent of the speed from many states.

    Minimises q(h) = 1/2 |F(h) - h|^2 from each start; states that end with q up to `tolerance` count, and those nearer
    to each other than `distance` are one. A larger tolerance also gives slow points. The eigenvalues say what a point
    is: all below 1 in magnitude an attractor, one near 1 a direction that remembers. It runs outside of `jit` only.

    D. Sussillo and O. Barak, Opening the black box: low-dimensional dynamics in high-dimensional recurrent neural
    networks, Neural Computation 25, 2013.

    Args:
        cell: any cell; arrays of its state that are no floating numbers stay as they start.
        params: its params.
        x: the input of one step, without batch axes; None for a cell without inputs.
        starts: a state of one batch axis, such as states that a trained cell went through, with noise.
        steps: of the optimizer.
        optimizer: of optax; by default Adam, whose rate falls from 0.1 to 0 along a cosine.
        tolerance: the largest speed of a fixed point.
        distance: between the vectors of states that count as different.

    >>> import jaxseq as js
    >>> cell = js.Elman(1, 1)
    >>> params = js.GatedParams(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 2.0), jnp.zeros((1, 1)))
    >>> found = fixed_points(cell, params, jnp.zeros(1), js.ElmanState(jnp.array([[-0.9], [0.01], [0.5], [0.6]])))
    >>> bool(np.allclose(np.sort(found.state.hidden[:, 0]), [-0.9575, 0, 0.9575], atol=1e-4))  # h = tanh(2 h)
    True
    """
    count = jax.tree.leaves(starts)[0].shape[0]
    xs = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), x)
    errors.check_state(cell, starts, jax.eval_shape(lambda params: cell.initial_state(params, (count,)), params))
    states, vectors, speeds, jacobians = map(
        lambda tree: jax.tree.map(np.asarray, tree), _descend(cell, optimizer, steps, params, xs, starts)
    )
    chosen, members = [], []
    for index in np.argsort(speeds):
        if not speeds[index] <= tolerance:
            break
        near = [n for n, other in enumerate(chosen) if np.linalg.norm(vectors[index] - vectors[other]) < distance]
        if near:
            members[near[0]] += 1
        else:
            chosen.append(index)
            members.append(1)
    chosen = np.array(chosen, int)
    eigenvalues = np.linalg.eigvals(jacobians[chosen].astype(np.promote_types(jacobians.dtype, np.float32)))
    order = np.argsort(-np.abs(eigenvalues), axis=-1)
    eigenvalues = np.take_along_axis(eigenvalues, order, -1).astype(complex)
    return FixedPoints(
        jax.tree.map(lambda leaf: leaf[chosen], states), speeds[chosen], eigenvalues, np.array(members, int)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(cell: Cell, optimizer: Any, steps: int, params: Params, xs: Any, starts: State) -> tuple[Any, ...]:
    """The states that minimise the speed, their vectors, speeds and Jacobians."""
    optimizer = optimizer or optax.adam(optax.cosine_decay_schedule(0.1, steps))
    advance, start = on_vectors(lambda state: cell.step(params, state, xs), starts, 1)

    def speed(vectors):
        return jnp.sum((advance(vectors) - vectors) ** 2, axis=-1) / 2

    def improve(carry, _):
        vectors, moments = carry
        updates, moments = optimizer.update(jax.grad(lambda v: speed(v).sum())(vectors), moments, vectors)
        return (optax.apply_updates(vectors, updates), moments), None

    (vectors, _), _ = lax.scan(improve, (start, optimizer.init(start)), length=steps)
    vectors = jnp.asarray(vectors)
    return flatten(starts, 1)[1](vectors), vectors, speed(vectors), jacobian(advance, vectors)


class _Jacobians(Reader, function="jacobian_singular_values"):
    """Gives the singular values of the Jacobians of the steps, and of their products, instead of outputs."""

    def _unroll(self, params: Any, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        step, inputs = step_of(self.cell, params, xs, run)
        units = flatten(state, len(run.batch_shape))[0].shape[-1]

        def body(carry, inputs):
            state, product, scale = carry
            function, vector = on_vectors(lambda state: step(state, inputs), state, len(run.batch_shape))
            local = widen(jacobian(function, vector))
            product = local @ product
            largest = jnp.max(jnp.abs(product), axis=(-2, -1), keepdims=True)
            largest = jnp.where(largest > 0, largest, 1)  # kept near 1: long products leave the range of floats
            product, scale = product / largest, scale + jnp.log(largest[..., 0])
            return (step(state, inputs)[0], product, scale), (local, product, scale)

        dtype = widen(flatten(state, len(run.batch_shape))[0]).dtype
        identity = jnp.broadcast_to(jnp.eye(units, dtype=dtype), (*run.batch_shape, units, units))
        start = (identity, jnp.zeros((*run.batch_shape, 1), dtype))
        carry = (state, *placed(start, leading_spec(state, len(run.batch_shape))))
        (state, *_), (local, product, scale) = lax.scan(body, carry, inputs, length=run.length, reverse=run.reverse)
        singular = functools.partial(jnp.linalg.svd, compute_uv=False)
        return state, (singular(local), singular(product) * jnp.exp(scale))


class _Growth(Reader, function="lyapunov_exponents"):
    """Gives the log of the growth of orthonormal perturbations in each step instead of outputs."""

    count: int | None

    def _unroll(self, params: Any, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        step, inputs = step_of(self.cell, params, xs, run)
        rank = len(run.batch_shape)
        start, _ = flatten(state, rank)
        units = start.shape[-1]
        count = units if self.count is None else self.count
        if not 1 <= count <= units:
            raise ValueError(f"{self.cell} has {units} Lyapunov exponents: count is from 1 to {units}, got {count}.")

        def body(carry, inputs):
            state, directions = carry
            function, vector = on_vectors(lambda state: step(state, inputs), state, rank)
            _, push = jax.linearize(function, vector)
            pushed = jax.vmap(push, in_axes=-1, out_axes=-1)(directions.astype(start.dtype))
            directions, lengths = jnp.linalg.qr(widen(pushed))
            growth = jnp.log(jnp.abs(jnp.diagonal(lengths, axis1=-2, axis2=-1)))
            return (step(state, inputs)[0], directions), growth

        generic = jax.random.normal(jax.random.key(0), (units, count), widen(start).dtype)  # no axis is singled out
        directions = jnp.broadcast_to(jnp.linalg.qr(generic)[0], (*run.batch_shape, units, count))
        directions = placed(directions, leading_spec(state, rank))
        (state, _), growth = lax.scan(body, (state, directions), inputs, length=run.length)
        return state, growth
