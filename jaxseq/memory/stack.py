"""Stack-augmented recurrent networks."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.memory.machine import Machine, split


class StackRNNState(NamedTuple):
    """The state of a stack-augmented network: its stacks, the top first, and what was last done to them.

    The actions of a stack are how much it was pushed, popped and left alone; they sum to 1.
    """

    controller: Any
    stacks: Float[Array, "*batch stack place word"]
    actions: Float[Array, "*batch stack 3"]


class StackRNN(Machine):
    """A network with `stacks` differentiable stacks of `memory_size` words of `word_size` numbers.

        s', h = cell(s, [x; the top `depth` words of each stack]),   y = [h; the tops after it]

        each stack:  (push, pop, stay) = softmax(h A + a),   v = σ(h D + d)
            S'_0 = push v       + pop S_1     + stay S_0
            S'_i = push S_{i-1} + pop S_{i+1} + stay S_i

    Below the last place, and everywhere at first, a stack holds `empty`, by which a network sees that there is nothing;
    what is pushed beyond the last place is lost. The paper's network has an `Elman` controller with "sigmoid", words of
    1 number and `depth` 2, and its output reads h alone. Without "stay", as there in the simplest form, a network
    learns to keep it near 0.

    A. Joulin and T. Mikolov, Inferring algorithmic patterns with stack-augmented recurrent nets, NeurIPS 2015.

    >>> import jaxseq as js
    >>> cell = StackRNN(js.Elman(3 + 2 * 2, 8, activation="sigmoid"), memory_size=10, stacks=2, depth=2)
    >>> state, ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((4, 6, 3)))
    >>> ys.shape, state.stacks.shape, state.actions.shape
    ((4, 6, 12), (4, 2, 10, 1), (4, 2, 3))
    """

    memory_size: int
    word_size: int = 1
    _: dataclasses.KW_ONLY
    stacks: int = 1
    depth: int = 1
    empty: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stacks < 1:
            raise ValueError(f"StackRNN needs stacks >= 1, got {self.stacks}.")
        if not 1 <= self.depth <= self.memory_size:
            raise ValueError(
                f"StackRNN reads at least 1 word of a stack, and at most its memory_size, {self.memory_size}, got "
                f"depth={self.depth}."
            )

    @property
    def read_size(self) -> int:
        return self.stacks * self.depth * self.word_size

    @property
    def interface_size(self) -> int:
        return self.stacks * (3 + self.word_size)

    def start(self, controller: Any, batch_shape: tuple[int, ...], dtype: Any) -> StackRNNState:
        stacks = jnp.full((*batch_shape, self.stacks, self.memory_size, self.word_size), self.empty, dtype)
        actions = jnp.zeros((*batch_shape, self.stacks, 3), dtype).at[..., 2].set(1)
        return StackRNNState(controller, stacks, actions)

    def reads(self, state: StackRNNState) -> Float[Array, "*batch read"]:
        top = state.stacks[..., : self.depth, :]
        return top.reshape(*top.shape[:-3], self.read_size)

    def access(self, state: StackRNNState, interface: Float[Array, "*batch interface"]) -> StackRNNState:
        actions, pushed = split(interface, (self.stacks, 3), (self.stacks, 1, self.word_size))
        actions = jax.nn.softmax(actions, axis=-1)
        push, pop, stay = jnp.moveaxis(actions[..., None, None], -3, 0)
        stacks = state.stacks
        down = jnp.concatenate([jax.nn.sigmoid(pushed), stacks[..., :-1, :]], axis=-2)
        up = jnp.concatenate([stacks[..., 1:, :], jnp.full_like(stacks[..., :1, :], self.empty)], axis=-2)
        return StackRNNState(state.controller, push * down + pop * up + stay * stacks, actions)
