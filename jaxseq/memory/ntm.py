"""The neural Turing machine."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.memory import addressing
from jaxseq.memory.machine import Machine, split


class NTMState(NamedTuple):
    """The state of a neural Turing machine: its memory, where its heads are, and what they have read."""

    controller: Any
    memory: Float[Array, "*batch place word"]
    read_weights: Float[Array, "*batch read_head place"]
    write_weights: Float[Array, "*batch write_head place"]
    words: Float[Array, "*batch read_head word"]


class NTM(Machine):
    """Neural Turing machine: a controller whose heads move over a memory of `memory_size` words of `word_size` numbers.

        s', h = cell(s, [x; r_1; ...; r_R]),   y = [h; r'_1; ...; r'_R]

        each head:  k, β, g, s, γ  (and e, a of a head that writes) = h W + b
            w_c = softmax(softplus(β) cos(k, M))                    by content
            w_g = σ(g) w_c + (1 - σ(g)) w                           or where it was before
            w_s = w_g * softmax(s)                                  turned by -shift to shift places
            w'  = w_s^γ' / Σ w_s^γ',  γ' = 1 + softplus(γ)          sharpened
        M'  = M Π (1 - w' σ(e)ᵀ) + Σ w' aᵀ                          all heads that write
        r'  = Σ_p w'_p M'_p                                         each head that reads

    The heads that write go first and are addressed by M, those that read by M'. All places hold 1e-6 at first, all
    heads are at place 0, and r = 0; `LearnedState` learns that. A `Dense` after it makes the paper's output. Weights to
    look at are in the states: `States(cell)`.

    A. Graves, G. Wayne and I. Danihelka, Neural Turing machines, arXiv:1410.5401, 2014; the constant start is that of
    M. Collier and J. Beel, Implementing neural Turing machines, ICANN 2018.

    >>> import jaxseq as js
    >>> cell = js.Stack((NTM(js.LSTM(3 + 4, 8), memory_size=5, word_size=4), js.Dense(8 + 4, 3)))
    >>> (state, _), ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((2, 6, 3)))
    >>> ys.shape, state.memory.shape, state.read_weights.shape
    ((2, 6, 3), (2, 5, 4), (2, 1, 5))
    """

    memory_size: int
    word_size: int
    _: dataclasses.KW_ONLY
    read_heads: int = 1
    write_heads: int = 1
    shift: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("read_heads", "write_heads"):
            if (count := getattr(self, name)) < 1:
                raise ValueError(f"NTM needs {name} >= 1, got {count}.")
        if not 0 <= 2 * self.shift < self.memory_size:
            raise ValueError(
                f"NTM needs a shift of at least 0, and 2 * shift + 1 places at most, got shift={self.shift} and "
                f"memory_size={self.memory_size}."
            )

    @property
    def read_size(self) -> int:
        return self.read_heads * self.word_size

    @property
    def interface_size(self) -> int:
        heads = self.read_heads + self.write_heads
        return heads * (self.word_size + 3 + 2 * self.shift + 1) + 2 * self.write_heads * self.word_size

    def start(self, controller: Any, batch_shape: tuple[int, ...], dtype: Any) -> NTMState:
        def at_0(heads):
            return jnp.zeros((*batch_shape, heads, self.memory_size), dtype).at[..., 0].set(1)

        memory = jnp.full((*batch_shape, self.memory_size, self.word_size), 1e-6, dtype)
        words = jnp.zeros((*batch_shape, self.read_heads, self.word_size), dtype)
        return NTMState(controller, memory, at_0(self.read_heads), at_0(self.write_heads), words)

    def reads(self, state: NTMState) -> Float[Array, "*batch read"]:
        return state.words.reshape(*state.words.shape[:-2], self.read_size)

    def access(self, state: NTMState, interface: Float[Array, "*batch interface"]) -> NTMState:
        readers, writers, word = self.read_heads, self.write_heads, self.word_size

        def address(heads):
            return (heads, word), (heads,), (heads,), (heads, 2 * self.shift + 1), (heads,)

        parts = split(interface, *address(readers), *address(writers), (writers, word), (writers, word))
        erase, add = jax.nn.sigmoid(parts[10]), parts[11]
        write_weights = _move(state.write_weights, state.memory, *parts[5:10])
        memory = addressing.write(state.memory, write_weights, erase, add)
        read_weights = _move(state.read_weights, memory, *parts[:5])
        words = addressing.read(memory, read_weights)
        return NTMState(state.controller, memory, read_weights, write_weights, words)


def _move(weights: Array, memory: Array, key: Array, strength: Array, gate: Array, shift: Array, power: Array) -> Array:
    """The weights of heads after a step."""
    by_content = addressing.content_weights(key, jax.nn.softplus(strength), memory)
    weights = addressing.interpolate(jax.nn.sigmoid(gate), by_content, weights)
    weights = addressing.rotate(weights, jax.nn.softmax(shift, axis=-1))
    return addressing.sharpen(weights, 1 + jax.nn.softplus(power))
