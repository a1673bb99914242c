"""Interpolated n-grams with Kneser-Ney smoothing: the baseline that a language model has to beat.

    p_m(w | h) = max(c_m(h w) - d_m, 0) / c_m(h) + d_m types_m(h) / c_m(h) · p_(m-1)(w | h')

h' is h without its first token, `types_m(h)` the number of different tokens after h, p_0 uniform over the vocabulary,
and p_m = p_(m-1) where h was never seen. c_m counts occurrences for the longest n-grams, and for the shorter ones the
different tokens that stand before them. d = n₁ / (n₁ + 2 n₂) from the numbers of n-grams with the counts 1 and 2.
Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1999, doi:10.1006/csla.1999.0128.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Order(NamedTuple):
    """The n-grams of one length m: sorted codes, `id of the first m - 1 tokens * vocabulary + last token`.

    `counts` and `discount` are those of the equation; `totals` and `types` stand beside the contexts, the (m-1)-grams.
    """

    codes: Int[np.ndarray, " grams"]
    counts: Float[np.ndarray, " grams"]
    discount: float
    totals: Float[np.ndarray, " contexts"]
    types: Float[np.ndarray, " contexts"]


class NGrams(NamedTuple):
    """A smoothed model of n-grams: `orders[m - 1]` holds those of length m."""

    vocab_size: int
    orders: tuple[Order, ...]


def fit(tokens: Int[np.ndarray, " length"], vocab_size: int, order: int) -> NGrams:
    """The n-grams of length `order` and shorter of a text; order 1 is the smoothed unigram.

    >>> model = fit(np.array([0, 1, 0, 1, 0, 1]), vocab_size=3, order=2)
    >>> bits(model, np.array([0, 1]), start=1).round(2).tolist()
    [0.15]
    """
    codes, ids = [], [np.zeros(len(tokens) + 1, int)]  # ids[m][i] is the m-gram that starts at i
    counts = []
    for m in range(1, order + 1):
        here = ids[-1][: len(tokens) - m + 1] * vocab_size + tokens[m - 1 :]
        unique, inverse, count = np.unique(here, return_inverse=True, return_counts=True)
        codes.append(unique)
        ids.append(inverse)
        counts.append(count)
    for m in range(1, order):  # what stands before a shorter n-gram: the different longer ones that end in it
        starts = np.unique(ids[m + 1], return_index=True)[1]
        counts[m - 1] = np.bincount(ids[m][starts + 1], minlength=len(codes[m - 1]))
    contexts = [1, *(len(unique) for unique in codes)]
    orders = (_order(*parts, vocab_size) for parts in zip(codes, counts, contexts[:-1], strict=True))
    return NGrams(vocab_size, tuple(orders))


def _order(codes: np.ndarray, counts: np.ndarray, contexts: int, vocab_size: int) -> Order:
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    # a vocabulary whose tokens are all frequent has no n-gram to estimate the discount from
    discount = once / (once + 2 * twice) if once and twice else 0.5
    context = codes // vocab_size
    totals = np.bincount(context, weights=counts, minlength=contexts)
    types = np.bincount(context, weights=counts > 0, minlength=contexts)
    return Order(codes, counts.astype(float), float(discount), totals, types)


def bits(
    model: NGrams, tokens: Int[np.ndarray, " length"], start: int, stop: int | None = None
) -> Float[np.ndarray, " scored"]:
    """`-log2 p` of each of the tokens `start` to `stop`, each given the tokens before it, those before `start` too."""
    tokens, positions = tokens[:stop], np.arange(start, len(tokens[:stop]))
    # ids[m][i] is the m-gram that starts at i, and -1 if the model has not seen it
    ids = [np.zeros(len(tokens) + 1, int)]
    for m, order in enumerate(model.orders, 1):
        prefix = ids[-1][: len(tokens) - m + 1]
        code = prefix * model.vocab_size + tokens[m - 1 :]
        place = np.minimum(np.searchsorted(order.codes, code), len(order.codes) - 1)
        ids.append(np.where((prefix >= 0) & (order.codes[place] == code), place, -1))
    probability = np.full(len(positions), 1 / model.vocab_size)
    for m, order in enumerate(model.orders, 1):
        whole = positions >= m - 1
        begin = positions[whole] - m + 1
        context, gram = ids[m - 1][begin], ids[m][begin]
        total, shorter = order.totals[context], probability[whole]
        count = np.where(gram >= 0, order.counts[gram], 0)
        kept = np.maximum(count - order.discount, 0)
        longer = (kept + order.discount * order.types[context] * shorter) / np.maximum(total, 1)
        probability[whole] = np.where((context >= 0) & (total > 0), longer, shorter)
    return -np.log2(probability)
