"""The readout of a reservoir, or of any other cell, in closed form and in one pass over the data."""

import dataclasses
import functools
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxseq.cells.pointwise import Dense, DenseParams, Map
from jaxseq.combinators.stack import Stack
from jaxseq.core import errors, masks
from jaxseq.core.cell import Params, State
from jaxseq.core.precision import widen
from jaxseq.core.sharding import leading_spec, placed
from jaxseq.core.unroll import Run, scan_chunks
from jaxseq.core.wrapper import Reader

_INVERSES = {  # what a named activation is undone by, and the open range of its values
    "identity": (lambda y: y, -float("inf"), float("inf")),
    "sigmoid": (jax.scipy.special.logit, 0.0, 1.0),
    "tanh": (jnp.arctanh, -1.0, 1.0),
}


def fit_readout(
    model: Stack,
    params: Params,
    xs: Any,
    targets: Float[Array, "*batch time output"],
    state: State = None,
    *,
    ridge: float | Float[Array, ""] = 0.0,
    washout: int = 0,
    weights: Float[Array, "*batch time"] | None = None,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    key: Array | None = None,
) -> Params:
    """The params of a stack with those of the `Dense` that ends it fitted to targets by ridge regression.

        minimise  Σ_t w_t |y_t - h_t V - c|² + ridge |V|²    over V and c

    h_t is what the `Dense` reads: the state of a reservoir, beside the input with `Skip(Reservoir(...))`, or what any
    other cell gives. The intercept c is not penalised. After the `Dense` there may be a `Map` of "tanh" or "sigmoid":
    then it is fitted to the inverse of the targets.

    The sequences are read once, in chunks, and states are not stored: memory does not grow with time. What is kept is
    the triangular factor R of the QR decomposition of all rows [1, h_t, y_t], so digits are lost by the condition of
    the states, not by its square as in the sums h_tᵀ h_t. Directions that the states do not vary in, up to rounding,
    get no weight, as in `np.linalg.lstsq`.

    Derivatives of every order exist with respect to params, inputs, targets, weights and `ridge`, for tuning; with
    small ridges take them in float64. Where directions get no weight, those of the first order are right as long as
    the directions stay as many, the higher ones are not. With respect to a weight of exactly 0 they are 0. Under
    `vmap` over `ridge` alone the pass is made once.

    Args:
        model: a `Stack` of cells that ends in `Dense`, or in `Dense` and `Map`.
        params: its params; those of the `Dense` have no effect.
        xs: the inputs `[*batch, time, *features]`, as for `unroll`. A model under `Feedback` is fitted without it: its
            inputs are the targets one step before (teacher forcing).
        targets: what the model should give, `[*batch, time, output]`. All rows of the batch are fitted together.
        state: of the model where the sequences start; by default `initial_state`.
        ridge: the penalty, on the sum over steps and not on their mean; at least 0.
        washout: this many steps, from the start and from each reset on, are read but not fitted.
        weights: how much each step counts; 0 for a step that is read but not fitted. By default 1.
        mask: False at padding, which is neither read nor fitted.
        reset: True where a new segment begins.
        key: for the noise of layers that have any.

    Raises:
        TypeError: if the model is no such stack, or dtypes differ.
        ValueError: if shapes do not belong together, `ridge`, `washout` or a weight is negative or not finite, no step
            is left to fit, or a fitted target is outside the range of the `Map`. Where they are traced, a negative
            ridge gives NaN, no steps give zeros, and a target counts as the nearest number inside.

    >>> import jaxseq as js
    >>> model = js.Stack((js.Map("identity"), js.Dense(1, 1)))  # a line through points
    >>> xs = jnp.array([[0.0], [1.0], [2.0]])
    >>> params = fit_readout(model, model.init(jax.random.key(0)), xs, 3 * xs + 1)
    >>> bool(jnp.allclose(params[-1].kernel, 3) and jnp.allclose(params[-1].bias, 1))
    True
    """
    cells, dense, function = _split(model)
    if isinstance(washout, bool) or not isinstance(washout, Integral) or washout < 0:
        raise ValueError(f"fit_readout needs a number of steps >= 0 as washout, got {washout!r}.")
    ridge, targets = jnp.asarray(ridge), jnp.asarray(targets)
    if ridge.ndim:
        raise ValueError(f"fit_readout needs one number as ridge, got {errors.shape_of(ridge)}: vmap tries several.")
    if not isinstance(ridge, Tracer) and not 0 <= ridge < float("inf"):
        raise ValueError(f"fit_readout needs a finite ridge >= 0, got {ridge}.")
    count = len(cells.layers)
    model._check(params)
    errors.check_params(dense, params[count])
    errors.check_features(model, targets, dense.output_size, "targets")
    dtype = params[count].kernel.dtype
    errors.check_dtype(model, targets, dtype, "targets")
    for flags, name in ((mask, "mask"), (reset, "reset")):
        if flags is not None:
            errors.check_flags(model, flags, name, targets.shape[:-1])
    weights = jnp.ones(targets.shape[:-1], dtype) if weights is None else jnp.asarray(weights)
    if weights.shape != targets.shape[:-1]:
        raise ValueError(f"fit_readout needs weights {targets.shape[:-1]}, as the targets, got {weights.shape}.")
    fitted = _fitted(int(washout), weights, mask, reset)
    _check_values(function, targets, weights, fitted, f"washout {washout}" + (", the mask" if mask is not None else ""))
    targets = masks.zero_unless(fitted, targets.astype(dtype))
    fitted = _fit(
        _Rows(cells, dense),
        params[:count],
        (xs, _undone(function, targets), masks.zero_unless(fitted, weights.astype(dtype))),
        None if state is None else state[:count],
        ridge.astype(widen(targets).dtype),
        mask,
        reset,
        key,
    )
    return (*params[:count], jax.tree.map(lambda leaf: leaf.astype(dtype), fitted), *params[count + 1 :])


class _Sums(NamedTuple):
    """What is kept of the rows Z = [1, h, y] of all steps: R with RᵀR = ZᵀZ, for values; ZᵀZ, for derivatives."""

    triangle: Float[Array, "column column"]
    products: Float[Array, "column column"]


class _Rows(Reader, function="fit_readout"):
    """Reads (inputs, targets, weights), and gives `(state, _Sums)` as the state."""

    input_names = ("inputs", "targets", "weights")  # pyright: ignore[reportAssignmentType]

    dense: Dense

    @property
    def input_rank(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.cell.input_rank, 1, 0)

    def _unroll(self, params: Any, xs: Any, state: State, run: Run) -> tuple[Any, Any]:
        xs, targets, weights = xs
        roots = jnp.where(weights > 0, jnp.sqrt(jnp.where(weights > 0, weights, 1)), 0)  # no gradient of a root at 0
        steps = (xs, targets, roots, run.keep, run.reset, run.keys)

        @functools.partial(jax.checkpoint, static_argnums=3)
        def read(params, state, steps, length):
            xs, targets, roots, keep, reset, keys = steps
            part = run._replace(length=length, keep=keep, reset=reset, keys=keys)
            state, features = self.cell._unroll(params, xs, state, part)
            errors.check_features(self.dense, features, self.dense.input_size)
            columns = (jnp.ones_like(targets[..., :1]), masks.zero_unless(roots > 0, features), targets)
            whole = PartitionSpec(*[None] * targets.ndim)  # all rows and columns are decomposed together
            rows = placed(roots[..., None], whole) * jnp.concatenate(placed(columns, whole), axis=-1)
            rows = widen(rows.reshape(-1, rows.shape[-1]))
            return state, jax.lax.stop_gradient(rows), rows.T @ rows

        def chunk(carry, steps, length):
            state, sums = carry
            state, rows, products = read(params, state, steps, length)
            triangle = jnp.linalg.qr(jnp.concatenate([sums.triangle, rows]), mode="r")
            return (state, _Sums(triangle, sums.products + products)), ()

        size = 1 + self.dense.input_size + self.dense.output_size
        zeros = jnp.zeros((size, size), widen(targets).dtype)
        every = -(-2 * size // max(1, weights[:1].size))  # so that rows are most of what is decomposed
        return scan_chunks(chunk, (state, _Sums(zeros, zeros)), steps, run.length, every, run.reverse)


@jax.jit(static_argnums=0)
def _fitted(washout: int, weights: Array, mask: Array | None, reset: Array | None) -> Bool[Array, "*batch time"]:
    """Where more than so many steps have been read since the start or the last reset, this one too, and it counts."""
    over_batch = leading_spec((weights, mask, reset), weights.ndim)
    weights, mask, reset = placed((weights, mask, reset), over_batch)
    keep, axis = jnp.ones_like(weights, bool) if mask is None else mask, weights.ndim - 1
    read = jnp.cumsum(keep, axis=axis, dtype=jnp.int32)
    before = 0 if reset is None else jax.lax.cummax(jnp.where(reset, read - keep, 0), axis=axis)
    return keep & (read - before > washout) & (weights > 0)


@functools.partial(jax.jit, static_argnums=0)
def _fit(rows: _Rows, params: Any, xs: Any, state: State, ridge: Array, mask: Any, reset: Any, key: Any) -> DenseParams:
    """The params of the readout from one pass over the sequences."""
    (_, sums), _ = rows.unroll(params, xs, state, mask=mask, reset=reset, key=key)
    ends = 1 + rows.dense.input_size
    triangle, penalty = jax.lax.stop_gradient((sums.triangle, jnp.where(ridge >= 0, ridge, jnp.nan)))
    total = triangle[0, 0] ** 2  # of the weights
    means = jnp.where(total > 0, triangle[0, 1:] / jnp.where(total > 0, triangle[0, 0], 1), 0)
    inputs, outputs = means[: ends - 1], means[ends - 1 :]
    # without its first row and column, R is that of the centred rows
    left, values, right = jnp.linalg.svd(triangle[1:ends, 1:ends])
    cutoff = 8 * jnp.finfo(values.dtype).eps * values[0]  # what rounding adds to them
    squares = values**2 + penalty
    is_used = ~(squares <= cutoff**2)  # a ridge of NaN too
    inverses = jnp.where(is_used, 1 / jnp.where(is_used, squares, 1), 0)
    kernel = right.T @ ((inverses * values)[:, None] * (left.T @ triangle[1:ends, ends:]))
    solution = jnp.concatenate([(outputs - inputs @ kernel)[None], kernel])

    def equations(columns):  # the normal equations, for derivatives
        penalized = jnp.concatenate([jnp.zeros_like(columns[:1]), ridge * columns[1:]])
        return sums.products[:ends, :ends] @ columns + penalized

    def solve(_, columns):
        kernel = right.T @ (inverses[:, None] * (right @ (columns[1:] - inputs[:, None] * columns[:1])))
        bias = columns[0] * jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0) - inputs @ kernel
        return jnp.concatenate([bias[None], kernel])

    # a step of Newton's method from the solution: it is 0, and its derivatives are those of the solution
    rest = _slope(sums.products[:ends, ends:] - equations(solution))
    solution = solution + jax.lax.custom_linear_solve(equations, rest, solve, symmetric=True)

    # of kernels that fit alike the shortest is in the range of the centred products, which turns with them
    source = solve(None, jnp.concatenate([jnp.zeros_like(kernel[:1]), kernel]))[1:]
    totals = sums.products[0, 1:ends]
    share = (totals @ source) / jnp.where(total > 0, sums.products[0, 0], 1)
    centred = sums.products[1:ends, 1:ends] @ source - jnp.outer(totals, share)
    turned = _slope(right.T @ (jnp.where(is_used, 0, 1)[:, None] * (right @ centred)))
    return DenseParams(solution[1:] + turned, solution[0] - inputs @ turned)


@jax.custom_jvp
def _slope(x: Array) -> Array:
    """Zeros with the derivatives of `x`, which is 0 but for rounding."""
    return jnp.zeros_like(x)


@_slope.defjvp
def _slope_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _slope(primals[0]), tangents[0]


def _split(model: Any) -> tuple[Stack, Dense, str]:
    """The cells before the readout, the readout, and the function after it."""
    layers = model.layers if isinstance(model, Stack) else ()
    function = "identity"
    if len(layers) > 2 and isinstance(layers[-1], Map) and isinstance(layers[-2], Dense):
        function, layers = layers[-1].function, layers[:-1]
    if len(layers) < 2 or not isinstance(layers[-1], Dense):
        raise TypeError(
            f"fit_readout fits the Dense that ends a Stack, or stands before a Map at its end, as in "
            f"Stack((Reservoir(1, 100), Dense(100, 1))); got {model}."
        )
    if not isinstance(function, str) or function not in _INVERSES:
        raise TypeError(f"fit_readout knows the inverse of {', '.join(_INVERSES)}, but got {model.layers[-1]} as Map.")
    return dataclasses.replace(model, layers=layers[:-1]), layers[-1], function


def _check_values(function: str, targets: Array, weights: Array, fitted: Array, left_out: str) -> None:
    """Raises ValueError for weights that are none, targets out of range, and if nothing is fitted; not of tracers."""
    if not isinstance(weights, Tracer) and not bool(jnp.all((weights >= 0) & (weights < jnp.inf))):
        given = "negative" if bool(jnp.any(weights < 0)) else "not finite"
        raise ValueError(f"fit_readout needs finite weights >= 0, got one that is {given}.")
    if isinstance(fitted, Tracer):
        return
    if not bool(fitted.any()):
        raise ValueError(
            f"fit_readout has nothing to fit: {left_out} and the weights leave none of {targets.shape[-2]} steps; "
            f"axes are [*batch, time, features], the targets' {targets.shape}."
        )
    _, low, high = _INVERSES[function]
    if not isinstance(targets, Tracer) and bool(jnp.any(fitted[..., None] & ~((targets > low) & (targets < high)))):
        bounded = "" if function == "identity" else f" between {low} and {high}, the range of {function}"
        raise ValueError(f"fit_readout needs finite targets{bounded}.")


def _undone(function: str, targets: Array) -> Array:
    """What the `Dense` gives where `function` of it is the targets."""
    inverse, low, high = _INVERSES[function]
    if function == "identity":
        return targets
    limits = jnp.finfo(targets.dtype)
    return inverse(jnp.clip(targets, low * (1 - limits.epsneg) or limits.tiny, high * (1 - limits.epsneg)))
