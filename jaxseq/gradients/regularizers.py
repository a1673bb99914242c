"""Penalties to add to a loss: on kernels, on activations, and on how a gradient changes on its way back.

>>> import jaxseq as js
>>> cell = js.Stack((js.LSTM(2, 3), js.Dense(3, 1)))
>>> params, xs = cell.init(jax.random.key(0)), jnp.ones((4, 10, 2))
>>> def loss(params):
...     state, ys = cell.unroll(params, xs)
...     return jnp.mean(ys**2) + 1e-4 * l2(cell, params) + 0.1 * temporal_activation(ys)
>>> gradients = jax.grad(loss)(params)

Weight decay, which is not the gradient of a penalty under Adam, is optax's; `kernel_mask` tells it what to decay:
`optax.adamw(1e-3, mask=functools.partial(kernel_mask, cell))`. So is clipping: `optax.clip_by_global_norm(1.0)` before
the optimizer keeps the direction of a gradient, `optax.clip(1.0)` does not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxseq.combinators.normalization import WeightNorm
from jaxseq.combinators.precision import Frozen
from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell, Params, State
from jaxseq.core.kernels import axis_names, check_count
from jaxseq.core.layer import Layer
from jaxseq.core.unroll import Run, step_of
from jaxseq.gradients.flow import stable_norm, state_gradients
from jaxseq.gradients.jacobians import Accompanied, Beside, flatten, on_vectors, over_time


def kernel_mask(layer: Layer, params: Params) -> Any:
    """True for each trained kernel, what has an axis "input" or "recurrent": not for biases, gains, embeddings.

    Nor for what a `Frozen` holds; and where a `WeightNorm` holds directions, whose length means nothing, it is the
    scales that are to be decayed.

    Raises:
        ValueError: if the params are not those of the layer.
        TypeError: if the layer has no kernel.

    >>> import jaxseq as js
    >>> cell = js.Stack((js.Frozen(js.Dense(2, 3)), js.Dense(3, 1)))
    >>> kernel_mask(cell, cell.init(jax.random.key(0)))
    (DenseParams(kernel=False, bias=False), DenseParams(kernel=True, bias=False))
    """

    def scales_for_directions(inner: Layer, flags: Any) -> Any:
        return inner.decayed(flags) if isinstance(inner, WeightNorm) else flags

    return layer.map_layers(scales_for_directions, _trained(layer, params))


def l1(layer: Layer, params: Params) -> Float[Array, ""]:
    """The sum of the absolute values of all trained kernels: not of biases, gains and embeddings, see `kernel_mask`.

    >>> import jaxseq as js
    >>> params = js.GatedParams(jnp.full((2, 1, 1), -1.0), jnp.ones((1, 1, 1)), jnp.ones((1, 1)))
    >>> l1(js.Elman(2, 1), params).item()
    3.0
    """
    return _over_kernels(layer, params, jnp.abs)


def l2(layer: Layer, params: Params) -> Float[Array, ""]:
    """The sum of the squares of all trained kernels: not of biases, gains and embeddings, see `kernel_mask`.

    >>> import jaxseq as js
    >>> params = js.GatedParams(jnp.full((2, 1, 1), 2.0), jnp.ones((1, 1, 1)), jnp.ones((1, 1)))
    >>> l2(js.Elman(2, 1), params).item()
    9.0
    """
    return _over_kernels(layer, params, jnp.square)


def activation(
    ys: Float[Array, "*batch time features"], mask: Bool[Array, "*batch time"] | None = None
) -> Float[Array, ""]:
    """The mean square of outputs (AR), over the steps that the mask keeps; 0 if it keeps none.

    S. Merity et al., Revisiting activation regularization for language RNNs, arXiv:1708.01009, 2017.

    >>> activation(jnp.array([[1.0], [3.0]])).item()
    5.0
    """
    _check_outputs("activation", ys, mask)
    return _mean_square(ys, mask)


def temporal_activation(
    ys: Float[Array, "*batch time features"],
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
) -> Float[Array, ""]:
    """The mean square of the change of outputs from step to step (TAR); 0 if there is no change to count.

    Counts neighbouring steps that the mask both keeps, and of which the second is no reset.

    S. Merity et al., Revisiting activation regularization for language RNNs, arXiv:1708.01009, 2017.

    >>> temporal_activation(jnp.array([[1.0], [3.0], [3.0]])).item()
    2.0
    """
    _check_outputs("temporal_activation", ys, mask, reset)
    counted = None
    if mask is not None or reset is not None:
        counted = jnp.ones(ys[..., 1:, 0].shape, bool)
        counted = counted if mask is None else counted & mask[..., 1:] & mask[..., :-1]
        counted = counted if reset is None else counted & ~reset[..., 1:]
    ys = ys if mask is None else masks.zero_unless(mask, ys)
    return _mean_square(jnp.diff(ys, axis=-2), counted)


def constant_flow(
    cell: Cell,
    params: Params,
    xs: Any,
    loss: Callable[[Any], Float[Array, ""]],
    state: State = None,
    *,
    mask: Bool[Array, "*batch time"] | None = None,
    reset: Bool[Array, "*batch time"] | None = None,
    key: Array | None = None,
) -> Float[Array, "*batch"]:
    """How much the norm of a loss's gradient changes from step to step on its way back, of each row: 0 if it is kept.

        Ω = Σ_t (|dL/dh_t ∂h_t/∂h_(t-1)| / |dL/dh_t| - 1)²

    Here h_t is the whole state after step t. As in the paper, Ω's own gradient takes the states and dL/dh_t as given:
    it reaches the params through the Jacobians ∂h_t/∂h_(t-1) alone. Steps that the mask leaves out, resets, and steps
    to which no gradient comes do not count. Costs about two gradients of the loss.

    Arguments and errors are those of `diagnostics.state_gradients`: `loss` is a scalar of the outputs.

    R. Pascanu et al., On the difficulty of training recurrent neural networks, ICML 2013.

    >>> import jaxseq as js
    >>> cell = js.Elman(1, 2, activation="identity")
    >>> params = js.initializers.identity(cell, cell.init(jax.random.key(0)), scale=0.5)
    >>> constant_flow(cell, params, jnp.ones((3, 1)), lambda ys: ys[-1].sum()).item()  # 3 (1/2 - 1)²
    0.75
    """
    fixed = jax.tree.map(lax.stop_gradient, params)
    gradients = state_gradients(cell, fixed, xs, loss, state, mask=mask, reset=reset, key=key)
    given = Beside(params, [lax.stop_gradient(leaf) for leaf in gradients])
    _, omega = _Omega(cell).unroll(given, xs, state, mask=mask, reset=reset, key=key)
    return omega.sum(axis=-1)


class _Omega(Accompanied, function="constant_flow"):
    """Gives the terms of Ω instead of outputs; its params come with the gradients with respect to the states."""

    def _unroll(self, params: Any, xs: Any, state: State, run: Run) -> tuple[State, Any]:
        rank = len(run.batch_shape)
        gradients = [jnp.moveaxis(leaf, rank, 0) for leaf in params.more]
        step, inputs = step_of(self.cell, params.cell, xs, run)
        state, before = lax.scan(lambda state, x: (step(state, x)[0], state), state, inputs, length=run.length)
        before = jax.tree.map(lax.stop_gradient, before)

        def term(state, x, gradient):
            function, vector = on_vectors(lambda state: step(state, x), state, rank)
            gradient, _ = flatten(gradient, rank)
            (back,) = jax.vjp(function, vector)[1](gradient)
            norm = stable_norm(gradient)
            return jnp.where(norm == 0, 0, (stable_norm(back) / jnp.where(norm == 0, 1, norm) - 1) ** 2)

        terms = over_time(term, run)(before, inputs, gradients)
        return state, terms if run.reset is None else jnp.where(run.reset, 0, terms)


def _trained(layer: Layer, params: Params) -> Any:
    """True for each kernel that is no constant."""
    flags = [not {"input", "recurrent"}.isdisjoint(names) for names in axis_names(layer)]
    if not any(flags):
        raise TypeError(f'{layer} has no kernel: no array of its axes() has an axis "input" or "recurrent".')
    check_count(layer, params, len(flags))

    def but_frozen(inner: Layer, flags: Any) -> Any:
        return jax.tree.map(lambda _: False, flags) if isinstance(inner, Frozen) else flags

    return layer.map_layers(but_frozen, jax.tree.unflatten(jax.tree.structure(params), flags))


def _over_kernels(layer: Layer, params: Params, function: Callable[[Array], Array]) -> Float[Array, ""]:
    def multiplied(inner: Layer, params: Any) -> Any:
        return params._replace(cell=inner.inner(params)) if isinstance(inner, WeightNorm) else params

    flags, params = _trained(layer, params), layer.map_layers(multiplied, params)
    chosen = zip(jax.tree.leaves(params), jax.tree.leaves(flags), strict=True)
    return sum((jnp.sum(function(leaf)) for leaf, is_kernel in chosen if is_kernel), start=jnp.zeros(()))


def _mean_square(values: Array, counted: Array | None) -> Float[Array, ""]:
    counted = jnp.ones(values.shape[:-1], bool) if counted is None else jnp.asarray(counted)
    squares = jnp.mean(masks.zero_unless(counted, values) ** 2, axis=-1)  # zeroed before: no NaN reaches a gradient
    return jnp.sum(squares) / jnp.maximum(counted.sum(), 1).astype(squares.dtype)


def _check_outputs(name: str, ys: Any, *flags: Any) -> None:
    if jnp.ndim(ys) < 2 or not jnp.issubdtype(jnp.result_type(ys), jnp.floating):
        raise ValueError(f"{name} needs outputs [*batch, time, features], got {errors.shape_of(ys)}.")
    for given in flags:
        if given is not None:
            errors.check_flags(name, given, "mask or reset", jnp.shape(ys)[:-1])
