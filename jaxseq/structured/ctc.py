"""Connectionist temporal classification: labels whose steps are not known, with blanks between them.

At each step the model gives logits of all labels and of one more class, the blank. An alignment chooses one class a
step; repeats of a class merge and blanks are dropped, which leaves the labels. Alignments are the paths of a chain over
2 L + 1 states, a blank before, between and after the L labels, that move up by at most two states a step.

Graves, Fernández, Gomez and Schmidhuber, Connectionist Temporal Classification, ICML 2006,
https://dl.acm.org/doi/10.1145/1143844.1143891.

Masks mean what they mean in `unroll`: a step or label off it is as if it were not there, gaps included. There are no
resets: labels belong to a whole sequence, so documents that were packed into one row are put into rows of their own.

A label on the mask that is the blank, or none of the vocabulary, raises where labels are concrete; where they are
traced the loss and the score of the row are NaN, and it is not feasible.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell, Params
from jaxseq.structured import prefixes
from jaxseq.structured.chains import Band, Chain, best_path, log_partition
from jaxseq.structured.prefixes import Beams
from jaxseq.structured.semirings import logsumexp


class Alignment(NamedTuple):
    """What `align` finds.

    `labels` are those of each step, the blank where none is; `positions` says which of the labels it is, -1 where none.
    `spans` are the first step of each label and the one after its last; both are 0 off the mask. `score` is the
    log-probability of the alignment, -inf, and the rest means nothing, where the labels do not fit into the steps.
    """

    labels: Int[Array, "*batch time"]
    positions: Int[Array, "*batch time"]
    spans: Int[Array, "*batch label 2"]
    score: Float[Array, "*batch"]


class Decoded(NamedTuple):
    """What `greedy` finds: tokens, the blank after the first `lengths`, and the log-probability of the alignment."""

    tokens: Int[Array, "*batch time"]
    lengths: Int[Array, "*batch"]
    score: Float[Array, "*batch"]


def loss(
    logits: Float[Array, "*batch time vocab"],
    labels: Int[Array, "*batch label"],
    mask: Bool[Array, "*batch time"] | None = None,
    label_mask: Bool[Array, "*batch label"] | None = None,
    *,
    blank: int = 0,
) -> Float[Array, "*batch"]:
    """The negative log-probability in nats of the labels of each row, summed over their alignments.

    The softmax is taken here; its gradient is what the softmax gives each class less the posterior of that class.
    Half precision is computed in float32. A row whose labels do not fit into its steps has the loss inf, with gradients
    of 0; `feasible` tells which these are, and `losses.mean(loss, feasible)` leaves them out. So has one that needs a
    class of the logit -inf, which `feasible` does not see: where there are such logits, `jnp.isfinite(loss)` is the
    mask. A label on the mask that is the blank, or none of the vocabulary, gives NaN where it is traced.

    Raises:
        ValueError: if shapes do not agree, or a concrete label on the mask is the blank or none of the vocabulary.
        TypeError: if a mask is not boolean.

    >>> logits = jnp.zeros((2, 3))  # 1 is read from 11, 01, 10 with probability 1 / 9 each
    >>> f"{loss(logits, jnp.array([1])):.4f}"  # ln 3
    '1.0986'
    >>> loss(logits, jnp.array([1, 1])).item()  # a repeat needs a blank in between
    inf
    """
    return _loss(*_checked("ctc.loss", logits, labels, mask, label_mask, blank))


@functools.partial(jax.jit, static_argnames="blank", inline=True)
def _loss(logits, labels, mask, real, blank):
    given = _given(logits, labels, mask, real, blank)
    losses = jnp.where(_fits(given), -log_partition(_chain(given), mask), jnp.inf)
    losses = jnp.where(_steps(given) + given.real.sum(axis=-1) == 0, 0, losses)
    return jnp.where(given.wrong, jnp.nan, losses)


def feasible(
    logits: Float[Array, "*batch time vocab"],
    labels: Int[Array, "*batch label"],
    mask: Bool[Array, "*batch time"] | None = None,
    label_mask: Bool[Array, "*batch label"] | None = None,
    *,
    blank: int = 0,
) -> Bool[Array, "*batch"]:
    """Whether the labels fit into the steps of a row: one each, and one more for the blank between equal neighbours.

    It is False where a label on the mask is none, and does not look at the logits: a row that needs a class of the
    logit -inf fits, but has the loss inf.

    >>> feasible(jnp.zeros((2, 3)), jnp.array([1, 2])).item(), feasible(jnp.zeros((2, 3)), jnp.array([1, 1])).item()
    (True, False)
    """
    return _feasible(*_checked("ctc.feasible", logits, labels, mask, label_mask, blank))


@functools.partial(jax.jit, static_argnames="blank", inline=True)
def _feasible(logits, labels, mask, real, blank):
    given = _given(logits, labels, mask, real, blank)
    return _fits(given) & ~given.wrong


def align(
    logits: Float[Array, "*batch time vocab"],
    labels: Int[Array, "*batch label"],
    mask: Bool[Array, "*batch time"] | None = None,
    label_mask: Bool[Array, "*batch label"] | None = None,
    *,
    blank: int = 0,
) -> Alignment:
    """The most probable alignment of the labels of each row (forced alignment).

    Its score is -inf where the labels do not fit into the steps, and NaN where one on the mask is none.

    >>> logits = jnp.log(jnp.array([[0.1, 0.8, 0.1], [0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]))
    >>> found = align(logits, jnp.array([1, 2]))
    >>> found.labels.tolist(), found.positions.tolist(), found.spans.tolist()
    ([1, 1, 0, 2], [0, 0, -1, 1], [[0, 2], [3, 4]])
    """
    return _align(*_checked("ctc.align", logits, labels, mask, label_mask, blank))


@functools.partial(jax.jit, static_argnames="blank", inline=True)
def _align(logits, labels, mask, real, blank):
    given = _given(logits, labels, mask, real, blank)
    time, count = given.log_probs.shape[-2], given.labels.shape[-1]
    path = best_path(_chain(given), mask)
    on_label = path.states % 2 == 1
    which = jnp.minimum(path.states // 2, max(count - 1, 0))
    if count == 0:
        chosen = jnp.full_like(path.states, blank)
    else:
        chosen = jnp.where(on_label, jnp.take_along_axis(given.labels, which, axis=-1), blank)
        which = jnp.take_along_axis(given.order, which, axis=-1)
    positions = jnp.where(on_label, which, -1)
    here = positions[..., :, None] == lax.broadcasted_iota(int, (*positions.shape, count), positions.ndim)
    steps = lax.broadcasted_iota(int, here.shape, positions.ndim - 1)
    first = jnp.where(here, steps, time).min(axis=-2, initial=time)
    after = jnp.where(here, steps + 1, 0).max(axis=-2, initial=0)
    spans = jnp.stack([jnp.minimum(first, after), after], axis=-1)
    empty = _steps(given) + given.real.sum(axis=-1) == 0
    score = jnp.where(empty, 0, jnp.where(_fits(given), path.score, -jnp.inf))
    return Alignment(chosen, positions, spans, jnp.where(given.wrong, jnp.nan, score))


def greedy(
    logits: Float[Array, "*batch time vocab"], mask: Bool[Array, "*batch time"] | None = None, *, blank: int = 0
) -> Decoded:
    """The labels of the one most probable alignment: the best class of each step, repeats merged, blanks dropped.

    >>> out = greedy(jax.nn.one_hot(jnp.array([1, 1, 0, 1, 2]), 3))
    >>> out.tokens.tolist(), out.lengths.item()
    ([1, 1, 2, 0, 0], 3)
    """
    return _greedy(*check_logits("ctc.greedy", logits, mask, blank))


@functools.partial(jax.jit, static_argnames="blank", inline=True)
def _greedy(logits, mask, blank):
    log_probs = _log_probs(logits, mask)
    best = log_probs.argmax(axis=-1).astype(int)
    score = log_probs.max(axis=-1)
    keep = jnp.ones(best.shape, bool) if mask is None else mask
    best, _ = first_of(keep, best)
    steps = keep.sum(axis=-1, keepdims=True)
    before = jnp.concatenate([jnp.full_like(best[..., :1], blank), best[..., :-1]], axis=-1)
    index = lax.broadcasted_iota(int, best.shape, best.ndim - 1)
    new = (best != blank) & (best != before) & (index < steps)
    tokens, _ = first_of(new, best)
    lengths = new.sum(axis=-1)
    tokens = jnp.where(index < lengths[..., None], tokens, blank)
    return Decoded(tokens, lengths, masks.zero_unless(keep, score).sum(axis=-1))


def beam_search(
    logits: Float[Array, "*batch time vocab"],
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    beams: int,
    blank: int = 0,
    cell: Cell | None = None,
    params: Params = None,
    weight: float | Float[Array, ""] = 1.0,
    bonus: float | Float[Array, ""] = 0.0,
) -> Beams:
    """The labels of the highest probability, found by a search over prefixes; with enough beams it is exact.

    Alignments of the same labels add up. A language model may be given, a `cell` from tokens to logits of the same
    vocabulary, with its params: the score of labels is then their log-probability plus `weight` times that of the
    model, which has read the blank before the first of them and gives no probability to it. `bonus` is added for each
    label. Its state is kept for each prefix. One program runs all rows and steps; weight and bonus are traced.

    Hannun, Maas, Jurafsky and Ng, First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional
    Recurrent DNNs, 2014, arXiv:1408.2873.

    >>> logits = jnp.log(jnp.array([[0.6, 0.4], [0.6, 0.4]]))  # 00 has 0.36, but 1 is read from 11, 01 and 10
    >>> found = beam_search(logits, beams=2)
    >>> found.tokens.tolist(), found.lengths.tolist(), f"{jnp.exp(found.log_probs[0]):.2f}"
    ([[1, 0], [0, 0]], [1, 0], '0.64')
    """
    logits, mask, blank = check_logits("ctc.beam_search", logits, mask, blank)
    beams = prefixes.check_search("ctc.beam_search", beams, cell, logits, mask)
    if (cell is None) != (params is None):
        raise ValueError("ctc.beam_search needs a language model as a cell and its params, got one of them alone.")
    for what, number in (("weight", weight), ("bonus", bonus)):
        if jnp.ndim(number) != 0:
            raise ValueError(f"ctc.beam_search needs one number as {what}, got {errors.shape_of(number)}.")
    log_probs = _log_probs(logits, mask)
    keep = jnp.ones_like(log_probs[..., 0], bool) if mask is None else mask
    weight, bonus = (jnp.asarray(number, log_probs.dtype) for number in (weight, bonus))
    return prefixes.search(log_probs, keep, cell, params, weight, bonus, beams=beams, blank=blank)


def first_of(keep: Bool[Array, "*batch time"], values: Array) -> tuple[Array, Int[Array, "*batch time"]]:
    """The values `[*batch, time]` that are kept, in order, before the others; and where each stood."""
    order = jnp.argsort(~keep, axis=-1, stable=True)
    return jnp.take_along_axis(values, order, axis=-1), order


def check_logits(name: str, logits: Array, mask: Array | None, blank: int) -> tuple[Array, Array | None, int]:
    """Logits, mask and blank; raises unless they are those of steps."""
    logits, mask = jnp.asarray(logits), None if mask is None else jnp.asarray(mask)
    if logits.ndim < 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{name} needs floating logits [*batch, time, vocab], got {errors.shape_of(logits)}.")
    if mask is not None:
        errors.check_flags(name, mask, "mask", logits.shape[:-1])
    return logits, mask, check_blank(name, blank, logits.shape[-1])


def log_softmax(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch vocab"]:
    """The log-probabilities in at least float32; -inf, with gradients of 0, where all logits are -inf."""
    with jax.numpy_dtype_promotion("standard"):  # a choice of ours, whatever the caller lets promote by itself
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    total = logsumexp(logits, -1)[..., None]
    return logits - jnp.where(jnp.isneginf(total), 0, total)


def _log_probs(logits, mask):
    """The log-probabilities, those of zeros off the mask."""
    return log_softmax(logits if mask is None else masks.zero_unless(mask, logits))


def check_blank(name: str, blank: int, vocab: int) -> int:
    """The blank; raises ValueError unless it is a number below the vocab."""
    number = prefixes.static_number(blank)
    if number is None or not 0 <= number < vocab:
        raise ValueError(f"{name} needs a static blank below the vocab {vocab}, got {blank!r}.")
    return number


def check_labels(
    name: str, labels: Array, label_mask: Array | None, batch: tuple[int, ...]
) -> tuple[Int[Array, "*batch label"], Bool[Array, "*batch label"]]:
    """The labels and which of them are real; raises unless they are those of the rows."""
    labels = jnp.asarray(labels)
    if labels.ndim == 0 or labels.shape[:-1] != batch or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{name} needs integer labels [*batch, label] with batch axes {batch}, got {errors.shape_of(labels)}."
        )
    if label_mask is None:
        return labels.astype(int), jnp.ones(labels.shape, bool)
    label_mask = jnp.asarray(label_mask)
    errors.check_flags(name, label_mask, "label_mask", labels.shape)
    return labels.astype(int), label_mask


class _Given(NamedTuple):
    """What was given; the labels that are real first."""

    log_probs: Float[Array, "*batch time vocab"]
    labels: Int[Array, "*batch label"]
    real: Bool[Array, "*batch label"]
    order: Int[Array, "*batch label"]  # where each label stood
    wrong: Bool[Array, "*batch"]
    mask: Bool[Array, "*batch time"] | None
    blank: int


def _checked(name, logits, labels, mask, label_mask, blank):
    logits, mask, blank = check_logits(name, logits, mask, blank)
    numbers, real = check_labels(name, labels, label_mask, logits.shape[:-2])
    if errors.are_known(labels, label_mask):
        found = np.asarray(labels)[... if label_mask is None else np.asarray(label_mask)]
        wrong = found[_no_labels(found, logits.shape[-1], blank)]
        if wrong.size:
            what = "the blank" if wrong[0] == blank else f"none of the vocab {logits.shape[-1]}"
            raise ValueError(
                f"{name} got the label {wrong[0]}, which is {what}; if it pads, pass label_mask "
                f"(length_mask(lengths, {numbers.shape[-1]}))."
            )
    return logits, numbers, mask, real, blank


def _no_labels(labels, vocab, blank):
    return (labels == blank) | (labels < 0) | (labels >= vocab)


def _given(logits, labels, mask, real, blank) -> _Given:
    wrong = (_no_labels(labels, logits.shape[-1], blank) & real).any(axis=-1)
    labels, order = first_of(real, jnp.where(real, labels, blank))
    real = jnp.take_along_axis(real, order, axis=-1)
    return _Given(_log_probs(logits, mask), labels, real, order, wrong, mask, blank)


def _steps(given):
    time = given.log_probs.shape[-2]
    return jnp.full(given.labels.shape[:-1], time) if given.mask is None else given.mask.sum(axis=-1)


def _repeats(given):
    return (given.labels[..., 1:] == given.labels[..., :-1]) & given.real[..., 1:]


def _fits(given):
    return _steps(given) >= given.real.sum(axis=-1) + _repeats(given).sum(axis=-1)


def _chain(given: _Given) -> Chain:
    """The chain whose paths are the alignments of the labels."""
    *batch, count = given.labels.shape
    states = 2 * count + 1
    outer = [(0, 0)] * len(batch)
    pairs = jnp.stack([jnp.full_like(given.labels, given.blank), given.labels], axis=-1).reshape(*batch, 2 * count)
    classes = jnp.pad(pairs, [*outer, (0, 1)], constant_values=given.blank)
    emission = _classes_at(given.log_probs, classes)
    before = jnp.pad(classes, [*outer, (2, 0)], constant_values=given.blank)[..., :states]
    skips = (classes != given.blank) & (classes != before)  # over the blank between two labels
    moves = jnp.stack([jnp.ones_like(skips), jnp.ones_like(skips), skips], axis=-2)
    index, ends = lax.broadcasted_iota(int, classes.shape, len(batch)), 2 * given.real.sum(axis=-1, keepdims=True)

    def only(flags):
        return jnp.where(flags, 0, -jnp.inf).astype(emission.dtype)

    return Chain(only(jnp.arange(states) < 2), Band(only(moves)), emission, only((index == ends) | (index == ends - 1)))


@jax.custom_jvp
def _classes_at(log_probs: Float[Array, "*batch time vocab"], classes: Int[Array, "*batch state"]) -> Array:
    """The log-probabilities of the classes of each state; the gradient is a product, which is faster than a scatter."""
    index = jnp.broadcast_to(classes[..., None, :], (*log_probs.shape[:-1], classes.shape[-1]))
    return jnp.take_along_axis(log_probs, jnp.clip(index, 0, log_probs.shape[-1] - 1), axis=-1)


@_classes_at.defjvp
def _(primals, tangents):
    (log_probs, classes), (tangent, _) = primals, tangents
    chosen = jax.nn.one_hot(classes, log_probs.shape[-1], dtype=log_probs.dtype)
    return _classes_at(*primals), jnp.einsum("...tv,...sv->...ts", tangent, chosen, precision="highest")
