"""Language models: truncated back-propagation through time over windows of tokens, and exact scoring."""

import dataclasses
import functools
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


@functools.partial(jax.jit, static_argnames=("cell", "optimizer", "batch"))
def initial_state(cell: Cell, optimizer: optax.GradientTransformation, key: Key[Array, ""], batch: int) -> TrainState:
    """The state before the first step of training with `batch` streams."""
    params = cell.init(key)
    return TrainState(params, optimizer.init(params), cell.initial_state(params, (batch,)))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A step of truncated back-propagation through time for `loop.fit`, with windows and a key as its data.

    Step n reads window n modulo their number, from the state in which the window before it ended: gradients stop at
    the window's start, values do not. With the first window the state begins anew. The noise of step n comes from
    `jax.random.fold_in(key, n)`. The metrics are the mean cross-entropy of the window's targets, in nats as `loss` and
    in bits as `bits_per_<unit>`.

    Clipping is part of the optimizer: `optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))` bounds the norm
    of a gradient and keeps its direction, `optax.clip(0.1)` in its place bounds each value by itself.

    Equal steps compile once; optax optimizers are equal if they are the same object.
    """

    cell: Cell
    optimizer: optax.GradientTransformation
    unit: str = "token"

    def __call__(
        self, state: TrainState, number: Any, data: tuple[Windows, Key[Array, ""]]
    ) -> tuple[TrainState, dict[str, Array]]:
        """The next state, and the metrics of window `number`."""
        windows, key = data
        index = number % windows.inputs.shape[0]
        inputs, targets = (jnp.asarray(tokens)[index] for tokens in windows)
        start = self.cell.initial_state(state.params, inputs.shape[:1])
        carry = jax.tree.map(lambda first, last: jnp.where(index == 0, first, last), start, state.carry)

        def loss(params: Params) -> tuple[Array, Any]:
            carried, logits = self.cell.unroll(params, inputs, carry, key=jax.random.fold_in(key, number))
            return losses.cross_entropy(logits, targets).mean(), carried

        (value, carried), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer_state = self.optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, f"bits_per_{self.unit}": value / np.log(2)}
        return TrainState(params, optimizer_state, carried), metrics


@functools.partial(jax.jit, static_argnums=0)
def score(cell: Cell, params: Params, windows: ScoringWindows) -> Float[Array, ""]:
    """The mean cross-entropy in bits of the targets that the windows score."""

    def read(carry: Any, window: ScoringWindows) -> tuple[Any, tuple[Array, Array]]:
        inputs, targets, exists, scored = map(jnp.asarray, window)
        carry, logits = cell.unroll(params, inputs, carry, mask=exists)
        return carry, (losses.cross_entropy(logits, targets, scored).sum(), scored.sum())

    batch = windows.inputs.shape[1]
    _, (total, count) = jax.lax.scan(read, cell.initial_state(params, (batch,)), windows)
    return total.sum() / count.sum() / np.log(2)
