"""Language models: truncated back-propagation through time over windows of tokens, and exact scoring."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from jaxseq import losses
from jaxseq.core.cell import Cell, Params
from jaxseq.training.data import ScoringWindows, Windows


class TrainState(NamedTuple):
    """All that a later step needs: `carry` is the state of the cell at the end of the last window."""

    params: Params
    optimizer: Any
    carry: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def initial_state(cell: Cell, optimizer: optax.GradientTransformation, key: Key[Array, ""], batch: int) -> TrainState:
    """The state before the first step of training with `batch` streams."""
    params = cell.init(key)
    return TrainState(params, optimizer.init(params), cell.initial_state(params, (batch,)))


def train_step(
    cell: Cell, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> Callable[[TrainState, Any, Windows], tuple[TrainState, dict[str, Array]]]:
    """A step of truncated back-propagation through time, for `loop.fit` with `Windows` as its data.

    Step n reads window n modulo their number, from the state in which the window before it ended: gradients stop at
    the window's start, values do not. With the first window the state begins anew. The noise of step n comes from
    `jax.random.fold_in(key, n)`. The loss is the mean cross-entropy of the window's targets in nats.
    """

    def step(state: TrainState, number: Any, data: Windows) -> tuple[TrainState, dict[str, Array]]:
        index = number % data.inputs.shape[0]
        inputs, targets = (jnp.asarray(tokens)[index] for tokens in data)
        start = cell.initial_state(state.params, inputs.shape[:1])
        carry = jax.tree.map(lambda first, last: jnp.where(index == 0, first, last), start, state.carry)

        def loss(params: Params) -> tuple[Array, Any]:
            carried, logits = cell.unroll(params, inputs, carry, key=jax.random.fold_in(key, number))
            return losses.cross_entropy(logits, targets).mean(), carried

        (value, carried), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, carried), {"loss": value, "bits": value / np.log(2)}

    return step


def scorer(cell: Cell) -> Callable[[Params, ScoringWindows], Float[Array, ""]]:
    """`score(params, windows)`: the mean cross-entropy in bits of the targets that the windows score."""

    @jax.jit
    def score(params: Params, windows: ScoringWindows) -> Float[Array, ""]:
        def read(carry: Any, window: ScoringWindows) -> tuple[Any, tuple[Array, Array]]:
            inputs, targets, exists, scored = map(jnp.asarray, window)
            carry, logits = cell.unroll(params, inputs, carry, mask=exists)
            return carry, (losses.cross_entropy(logits, targets, scored).sum(), scored.sum())

        batch = windows.inputs.shape[1]
        _, (total, count) = jax.lax.scan(read, cell.initial_state(params, (batch,)), windows)
        return total.sum() / count.sum() / np.log(2)

    return score
