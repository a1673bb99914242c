"""Filters that read what a `History` remembers: penalties, repeats, forbidden words, lengths, forced tokens, grammars.

A bias needs none of them: `logits + bias`.
"""

import operator

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors
from jaxseq.samplers.histories import Text
from jaxseq.samplers.logits import check_logits, per_row


def repetition_penalty(
    logits: Float[Array, "*batch vocab"], counts: Int[Array, "*batch vocab"], value: float | Float[Array, "..."]
) -> Float[Array, "*batch vocab"]:
    """Logits of tokens that came before divided by `value` where positive, multiplied by it where negative.

    `counts` are the memory of `token_counts`; 1 changes nothing, `value` may differ by row (Keskar et al., CTRL: A
    Conditional Transformer Language Model, 2019, arXiv:1909.05858).

    >>> repetition_penalty(jnp.array([2.0, -2.0, 2.0]), jnp.array([1, 1, 0]), 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    logits = check_logits("repetition_penalty", logits)
    value = per_row("repetition_penalty", "value", value, logits).astype(logits.dtype)
    return jnp.where(counts > 0, jnp.where(logits > 0, logits / value, logits * value), logits)


def presence_penalty(
    logits: Float[Array, "*batch vocab"], counts: Int[Array, "*batch vocab"], value: float | Float[Array, "..."]
) -> Float[Array, "*batch vocab"]:
    """Logits less `value` where the token came before, however often; `counts` are the memory of `token_counts`.

    >>> presence_penalty(jnp.array([2.0, 2.0, 2.0]), jnp.array([0, 1, 3]), 0.5).tolist()
    [2.0, 1.5, 1.5]
    """
    logits = check_logits("presence_penalty", logits)
    return logits - per_row("presence_penalty", "value", value, logits).astype(logits.dtype) * (counts > 0)


def frequency_penalty(
    logits: Float[Array, "*batch vocab"], counts: Int[Array, "*batch vocab"], value: float | Float[Array, "..."]
) -> Float[Array, "*batch vocab"]:
    """Logits less `value` for each time that the token came before; `counts` are the memory of `token_counts`.

    >>> frequency_penalty(jnp.array([2.0, 2.0, 2.0]), jnp.array([0, 1, 3]), 0.5).tolist()
    [2.0, 1.5, 0.5]
    """
    logits = check_logits("frequency_penalty", logits)
    value = per_row("frequency_penalty", "value", value, logits).astype(logits.dtype)
    return logits - value * counts.astype(logits.dtype)


def no_repeat_ngrams(logits: Float[Array, "*batch vocab"], text: Text, n: int) -> Float[Array, "*batch vocab"]:
    """`-inf` for tokens that would make an n-gram that the text has already; `text` is the memory of `text(room)`.

    Paulus, Xiong and Socher, A Deep Reinforced Model for Abstractive Summarization, 2018, arXiv:1705.04304.

    >>> said = Text(jnp.array([1, 2, 0, 1, 0]), jnp.array(4))  # after 1 came 2
    >>> no_repeat_ngrams(jnp.zeros(4), said, 2).tolist()
    [0.0, 0.0, -inf, 0.0]
    """
    logits = check_logits("no_repeat_ngrams", logits)
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"no_repeat_ngrams needs n >= 1, got {n}.")
    windows = text.tokens.shape[-1] - n + 1
    if windows < 1:
        return logits
    end = jnp.arange(n - 1, text.tokens.shape[-1])  # where the last token of each window stands
    same = end < text.count[..., None]
    for back in range(1, n):
        latest = jnp.take_along_axis(text.tokens, jnp.maximum(text.count - back, 0)[..., None], axis=-1)
        same &= (text.tokens[..., n - 1 - back : n - 1 - back + windows] == latest) & (text.count >= n - 1)[..., None]
    return _without(logits, text.tokens[..., n - 1 :], same)


def forbid(
    logits: Float[Array, "*batch vocab"],
    recent: Int[Array, "*batch count"],
    sequences: Int[Array, "number length"],
) -> Float[Array, "*batch vocab"]:
    """`-inf` for tokens that would complete one of some sequences, which are filled with -1 in front.

    `recent` is the memory of `recent(count)`, of a count of at least the longest sequence less 1.

    >>> forbid(jnp.zeros(3), jnp.array([-1, 1]), jnp.array([[-1, 0], [1, 2]])).tolist()  # the word 0, and 1 2
    [-inf, 0.0, -inf]
    """
    logits = check_logits("forbid", logits)
    sequences = jnp.asarray(sequences)
    if sequences.ndim != 2 or not jnp.issubdtype(sequences.dtype, jnp.integer) or sequences.shape[-1] == 0:
        raise TypeError(f"forbid needs integer sequences [number, length], got {errors.shape_of(sequences)}.")
    before = sequences.shape[-1] - 1
    if recent.shape[-1] < before:
        raise ValueError(f"forbid of sequences of {before + 1} tokens needs recent({before}), got {recent.shape[-1]}.")
    same = jnp.ones((*logits.shape[:-1], len(sequences)), bool) & (sequences[:, -1] >= 0)
    for back in range(1, before + 1):
        token = sequences[:, -1 - back]
        same &= (token < 0) | (recent[..., -back, None] == token)
    return _without(logits, jnp.broadcast_to(sequences[:, -1], same.shape), same)


def minimum_length(
    logits: Float[Array, "*batch vocab"],
    count: Int[Array, "*batch"],
    minimum: int | Int[Array, "..."],
    end: int | Int[Array, "..."],
) -> Float[Array, "*batch vocab"]:
    """`-inf` for the token `end` until there are `minimum` tokens before it; `count` is the memory of `new_tokens`.

    >>> minimum_length(jnp.zeros((2, 3)), jnp.array([1, 2]), 2, end=0).tolist()
    [[-inf, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    logits = check_logits("minimum_length", logits)
    short = count[..., None] < per_row("minimum_length", "minimum", minimum, logits)
    end = per_row("minimum_length", "end", end, logits)
    return jnp.where(short & (jnp.arange(logits.shape[-1]) == end), -jnp.inf, logits)


def force(
    logits: Float[Array, "*batch vocab"], count: Int[Array, "*batch"], tokens: Int[Array, "... time"]
) -> Float[Array, "*batch vocab"]:
    """`-inf` for all but the token that `tokens` has at this place; where that is -1, and after its end, all are free.

    `count` is the memory of `new_tokens`; `tokens` are the same for all rows, `[time]`, or `[*batch, time]`.

    >>> force(jnp.zeros((3, 2)), jnp.array([0, 1, 2]), jnp.array([1, -1])).tolist()
    [[-inf, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    logits = check_logits("force", logits)
    tokens = jnp.asarray(tokens)
    if tokens.ndim == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"force needs integer tokens [time] or [*batch, time], got {errors.shape_of(tokens)}.")
    here = jnp.arange(tokens.shape[-1]) == count[..., None]
    forced = jnp.where(here & (tokens >= 0), tokens + 1, 0).sum(axis=-1, keepdims=True) - 1
    return jnp.where((forced >= 0) & (jnp.arange(logits.shape[-1]) != forced), -jnp.inf, logits)


def allow(logits: Float[Array, "*batch vocab"], allowed: Bool[Array, "*#batch vocab"]) -> Float[Array, "*batch vocab"]:
    """`-inf` for what is not allowed, such as `transitions[state] < 0` of an `automaton`.

    >>> allow(jnp.array([1.0, 2.0]), jnp.array([True, False])).tolist()
    [1.0, -inf]
    """
    logits, allowed = check_logits("allow", logits), jnp.asarray(allowed)
    if allowed.dtype != jnp.bool_:
        raise TypeError(f"allow needs boolean flags [*batch, vocab], got {errors.shape_of(allowed)}.")
    return jnp.where(allowed, logits, -jnp.inf)


def _without(logits, tokens, flags):
    """Logits with `-inf` at those of some tokens `[*batch, some]` that have a flag."""
    found = (tokens[..., None] == jnp.arange(logits.shape[-1])) & flags[..., None]
    return jnp.where(found.any(axis=-2), -jnp.inf, logits)
