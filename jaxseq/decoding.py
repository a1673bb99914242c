"""Decoding: new sequences from a cell, token by token."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell, Params, State
from jaxseq.samplers import History, categorical
from jaxseq.samplers.histories import as_pytree


class Generated(NamedTuple):
    """What `generate` returns.

    `tokens` are the new ones; after a row's end they repeat it. `lengths` says how many of them are the row's own, its
    end included. `log_probs` are those of each token under the cell's own logits, before `sample` changed them; 0 after
    a row's end. `state` has read all but the last token.
    """

    tokens: Int[Array, "*batch new"]
    lengths: Int[Array, "*batch"]
    log_probs: Float[Array, "*batch new"]
    state: State


def generate(
    cell: Cell,
    params: Params,
    prompt: Int[Array, "*batch time"],
    *,
    max_new_tokens: int,
    key: Array | None = None,
    mask: Bool[Array, "*batch time"] | None = None,
    state: State = None,
    start: int | Int[Array, "..."] | None = None,
    sample: Callable[[Any, Array], Array] = categorical,
    end: int | Int[Array, "..."] | None = None,
    noise_key: Array | None = None,
    history: History | None = None,
) -> Generated:
    """Continues each row of `prompt` with tokens sampled from a cell that reads tokens and outputs logits.

    One compiled program per shape reads the prompt with `unroll` and then alternates `step` and `sample`, until
    there are `max_new_tokens` of them or every row has ended. To compile once for prompts of all lengths, pad them.

    Args:
        cell: a language model, `int[*batch] -> logits [*batch, vocab]`.
        params: its params.
        prompt: what each row begins with; its time may be 0.
        max_new_tokens: how many tokens at most, a static number; with the same key, fewer are the first of more.
        key: for `sample`. Without one there is no noise: the default sampler takes the most probable token.
        mask: False at padding of the prompt, on any side or in between, if its rows differ in length.
        state: where to start from; by default `initial_state`.
        start: a token for all rows, or one a row, that is read before the prompt: the one that began the training
            texts. A row that has neither `start` nor prompt reads `cell.zero_input` first, that is token 0.
        sample: `(key, logits) -> token`, called for all rows at once; `samplers` shows how to make one. Equal
            functions compile once; the numbers in a `jax.tree_util.Partial` are traced.
        end: the token that ends a row, one for all or one a row. Ended rows hold their state while the others go on.
            Only a new token ends a row: in the prompt `end` is read like any other.
        history: what `sample` is to know of the text so far, prompt included: then it is called with a third argument,
            the memory. `samplers` has histories and the rules that read them.
        noise_key: for the noise of the cell itself, such as dropout, which otherwise has none while generating.

    Returns:
        `Generated(tokens, lengths, log_probs, state)`. The state has read everything except the last token (of an
        ended row, its `end`; with `max_new_tokens=0`, the prompt's), so to go on, begin with that one:
        `generate(cell, params, out.tokens[..., -1:], state=out.state, ...)`, perhaps with more text after it.

    Raises:
        TypeError: if prompt, start or end are not integers, the dtype of the prompt, which is that of the new tokens,
            cannot hold the vocabulary, the mask is not boolean, or cell or sampler do not fit.
        ValueError: if the shape of mask, start, end or state is wrong, `max_new_tokens` is negative, or a `start` or
            `end` given as a Python number is no token; in arrays, which are traced, nothing checks that.

    >>> import jaxseq as js
    >>> cell = js.Stack((js.Embed(5, 4), js.LSTM(4, 8), js.Dense(8, 5)))
    >>> params = cell.init(jax.random.key(0))
    >>> prompt = jnp.array([[1, 2, 3], [4, 0, 0]])
    >>> mask = js.length_mask(jnp.array([3, 1]), 3)
    >>> out = generate(cell, params, prompt, mask=mask, key=jax.random.key(1), max_new_tokens=6, end=0)
    >>> out.tokens.shape, out.lengths.shape, out.log_probs.shape
    ((2, 6), (2,), (2, 6))
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"generate needs a Cell, which can advance one step, got {cell}.")
    if cell.input_rank != 0:
        raise TypeError(
            f"generate feeds tokens, but {cell} reads inputs of rank {cell.input_rank}: put Embed or OneHot before it, "
            "or declare input_rank = 0 in a cell of your own."
        )
    max_new_tokens = operator.index(max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"generate needs max_new_tokens >= 0, got {max_new_tokens}.")
    for given in (key, noise_key):
        if given is not None:
            errors.check_key("generate", given)
    sample = as_pytree(sample)
    if history is not None:
        history = History(*map(as_pytree, history))
    try:
        prompt = jnp.asarray(prompt)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"generate needs token ids [*batch, time] as prompt: pad rows of other lengths, and give a mask ({error})."
        ) from None
    mask = None if mask is None else jnp.asarray(mask)
    start, end = (token if token is None or isinstance(token, int) else jnp.asarray(token) for token in (start, end))
    for name, token in (("start", start), ("end", end)):
        if isinstance(token, int):  # other numbers are traced
            vocab = _vocab(cell, params, prompt.shape[:-1])
            if not 0 <= token < vocab:
                raise ValueError(f"generate needs a token below the vocab {vocab} as {name}, got {token}.")
    return _generate(cell, max_new_tokens, params, prompt, mask, state, start, sample, end, key, noise_key, history)


class _Loop(NamedTuple):
    """Between two steps: `count` tokens are there, `token` is the last one and not yet read."""

    count: Int[Array, ""]
    state: State
    token: Int[Array, "*batch"]
    active: Bool[Array, "*batch"]
    lengths: Int[Array, "*batch"]
    tokens: Int[Array, "new *batch"]
    log_probs: Float[Array, "new *batch"]
    memory: Any


def _generate_checked(cell, max_new_tokens, params, prompt, mask, state, start, sample, end, key, noise_key, history):
    for tokens in (prompt, start, end):
        if tokens is not None:
            errors.check_tokens(cell, tokens)
    prompt, mask = _with_start(prompt, mask, start)
    begin, update = history or (lambda prompt, mask: (), lambda memory, token: memory)
    memory = begin(prompt, jnp.ones_like(prompt, bool) if mask is None else mask)
    tokens, mask, token = _split_last(cell, params, prompt, mask)
    read, batch_shape = tokens.shape[-1], token.shape
    log_prob_dtype = _log_prob_dtype(cell, params, token)
    end = None if end is None else _one_a_row("end", end, batch_shape)
    state, _ = cell.unroll(params, tokens, state, mask=mask, key=noise_key)
    step_key = None
    if noise_key is not None:  # as unroll did with the same key
        draw_key, step_key = jax.random.split(noise_key)
        params = cell.draw(params, draw_key)

    def fold_in(key, count):
        return None if key is None else jax.random.fold_in(key, count)

    def body(loop: _Loop) -> _Loop:
        state, logits = cell.step(params, loop.state, loop.token, fold_in(step_key, read + loop.count))
        told = () if history is None else (loop.memory,)
        drawn = _check_token(sample(fold_in(key, loop.count), logits, *told), batch_shape).astype(token.dtype)
        log_probs = jax.nn.log_softmax(logits.astype(log_prob_dtype))
        log_prob = jnp.take_along_axis(log_probs, drawn[..., None].astype(int), axis=-1)[..., 0]
        drawn = jnp.where(loop.active, drawn, loop.token)
        ended = jnp.zeros(batch_shape, bool) if end is None else drawn.astype(int) == end
        return _Loop(
            count=loop.count + 1,
            state=masks.select(loop.active, state, loop.state),
            token=drawn,
            active=loop.active & ~ended,
            lengths=loop.lengths + loop.active.astype(int),
            tokens=loop.tokens.at[loop.count].set(drawn),
            log_probs=loop.log_probs.at[loop.count].set(jnp.where(loop.active, log_prob, 0)),
            memory=masks.select(loop.active, update(loop.memory, drawn), loop.memory),
        )

    filler = jnp.zeros_like(token) if end is None else end.astype(token.dtype) + jnp.zeros_like(token)
    loop = _Loop(
        count=jnp.zeros((), int),
        state=state,
        token=token,
        active=jnp.ones_like(token, bool),
        lengths=jnp.zeros_like(token, int),
        tokens=jnp.broadcast_to(filler, (max_new_tokens, *batch_shape)),
        log_probs=jnp.zeros_like(jnp.broadcast_to(token, (max_new_tokens, *batch_shape)), log_prob_dtype),
        memory=memory,
    )
    if max_new_tokens > 0:  # the body cannot write into nothing
        loop = jax.lax.while_loop(lambda loop: (loop.count < max_new_tokens) & loop.active.any(), body, loop)
    return Generated(jnp.moveaxis(loop.tokens, 0, -1), loop.lengths, jnp.moveaxis(loop.log_probs, 0, -1), loop.state)


_generate = jax.jit(_generate_checked, static_argnums=(0, 1))


def _with_start(prompt, mask, start):
    """The prompt and its mask, with `start` before it."""
    if prompt.ndim == 0:
        raise ValueError("generate needs a prompt [*batch, time], got a single token: give it a time axis.")
    if mask is not None:
        errors.check_flags("generate", mask, "mask", prompt.shape)
    if start is None:
        return prompt, mask
    first = (_one_a_row("start", start, prompt.shape[:-1]).astype(prompt.dtype) + _zero(prompt))[..., None]
    if mask is not None:
        mask = jnp.concatenate([jnp.ones_like(first, bool), mask], axis=-1)
    return jnp.concatenate([first, prompt], axis=-1), mask


def _zero(prompt):
    """A token 0 for each row, placed on the devices as the rows are: fresh zeros know of no mesh."""
    return 0 * prompt.sum(axis=-1, dtype=prompt.dtype)


def _one_a_row(name, token, batch_shape):
    try:
        return jnp.broadcast_to(jnp.asarray(token).astype(int), batch_shape)
    except ValueError:
        raise ValueError(
            f"generate needs one {name} token, or one a row {batch_shape}, got {name} of shape {jnp.shape(token)}."
        ) from None


def _split_last(cell, params, prompt, mask):
    """The last unmasked token of each row, and the tokens and mask without it.

    The loop begins by reading that token, so that it alone makes logits, also where rows differ in length.
    """
    zero = cell.zero_input(params, prompt.shape[:-1]).astype(prompt.dtype) + _zero(prompt)
    time = prompt.shape[-1]
    if time == 0:
        return prompt, None, zero
    if mask is None:
        return prompt[..., :-1], None, prompt[..., -1]
    times = jnp.cumsum(jnp.ones_like(mask, int), axis=-1) - 1
    last = jnp.where(mask, times, -1).max(axis=-1, keepdims=True)
    token = jnp.take_along_axis(prompt, jnp.maximum(last, 0), axis=-1)[..., 0]
    mask &= times < last
    return prompt[..., :-1], mask[..., :-1], jnp.where(last[..., 0] < 0, zero, token)


def _vocab(cell, params, batch_shape):
    """The number of tokens, found without running anything, and once for params of the same shapes."""
    leaves, tree = jax.tree.flatten(params)
    kinds = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _cached_vocab(cell, tree, kinds, batch_shape)


@functools.lru_cache
def _cached_vocab(cell, tree, kinds, batch_shape):
    params = tree.unflatten(jax.ShapeDtypeStruct(*kind) for kind in kinds)
    logits = jax.eval_shape(lambda params: _logits(cell, params, cell.zero_input(params, batch_shape)), params)
    return logits.shape[-1]


def _logits(cell, params, token):
    """The logits of one step; raises unless it gives any."""
    _, logits = cell.step(params, cell.initial_state(params, token.shape), token)
    is_array = isinstance(logits, jax.Array) and jnp.issubdtype(logits.dtype, jnp.floating)
    if not is_array or logits.shape[:-1] != token.shape or logits.ndim == 0:
        raise TypeError(
            f"generate needs a cell whose step gives logits [*batch, vocab], but from tokens of shape {token.shape} "
            f"{cell} gives {errors.shape_of(logits)}: let it end with Dense(..., vocab)."
        )
    return logits


def _log_prob_dtype(cell, params, token):
    """The dtype of the log-probabilities; raises unless a step gives logits, of tokens that the prompt could hold."""
    logits = jax.eval_shape(lambda: _logits(cell, params, token))
    vocab = logits.shape[-1]
    if isinstance(reads := getattr(cell, "input_size", None), int) and vocab > reads:
        raise TypeError(
            f"generate feeds tokens back, but {cell} gives {vocab} logits and reads {reads} tokens: let it end with "
            f"Dense(..., {reads})."
        )
    if vocab - 1 > jnp.iinfo(token.dtype).max:
        raise TypeError(
            f"generate gives tokens of the dtype of the prompt, but {token.dtype} cannot hold a vocabulary of {vocab}: "
            "cast the prompt with .astype(int)."
        )
    with jax.numpy_dtype_promotion("standard"):  # a choice of ours, whatever the caller lets promote by itself
        return jnp.promote_types(logits.dtype, jnp.float32)


def _check_token(token, batch_shape):
    is_array = isinstance(token, jax.Array | np.ndarray)
    if not is_array or token.shape != batch_shape or not jnp.issubdtype(token.dtype, jnp.integer):
        what = errors.shape_of(token) if is_array else repr(token)
        raise TypeError(
            f"generate needs a sampler (key, logits) -> token that gives integers of shape {batch_shape}, "
            f"one a row, but it gave {what}."
        )
    return token
