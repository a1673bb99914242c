"""The differentiable neural computer."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxseq.memory import addressing
from jaxseq.memory.machine import Machine, split


class DNCState(NamedTuple):
    """The state of a differentiable neural computer.

    `usage` says how much each place is in use, `precedence` how much it was the last one written to, and
    `links[i, j]` how much i was written to next after j.
    """

    controller: Any
    memory: Float[Array, "*batch place word"]
    usage: Float[Array, "*batch place"]
    precedence: Float[Array, "*batch place"]
    links: Float[Array, "*batch place place"]
    write_weights: Float[Array, "*batch place"]
    read_weights: Float[Array, "*batch read_head place"]
    words: Float[Array, "*batch read_head word"]


class DNC(Machine):
    """Differentiable neural computer: a memory whose places are allocated, freed, and linked in the order of writing.

        s', h = cell(s, [x; r_1; ...; r_R]),   y = [h; r'_1; ...; r'_R],   the numbers below = h W + b

        u'  = (u + w - u w) Π (1 - σ(f) v)                          usage: written to, and freed by heads that read
        a   = (1 - u'_p) Π u'_q over the places q less used than p  allocation
        w'  = σ(g_w) (σ(g_a) a + (1 - σ(g_a)) C(M, k_w, β_w))       the head that writes
        M'  = M (1 - w' σ(e)ᵀ) + w' addᵀ
        L'_ij = (1 - w'_i - w'_j) L_ij + w'_i p_j,  L'_ii = 0       links, and what was written last:
        p'  = (1 - Σ w') p + w'
        v'  = π_1 L'ᵀ v + π_2 C(M', k, β) + π_3 L' v,  π = softmax  each head that reads: back, by content, onward
        r'  = Σ_p v'_p M'_p

    C(M, k, β) is the softmax of (1 + softplus(β)) cos(k, M). Places are sorted by usage, of equal ones the first is the
    least used; no gradient passes through the order. Memory, usage, links, weights and words are 0 at first. The links
    are `memory_size`² numbers a row. A `Dense` after it makes the paper's output. Weights to look at are in the states:
    `States(cell)`.

    A. Graves et al., Hybrid computing using a neural network with dynamic external memory, Nature 538, 2016.

    >>> import jaxseq as js
    >>> cell = js.Stack((DNC(js.LSTM(3 + 2 * 4, 8), memory_size=5, word_size=4, read_heads=2), js.Dense(8 + 2 * 4, 3)))
    >>> (state, _), ys = cell.unroll(cell.init(jax.random.key(0)), jnp.ones((2, 6, 3)))
    >>> ys.shape, state.usage.shape, state.links.shape
    ((2, 6, 3), (2, 5), (2, 5, 5))
    """

    free_state = False

    memory_size: int
    word_size: int
    _: dataclasses.KW_ONLY
    read_heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_heads < 1:
            raise ValueError(f"DNC needs read_heads >= 1, got {self.read_heads}.")

    @property
    def read_size(self) -> int:
        return self.read_heads * self.word_size

    @property
    def interface_size(self) -> int:
        return self.read_heads * (self.word_size + 5) + 3 * self.word_size + 3

    def start(self, controller: Any, batch_shape: tuple[int, ...], dtype: Any) -> DNCState:
        places, word, heads = self.memory_size, self.word_size, self.read_heads
        shapes = ((places, word), (places,), (places,), (places, places), (places,), (heads, places), (heads, word))
        return DNCState(controller, *(jnp.zeros((*batch_shape, *shape), dtype) for shape in shapes))

    def reads(self, state: DNCState) -> Float[Array, "*batch read"]:
        return state.words.reshape(*state.words.shape[:-2], self.read_size)

    def access(self, state: DNCState, interface: Float[Array, "*batch interface"]) -> DNCState:
        heads, word = self.read_heads, self.word_size
        by_head = (heads, word), (heads,), (heads,), (heads, 3)
        read_key, read_strength, free, mode, write_key, write_strength, erase, add, allocate, write = split(
            interface, *by_head, (1, word), (1,), (1, word), (1, word), (), ()
        )
        before = state.write_weights
        usage = state.usage + before - state.usage * before
        for head in range(heads):
            usage = usage * (1 - jax.nn.sigmoid(free)[..., head, None] * state.read_weights[..., head, :])
        by_content = addressing.content_weights(write_key, 1 + jax.nn.softplus(write_strength), state.memory)
        write_weights = addressing.interpolate(
            jax.nn.sigmoid(allocate)[..., None], allocation(usage)[..., None, :], by_content
        )
        write_weights = jax.nn.sigmoid(write)[..., None, None] * write_weights
        memory = addressing.write(state.memory, write_weights, jax.nn.sigmoid(erase), add)

        write_weights = write_weights[..., 0, :]
        links = link(state.links, write_weights, state.precedence)
        precedence = (1 - write_weights.sum(axis=-1, keepdims=True)) * state.precedence + write_weights
        back, content, onward = jnp.moveaxis(jax.nn.softmax(mode, axis=-1)[..., None], -2, 0)
        read_weights = (
            back * jnp.einsum("...hi,...ij->...hj", state.read_weights, links)
            + content * addressing.content_weights(read_key, 1 + jax.nn.softplus(read_strength), memory)
            + onward * jnp.einsum("...hj,...ij->...hi", state.read_weights, links)
        )
        words = addressing.read(memory, read_weights)
        return DNCState(state.controller, memory, usage, precedence, links, write_weights, read_weights, words)


def allocation(usage: Float[Array, "*batch place"]) -> Float[Array, "*batch place"]:
    """Where to write next: (1 - u_p) times the product of the usage of all places that are less used.

    Of places that are used alike the first comes first. No gradient passes through the order.

    >>> allocation(jnp.array([0.5, 0.0, 1.0, 0.0])).tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    order = jnp.argsort(jax.lax.stop_gradient(usage), axis=-1, stable=True)
    ordered = jnp.take_along_axis(usage, order, axis=-1)
    before = jnp.cumprod(ordered, axis=-1)[..., :-1]
    free = (1 - ordered) * jnp.concatenate([jnp.ones_like(ordered[..., :1]), before], axis=-1)
    return jnp.take_along_axis(free, jnp.argsort(order, axis=-1), axis=-1)


def link(
    links: Float[Array, "*batch place place"],
    written: Float[Array, "*batch place"],
    precedence: Float[Array, "*batch place"],
) -> Float[Array, "*batch place place"]:
    """The links after places were written to: (1 - w_i - w_j) L_ij + w_i p_j, and 0 from a place to itself."""
    to, of = written[..., :, None], written[..., None, :]
    links = (1 - to - of) * links + to * precedence[..., None, :]
    return jnp.where(jnp.eye(links.shape[-1], dtype=bool), 0, links)
