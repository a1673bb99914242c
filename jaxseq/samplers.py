"""Samplers: plain functions that choose a token from logits, composed by application.

Filters go `logits -> logits` and put `-inf` at what they exclude; choices go `(key, logits) -> token`. All numbers are
traced, so changing one compiles nothing, and each row of logits may have its own.

>>> def nucleus(key, logits, *, temperature, k, p):
...     return categorical(key, top_p(top_k(logits / temperature, k), p))  # temperature > 0
>>> sample = jax.tree_util.Partial(nucleus, temperature=0.8, k=40, p=0.9)  # a pytree: its numbers are traced
>>> sample(jax.random.key(0), jnp.array([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]])).tolist()
[1, 0]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxseq.core import errors


def temperature(
    logits: Float[Array, "*batch vocab"], value: float | Float[Array, "..."]
) -> Float[Array, "*batch vocab"]:
    """`logits / value`: below 1 the probable tokens gain, above 1 the others; at 0 only the most probable is left.

    The largest logit of each row is subtracted first, so nothing overflows. `value` may differ by row: it broadcasts
    against `[*batch]`.

    >>> temperature(jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([0.5, 0.0])).tolist()
    [[-2.0, 0.0], [-inf, 0.0]]
    """
    logits = _check_logits("temperature", logits)
    value = _per_row("temperature", "value", value, logits)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    logits = logits - jnp.where(jnp.isfinite(largest), largest, 0)
    warm = (_wide(logits) / jnp.where(value > 0, value, 1)).astype(logits.dtype)
    return jnp.where(value > 0, warm, top_k(logits, 1))


def top_k(logits: Float[Array, "*batch vocab"], k: int | Int[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """The `k` largest logits of each row, `-inf` elsewhere (Fan et al., 2018, arXiv:1805.04833).

    Exactly k are kept: of equal logits those with the smaller token. From k = vocab on all are kept; a k below 1
    counts as 1, so no row ever becomes empty. `k` may differ by row: it broadcasts against `[*batch]`.

    >>> top_k(jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]), jnp.array([1, 2])).tolist()
    [[-inf, 3.0, -inf], [5.0, 5.0, -inf]]
    """
    logits = _check_logits("top_k", logits)
    if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"top_k needs an integer k, got {errors.shape_of(k)}.")
    k = _per_row("top_k", "k", k, logits)
    ordered = jnp.sort(jax.lax.stop_gradient(logits), axis=-1, descending=True)
    smallest = jnp.take_along_axis(ordered, jnp.clip(k, 1, logits.shape[-1]) - 1, axis=-1)
    above, equal = logits > smallest, logits == smallest
    room = jnp.maximum(k, 1) - above.sum(axis=-1, keepdims=True)
    return jnp.where(above | equal & (jnp.cumsum(equal, axis=-1) <= room), logits, -jnp.inf)


def top_p(logits: Float[Array, "*batch vocab"], p: float | Float[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """The fewest most probable tokens whose probabilities sum to `p` or more, `-inf` elsewhere.

    Nucleus sampling (Holtzman et al., The Curious Case of Neural Text Degeneration, 2020, arXiv:1904.09751). From
    p = 1 on all are kept; the most probable token always is. Equal logits are kept by the rule of `top_k`. `p` may
    differ by row: it broadcasts against `[*batch]`.

    >>> print(top_p(jnp.log(jnp.array([0.5, 0.25, 0.25])), 0.6).round(2))
    [-0.69 -1.39  -inf]
    """
    logits = _check_logits("top_p", logits)
    p = _per_row("top_p", "p", p, logits)
    ordered = jnp.sort(jax.lax.stop_gradient(_wide(logits)), axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    count = 1 + jnp.sum(mass[..., :-1] < p, axis=-1)
    return top_k(logits, jnp.where(p[..., 0] < 1, count, logits.shape[-1]))


def categorical(key: Array | None, logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """A token of each row, drawn with the probabilities `softmax(logits)`.

    Without a key there is no noise, and that is `greedy`: the draw takes the largest logit plus Gumbel noise. A token
    at `-inf` is drawn only if the whole row is, and then it is token 0.

    >>> categorical(jax.random.key(0), jnp.log(jnp.array([[0.0, 1.0], [1.0, 0.0]]))).tolist()
    [1, 0]
    """
    logits = _check_logits("categorical", logits)
    if key is None:
        return greedy(None, logits)
    return jax.random.categorical(key, _wide(logits), axis=-1)


def greedy(key: Array | None, logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """The most probable token of each row, the smallest of equal ones; the key is not used.

    >>> greedy(None, jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])).tolist()
    [1, 0]
    """
    return _check_logits("greedy", logits).argmax(axis=-1)


def _check_logits(name, logits):
    logits = jnp.asarray(logits)
    if logits.ndim == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{name} needs floating logits [*batch, vocab], got {errors.shape_of(logits)}.")
    return logits


def _per_row(name, what, value, logits):
    """`value` as `[*batch, 1]`, beside the logits."""
    rows = logits.shape[:-1]
    try:
        return jnp.broadcast_to(value, rows)[..., None]
    except ValueError:
        raise ValueError(
            f"{name} needs one {what} for all rows or one that broadcasts to [*batch] = {rows}, the batch axes of its "
            f"logits, got {what} of shape {jnp.shape(value)}."
        ) from None


def _wide(logits):
    # bfloat16 noise and sums are too coarse: a tail of improbable tokens would be lost; float16 has no small numbers
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
