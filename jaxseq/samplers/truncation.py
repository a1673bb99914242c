"""Filters `logits -> logits`: temperature, and the truncations of a distribution; `-inf` at what they exclude."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxseq.core import errors
from jaxseq.samplers.logits import check_logits, per_row, wide


def temperature(
    logits: Float[Array, "*batch vocab"], value: float | Float[Array, "..."]
) -> Float[Array, "*batch vocab"]:
    """`logits / value`: below 1 the probable tokens gain, above 1 the others; at 0 only the most probable is left.

    The largest logit of each row is subtracted first, so nothing overflows. `value` may differ by row: it broadcasts
    against `[*batch]`.

    >>> temperature(jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([0.5, 0.0])).tolist()
    [[-2.0, 0.0], [-inf, 0.0]]
    """
    logits = check_logits("temperature", logits)
    value = per_row("temperature", "value", value, logits)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    logits = logits - jnp.where(jnp.isfinite(largest), largest, 0)
    warm = (wide(logits) / jnp.where(value > 0, value, 1)).astype(logits.dtype)
    return jnp.where(value > 0, warm, top_k(logits, 1))


def top_k(logits: Float[Array, "*batch vocab"], k: int | Int[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """The `k` largest logits of each row, `-inf` elsewhere (Fan et al., 2018, arXiv:1805.04833).

    Exactly k are kept: of equal logits those with the smaller token. From k = vocab on all are kept; a k below 1
    counts as 1, so no row ever becomes empty. `k` may differ by row: it broadcasts against `[*batch]`.

    >>> top_k(jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]), jnp.array([1, 2])).tolist()
    [[-inf, 3.0, -inf], [5.0, 5.0, -inf]]
    """
    logits = check_logits("top_k", logits)
    if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"top_k needs an integer k, got {errors.shape_of(k)}.")
    k = per_row("top_k", "k", k, logits)
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
    logits = check_logits("top_p", logits)
    p = per_row("top_p", "p", p, logits)
    ordered = jnp.sort(jax.lax.stop_gradient(wide(logits)), axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    count = 1 + jnp.sum(mass[..., :-1] < p, axis=-1)
    return top_k(logits, jnp.where(p[..., 0] < 1, count, logits.shape[-1]))


def min_p(logits: Float[Array, "*batch vocab"], p: float | Float[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """The tokens at least `p` times as probable as the most probable one, `-inf` elsewhere.

    Nguyen et al., Turning Up the Heat: Min-p Sampling, 2024, arXiv:2407.01082. `p` may differ by row: it broadcasts
    against `[*batch]`; at 0 all are kept.

    >>> jnp.isfinite(min_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.5)).tolist()
    [True, True, False]
    """
    logits = check_logits("min_p", logits)
    p = per_row("min_p", "p", p, logits)
    return _at_least(logits, _log_softmax(logits).max(axis=-1, keepdims=True) + jnp.log(p))


def typical(logits: Float[Array, "*batch vocab"], p: float | Float[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """The fewest tokens of nearly typical surprise whose probabilities sum to `p` or more, `-inf` elsewhere.

    Tokens come in the order of `|-log p(token) - H|`, H being the entropy of the row in nats; of equal ones the smaller
    token first (Meister et al., Locally Typical Sampling, 2023, arXiv:2202.00666). From p = 1 on all are kept. `p` may
    differ by row: it broadcasts against `[*batch]`.

    >>> jnp.isfinite(typical(jnp.log(jnp.array([0.5, 0.25, 0.25])), 0.4)).tolist()  # H = 1.04
    [True, False, False]
    """
    logits = check_logits("typical", logits)
    p = per_row("typical", "p", p, logits)
    log_probs = _log_softmax(logits)
    order = jnp.argsort(jnp.abs(log_probs + _entropy(log_probs)), axis=-1, stable=True)
    mass = jnp.cumsum(jnp.take_along_axis(jnp.exp(log_probs), order, axis=-1), axis=-1)
    count = jnp.where(p < 1, 1 + jnp.sum(mass[..., :-1] < p, axis=-1, keepdims=True), logits.shape[-1])
    return jnp.where(jnp.argsort(order, axis=-1) < count, logits, -jnp.inf)


def epsilon(logits: Float[Array, "*batch vocab"], value: float | Float[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """The tokens of a probability of at least `value`, and the most probable one; `-inf` elsewhere.

    Hewitt, Manning and Liang, Truncation Sampling as Language Model Desmoothing, 2022, arXiv:2210.15191. `value` may
    differ by row: it broadcasts against `[*batch]`.

    >>> jnp.isfinite(epsilon(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.25)).tolist()
    [True, True, False]
    """
    logits = check_logits("epsilon", logits)
    return _at_least(logits, jnp.log(per_row("epsilon", "value", value, logits)))


def eta(logits: Float[Array, "*batch vocab"], value: float | Float[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """`epsilon` whose bound falls where the row is uncertain: `min(value, sqrt(value) exp(-H))`, H being its entropy.

    Hewitt, Manning and Liang, 2022, arXiv:2210.15191. `value` may differ by row: it broadcasts against `[*batch]`.

    >>> jnp.isfinite(eta(jnp.log(jnp.array([0.9, 0.06, 0.04])), 0.05)).tolist()
    [True, True, False]
    """
    logits = check_logits("eta", logits)
    bound = jnp.log(per_row("eta", "value", value, logits))
    return _at_least(logits, jnp.minimum(bound, bound / 2 - _entropy(_log_softmax(logits))))


def top_n_sigma(logits: Float[Array, "*batch vocab"], n: float | Float[Array, "..."]) -> Float[Array, "*batch vocab"]:
    """The logits within `n` standard deviations of the largest, `-inf` elsewhere; the same set at any temperature.

    The deviation is that of the row's logits, what is at `-inf` left out (Tang et al., Top-nσ: Not All Logits Are You
    Need, 2024, arXiv:2411.07641). `n` may differ by row: it broadcasts against `[*batch]`.

    >>> top_n_sigma(jnp.array([4.0, 3.0, 0.0, 0.0]), 1.0).tolist()
    [4.0, 3.0, -inf, -inf]
    """
    logits = check_logits("top_n_sigma", logits)
    n = per_row("top_n_sigma", "n", n, logits)
    values = wide(jax.lax.stop_gradient(logits))
    deviation = jnp.std(values, axis=-1, keepdims=True, where=jnp.isfinite(values))
    bound = values.max(axis=-1, keepdims=True) - n * deviation
    return jnp.where((values >= bound) | (values == values.max(axis=-1, keepdims=True)), logits, -jnp.inf)


def _log_softmax(logits):
    """Log-probabilities without gradients; of rows all at -inf those are -inf."""
    log_probs = jax.nn.log_softmax(wide(jax.lax.stop_gradient(logits)), axis=-1)
    return jnp.where(jnp.isnan(log_probs), -jnp.inf, log_probs)


def _entropy(log_probs):
    """In nats, `[*batch, 1]`."""
    terms = jnp.exp(log_probs) * jnp.where(jnp.isneginf(log_probs), 0, log_probs)
    return -terms.sum(axis=-1, keepdims=True)


def _at_least(logits, bound):
    """Logits of which the log-probability is not below the bound, and those of the most probable token."""
    log_probs = _log_softmax(logits)
    return jnp.where((log_probs >= bound) | (log_probs == log_probs.max(axis=-1, keepdims=True)), logits, -jnp.inf)
