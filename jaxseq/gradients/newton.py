"""All steps of a recurrence at once, by Newton's method."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors
from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.unroll import Run, step_of
from jaxseq.core.wrapper import Reader
from jaxseq.gradients.affine import affine_scan
from jaxseq.gradients.jacobians import flatten, is_floating, jacobian, over_time
from jaxseq.gradients.units import diagonal


class NewtonInfo(NamedTuple):
    """How a parallel unroll went: whether it converged, after how many iterations, and how far the steps disagree.

    `residual` is the largest |f(h_(t-1)) - h_t| over all steps, rows and units. It is a backward error: each step is
    right for the state before it, but a chaotic recurrence, which lets small errors grow, may converge and still differ
    from `unroll`. Where `converged` is False the result is that of the sequential loop, and the residual what the
    iterations had left.
    """

    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    residual: Float[Array, ""]


def newton_unroll(
    cell: Cell,
    params: Params,
    xs: Any,
    state: State = None,
    *,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    key: Array | None = None,
    length: int | None = None,
    method: Literal["newton", "quasi"] = "newton",
    damping: float = 0.0,
    max_iterations: int = 100,
    tolerance: float | None = None,
) -> tuple[State, Any, NewtonInfo]:
    """`cell.unroll`, computed for all steps at once: a few parallel iterations instead of a loop over time.

    From a guess of all states, each iteration linearises every step around the guess and solves the linear recurrence

        h_t = f(g_(t-1)) + A_t (h_(t-1) - g_(t-1)),   A_t = ∂f/∂h at g_(t-1)

    for all t by one parallel scan; k iterations make the first k states exact, and a contracting recurrence needs few
    in all. It is meant for accelerators, long sequences and, with dense Jacobians, few units: "newton" (DEER) takes
    O(time units²) memory and O(time units³) work an iteration, "quasi" keeps the diagonals of A, which takes
    O(time units) memory but more iterations. A diagonal costs one more pass through all steps for each array of the
    state that reaches itself unit by unit, or by one product with a kernel (of an Elman, LSTM, GRU), and as many as it
    has numbers for any other. If the iterations do not converge, the result comes from the loop over
    time. (Under `vmap` both are computed.)

    The gradient does not go through the iterations: it solves the adjoint recurrence, which is linear, by a parallel
    scan too. With "quasi" that scan is a preconditioner and the solution is refined with products of the full Jacobian,
    until what is left of the equations is within the default tolerance in each row and unit, or else computed by a
    loop. So gradients are those of `unroll` with either method; forward mode
    and second derivatives work as well.

    Y. H. Lim et al., Parallelizing non-linear sequential models over the sequence length, ICLR 2024; the diagonal and
    damping: X. Gonzalez et al., Towards scalable and stable parallelization of nonlinear RNNs, NeurIPS 2024.

    Args:
        cell: any cell whose state is floating numbers.
        params: its params.
        xs: the inputs, as for `unroll`; so are `state`, `mask`, `reset`, `key` and `length`.
        state: the state to start from, by default `initial_state`.
        mask: False at padding.
        reset: True where a new segment begins.
        key: for noise, the same as that of `unroll`.
        length: the number of steps, needed only without inputs.
        method: "newton" for dense Jacobians, "quasi" for their diagonals.
        damping: from 0 to 1; A is multiplied by 1 - damping, which helps where Newton's steps overshoot.
        max_iterations: after so many the loop over time takes over.
        tolerance: of what is left at each step, row and unit, relative to the state there, or to 1 if it is smaller; by
            default eps ** 0.75 of the dtype.

    Returns:
        The final state, the outputs, and how it went.

    Raises:
        TypeError: if the state holds anything but floating numbers.
        ValueError: if an option is out of its range, or as `unroll`.

    >>> import jaxseq as js
    >>> cell = js.GRU(2, 3)
    >>> params, xs = cell.init(jax.random.key(0)), jnp.ones((50, 2))
    >>> state, ys, info = newton_unroll(cell, params, xs)
    >>> bool(info.converged), bool(jnp.allclose(ys, cell.unroll(params, xs)[1], atol=1e-5))
    (True, True)
    """
    solver = _Newton(cell, method, damping, max_iterations, tolerance)
    (state, info), ys = solver.unroll(params, xs, state, mask=mask, reset=reset, key=key, length=length)
    return state, ys, info


class _Newton(Reader, function="newton_unroll"):
    """Unrolls in parallel; the state that it returns comes with a `NewtonInfo`."""

    method: Literal["newton", "quasi"]
    damping: float
    max_iterations: int
    tolerance: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("newton", "quasi"):
            raise ValueError(f'The method of newton_unroll is "newton" or "quasi", got {self.method!r}.')
        if not 0 <= self.damping <= 1:
            raise ValueError(f"newton_unroll needs 0 <= damping <= 1, got {self.damping}.")
        if self.max_iterations < 1:
            raise ValueError(f"newton_unroll needs max_iterations >= 1, got {self.max_iterations}.")

    def _unroll(self, params: Any, xs: Any, state: State, run: Run) -> tuple[Any, Any]:
        if not all(map(is_floating, jax.tree.leaves(state))):
            raise TypeError(
                f"newton_unroll differentiates the state, but that of {self.cell} holds other than floating numbers: "
                f"{errors.shape_of(state)}. Use unroll."
            )
        if run.length == 0 or not jax.tree.leaves(state):
            state, ys = self.cell._unroll(params, xs, state, run)
            return (state, NewtonInfo(jnp.array(True), jnp.array(0), jnp.array(0.0))), ys
        start, unflatten = flatten(state, len(run.batch_shape))
        inputs = step_of(self.cell, params, xs, run)[1]
        problem = _Problem(self, run, unflatten)
        states, info = _solve(problem, (params, inputs, start))
        ys = over_time(lambda vector, x: problem.step(params)(vector, x)[1], run)(before(start, states), inputs)
        return (unflatten(states[-1]), info), ys


@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """States `[time, *batch, units]` such that each is the step of the one before; operands: params, inputs, start."""

    solver: _Newton
    run: Run
    unflatten: Callable[[Array], Any]

    def step(self, params: Params) -> Callable[[Array, Any], tuple[Array, Any]]:
        step, _ = step_of(self.solver.cell, params, None, self.run)

        def on_vector(vector, inputs):
            state, y = step(self.unflatten(vector), inputs)
            return flatten(state, len(self.run.batch_shape))[0], y

        return on_vector

    def stepped(self, operands: Any, states: Array) -> Array:
        """What the steps make of the states before them."""
        params, inputs, start = operands
        step = self.step(params)
        return over_time(lambda vector, x: step(vector, x)[0], self.run)(before(start, states), inputs)

    def local(self, operands: Any, states: Array) -> Array:
        """The Jacobian of each step, `[time, *batch, units, units]`, or its diagonal."""
        params, inputs, start = operands
        step = self.step(params)
        vectors = before(start, states)
        if self.solver.method == "newton":
            return jacobian(lambda vectors: over_time(lambda v, x: step(v, x)[0], self.run)(vectors, inputs), vectors)
        rank, cell_step = len(self.run.batch_shape), step_of(self.solver.cell, params, None, self.run)[0]

        def of_step(vector, x):
            return flatten(diagonal(lambda state: cell_step(state, x)[0], self.unflatten(vector), rank), rank)[0]

        return over_time(of_step, self.run)(vectors, inputs)

    def tolerance(self, dtype: Any) -> float:
        given = self.solver.tolerance
        return float(jnp.finfo(dtype).eps) ** 0.75 if given is None else given


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(problem: _Problem, operands: Any) -> tuple[Array, NewtonInfo]:
    """The states of all steps."""
    start, solver = operands[-1], problem.solver
    likely = jnp.where(jnp.isfinite(start), start, 0)  # a reset may discard what is not finite
    guess = jnp.broadcast_to(likely, (problem.run.length, *start.shape))
    tolerance = problem.tolerance(start.dtype)

    def solved(states, difference):
        return jnp.all(jnp.abs(difference) <= tolerance * jnp.maximum(jnp.abs(states), 1))  # False for NaN

    def unsolved(carry):
        iteration, states, difference = carry
        return ~solved(states, difference) & (iteration < solver.max_iterations)

    def improve(carry):
        iteration, states, difference = carry
        states = states + affine_scan((1 - solver.damping) * problem.local(operands, states), difference)
        states = jnp.where(jnp.isfinite(states), states, guess)  # early states are exact, later ones may overflow
        return iteration + 1, states, problem.stepped(operands, states) - states

    first = (jnp.array(0), guess, problem.stepped(operands, guess) - guess)
    iterations, states, difference = lax.while_loop(unsolved, improve, first)
    converged, size = solved(states, difference), jnp.max(jnp.abs(difference), initial=0)
    states = lax.cond(converged, lambda: states, lambda: _loop(problem, operands))
    return states, NewtonInfo(converged, iterations, size)


@_solve.defjvp
def _solve_jvp(problem: _Problem, primals: Any, tangents: Any) -> Any:
    """The tangents of the states solve d_t = J_t d_(t-1) + b_t, b_t being what params, inputs and start give."""
    (operands,), (operand_dots,) = primals, tangents
    states, info = _solve(problem, operands)
    _, direct = jax.jvp(lambda operands: problem.stepped(operands, states), (operands,), (operand_dots,))
    _, push = jax.linearize(functools.partial(problem.stepped, operands), states)
    local = problem.local(operands, states)

    def solve(transposed, matvec, b):
        return _refine(problem, operands, states, local, matvec, b, transposed)

    dots = lax.custom_linear_solve(
        lambda d: d - push(d), direct, functools.partial(solve, False), functools.partial(solve, True)
    )
    zeros = NewtonInfo(*(np.zeros((), jax.dtypes.float0),) * 2, jnp.zeros_like(info.residual))  # pyright: ignore
    return (states, info), (dots, zeros)


def _refine(
    problem: _Problem, operands: Any, states: Array, local: Array, matvec: Callable, b: Array, transposed: bool
) -> Array:
    """The solution of the linear recurrence, or its transpose: by scans with `local`, which may be a diagonal only."""
    approximate = functools.partial(affine_scan, local, transposed=transposed)
    tolerance = problem.tolerance(b.dtype)

    def solved(solution, rest):
        size = jnp.max(jnp.maximum(jnp.abs(b), jnp.abs(solution)), axis=0)  # of each row and unit, over time
        return jnp.all((jnp.abs(rest) <= tolerance * size) & jnp.isfinite(rest))

    def unsolved(carry):
        iteration, solution, rest = carry
        return ~solved(solution, rest) & (iteration < problem.solver.max_iterations)

    def improve(carry):
        iteration, solution, rest = carry
        solution = solution + approximate(rest)
        return iteration + 1, solution, b - matvec(solution)

    first = approximate(b)
    _, solution, rest = lax.while_loop(unsolved, improve, (jnp.array(0), first, b - matvec(first)))
    return lax.cond(
        solved(solution, rest), lambda: solution, lambda: _linear_loop(problem, operands, states, b, transposed)
    )


def _loop(problem: _Problem, operands: Any) -> Array:
    """The states by a loop over time."""
    params, inputs, start = operands
    step = problem.step(params)

    def body(vector, x):
        vector, _ = step(vector, x)
        return vector, vector

    return lax.scan(body, start, inputs, length=problem.run.length)[1]


def _linear_loop(problem: _Problem, operands: Any, states: Array, b: Array, transposed: bool) -> Array:
    """The solution of the linear recurrence, or its transpose, by a loop over time."""
    params, inputs, start = operands
    step = problem.step(params)

    def forward(d, arrays):
        vector, x, b = arrays
        d = b + jax.jvp(lambda vector: step(vector, x)[0], (vector,), (d,))[1]
        return d, d

    def backward(pulled, arrays):
        vector, x, b = arrays
        d = b + pulled
        return jax.vjp(lambda vector: step(vector, x)[0], vector)[1](d)[0], d

    arrays = (before(start, states), inputs, b)
    return lax.scan(backward if transposed else forward, jnp.zeros_like(start), arrays, reverse=transposed)[1]


def before(start: Array, states: Array) -> Array:
    """The states before each step."""
    return jnp.concatenate([start[None], states[:-1]])
