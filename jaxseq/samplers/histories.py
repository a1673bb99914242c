"""What a sampler remembers of the text so far: a small state that `generate` carries, made by one pair of functions."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int

from jaxseq.core import errors, sharding


class History(NamedTuple):
    """What to remember: `begin(prompt, mask) -> memory`, and `update(memory, token) -> memory` for a new token a row.

    The prompt `[*batch, time]` has the start token before it, and the mask is False at its padding. A memory is a tree
    of arrays with the batch axes first. A function that reads tables is a `jax.tree_util.Partial` of a module-level
    function and them: equal functions compile once, and tables are traced.
    """

    begin: Callable[[Int[Array, "*batch time"], Bool[Array, "*batch time"]], Any]
    update: Callable[[Any, Int[Array, "*batch"]], Any]


class Text(NamedTuple):
    """All tokens so far: the first `count` of each row."""

    tokens: Int[Array, "*batch room"]
    count: Int[Array, "*batch"]


def as_pytree(function: Callable[..., Any]) -> Any:
    """A plain function as a pytree that compares by it; what is a pytree already as it is."""
    return Partial(function) if jax.tree_util.all_leaves([function]) else function


def together(**histories: History) -> History:
    """Several histories as one, whose memory is a dict by their names.

    >>> both = together(seen=token_counts(9), since=new_tokens())
    >>> memory = both.begin(jnp.array([[1, 2]]), jnp.array([[True, True]]))
    >>> memory["seen"].shape, memory["since"].tolist()
    ((1, 9), [0])
    """
    begins = {name: as_pytree(history.begin) for name, history in histories.items()}
    updates = {name: as_pytree(history.update) for name, history in histories.items()}
    return History(Partial(_begin_all, begins), Partial(_update_all, updates))


def token_counts(vocab_size: int) -> History:
    """How often each token came, in the prompt too: `int[*batch, vocab]`.

    >>> history = token_counts(4)
    >>> memory = history.begin(jnp.array([[2, 2, 0]]), jnp.array([[True, True, False]]))
    >>> history.update(memory, jnp.array([3])).tolist()
    [[0, 0, 2, 1]]
    """
    return History(Partial(_count_all, jnp.zeros(_size("token_counts", "vocab_size", vocab_size), int)), _count)


def new_tokens() -> History:
    """How many tokens came after the prompt: `int[*batch]`."""
    return History(_none_yet, _one_more)


def recent(count: int) -> History:
    """The last `count` tokens, the latest one last, -1 where there are fewer: `int[*batch, count]`.

    >>> history = recent(2)
    >>> memory = history.begin(jnp.array([[1, 2, 3], [4, 0, 0]]), jnp.array([[True, True, True], [True, False, False]]))
    >>> memory.tolist(), history.update(memory, jnp.array([7, 8])).tolist()
    ([[2, 3], [-1, 4]], [[3, 7], [4, 8]])
    """
    return History(Partial(_last_of, jnp.zeros(_size("recent", "count", count), bool)), _push)


def text(room: int) -> History:
    """The whole `Text`, of at most `room` tokens of prompt and continuation; what comes later is not remembered.

    >>> history = text(4)
    >>> memory = history.begin(jnp.array([[0, 5, 0]]), jnp.array([[False, True, False]]))
    >>> history.update(memory, jnp.array([7]))
    Text(tokens=Array([[5, 7, 0, 0]], dtype=int32), count=Array([2], dtype=int32))
    """
    return History(Partial(_write_all, jnp.zeros(_size("text", "room", room), bool)), _write)


def automaton(transitions: Int[Array, "state vocab"], start: int | Int[Array, ""] = 0) -> History:
    """The state of a finite automaton that has read the new tokens, not the prompt: `int[*batch]`.

    `transitions[s, token]` is the state after a token, negative where the token is not allowed in state s: then the
    state stays. `samplers.allow(logits, transitions[state] >= 0)` keeps to its language.

    >>> history = automaton(jnp.array([[1, -1], [-1, 0]]))  # 0 and 1 by turns
    >>> memory = history.begin(jnp.array([[1, 1]]), jnp.array([[True, True]]))
    >>> history.update(memory, jnp.array([0])).tolist()
    [1]
    """
    transitions = jnp.asarray(transitions)
    if transitions.ndim != 2 or not jnp.issubdtype(transitions.dtype, jnp.integer):
        raise TypeError(f"automaton needs integer transitions [state, vocab], got {errors.shape_of(transitions)}.")
    return History(Partial(_start_at, jnp.asarray(start)), Partial(_advance, transitions))


def _size(name, what, value):
    value = operator.index(value)
    if value < 1:
        raise ValueError(f"{name} needs {what} >= 1, got {value}.")
    return value


def _begin_all(begins, prompt, mask):
    return {name: begin(prompt, mask) for name, begin in begins.items()}


def _update_all(updates, memory, token):
    return {name: update(memory[name], token) for name, update in updates.items()}


def _count_all(zeros, prompt, mask):
    seen = (prompt[..., None] == jnp.arange(len(zeros), dtype=prompt.dtype)) & mask[..., None]
    return seen.sum(axis=-2, dtype=zeros.dtype)


def _count(counts, token):
    return counts + jax.nn.one_hot(token, counts.shape[-1], dtype=counts.dtype)


def _none_yet(prompt, mask):
    return 0 * mask.sum(axis=-1)  # placed on devices as the rows are


def _one_more(count, token):
    return count + 1


def _last_of(places, prompt, mask):
    order = jnp.argsort(mask, axis=-1, stable=True)  # the padding comes first
    tokens = jnp.take_along_axis(jnp.where(mask, prompt.astype(int), -1), order, axis=-1)
    missing = jnp.broadcast_to(-1 + 0 * mask.sum(axis=-1, keepdims=True), (*mask.shape[:-1], len(places)))
    return jnp.concatenate([missing, tokens], axis=-1)[..., -len(places) :]


def _push(tokens, token):
    return jnp.concatenate([tokens[..., 1:], token.astype(tokens.dtype)[..., None]], axis=-1)


def _write_all(places, prompt, mask):
    order = jnp.argsort(~mask, axis=-1, stable=True)  # the padding comes last
    tokens = jnp.take_along_axis(jnp.where(mask, prompt.astype(int), 0), order, axis=-1)[..., : len(places)]
    missing = jnp.zeros_like(tokens, shape=(*tokens.shape[:-1], len(places) - tokens.shape[-1]))
    return Text(jnp.concatenate([tokens, missing], axis=-1), jnp.minimum(mask.sum(axis=-1), len(places)))


def _write(memory, token):
    room = memory.tokens.shape[-1]
    here = jax.lax.broadcasted_iota(int, memory.tokens.shape, memory.tokens.ndim - 1) == memory.count[..., None]
    tokens = jnp.where(here, token.astype(memory.tokens.dtype)[..., None], memory.tokens)
    return Text(tokens, jnp.minimum(memory.count + 1, room))


def _start_at(start, prompt, mask):
    return start.astype(int) + _none_yet(prompt, mask)


def _advance(transitions, state, token):
    after = sharding.rows(transitions.ravel(), state * transitions.shape[-1] + token.astype(state.dtype))
    return jnp.where(after >= 0, after.astype(state.dtype), state)
