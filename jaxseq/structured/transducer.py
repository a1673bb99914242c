"""The recurrent transducer: labels whose steps are not known, each predicted from the inputs and the labels before it.

In step t, after u labels, the model gives the next label a log-probability, and the blank, which ends the step, one
too. An alignment is a way through the lattice of pairs (t, u), from (0, 0) to the blank that ends the last step with
all labels given. On its diagonals, t + u = 0, 1, ..., it is a path over the states u that move up by at most one.

There are no resets: labels belong to a whole sequence, so documents that were packed into one row are put into rows of
their own.

Graves, Sequence Transduction with Recurrent Neural Networks, 2012, arXiv:1211.3711.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks, sharding
from jaxseq.structured.chains import Band, Chain, log_partition
from jaxseq.structured.ctc import check_blank, check_labels, first_of, log_softmax
from jaxseq.structured.transducer_search import beam_search as beam_search


class Lattice(NamedTuple):
    """The log-probabilities of the alignments of given labels: in step t, after u labels, of the blank, and of label u.

    `loss` needs nothing else; `lattice` and `joint_lattice` make it.
    """

    blank: Float[Array, "*batch time position"]
    label: Float[Array, "*batch time label"]


def lattice(
    log_probs: Float[Array, "*batch time position vocab"], labels: Int[Array, "*batch label"], *, blank: int = 0
) -> Lattice:
    """The lattice of labels, of log-probabilities: `jax.nn.log_softmax` of the joint network's logits, not these.

    What is no label, the blank or a number out of range, is NaN, which a label mask takes off again.

    >>> lattice(jnp.log(jnp.full((4, 3, 5), 0.2)), jnp.array([1, 2])).label.shape
    (4, 2)
    """
    log_probs, labels = jnp.asarray(log_probs), jnp.asarray(labels)
    if log_probs.ndim < 3 or not jnp.issubdtype(log_probs.dtype, jnp.floating):
        raise ValueError(
            "transducer.lattice needs floating log_probs [*batch, time, label + 1, vocab], got "
            f"{errors.shape_of(log_probs)}."
        )
    blank = check_blank("transducer.lattice", blank, log_probs.shape[-1])
    labels, _ = check_labels("transducer.lattice", labels, None, log_probs.shape[:-3])
    count = labels.shape[-1]
    if log_probs.shape[-2] != count + 1:
        raise ValueError(
            f"transducer.lattice needs log_probs of one more position than labels, {count + 1}, got "
            f"{log_probs.shape[-2]}: before the first label and after each."
        )
    return _lattice(log_probs, labels, blank=blank)


@functools.partial(jax.jit, static_argnames="blank", inline=True)
def _lattice(log_probs, labels, *, blank):
    count = labels.shape[-1]
    vocab, steps = log_probs.shape[-1], log_probs.shape[:-2]
    index = jnp.broadcast_to(jnp.clip(labels, 0, vocab - 1)[..., None, :, None], (*steps, count, 1))
    taken = jnp.take_along_axis(log_probs[..., :-1, :], index, axis=-1)[..., 0]
    wrong = jnp.broadcast_to(((labels < 0) | (labels >= vocab) | (labels == blank))[..., None, :], taken.shape)
    return Lattice(log_probs[..., blank], jnp.where(wrong, jnp.nan, taken))


def joint_lattice(
    joint: Callable[[Array, Array], Array],
    encoded: Float[Array, "*batch time features"],
    predicted: Float[Array, "*batch position features"],
    labels: Int[Array, "*batch label"],
    mask: Bool[Array, "*batch time"] | None = None,
    label_mask: Bool[Array, "*batch label"] | None = None,
    *,
    blank: int = 0,
) -> Lattice:
    """The lattice of labels, of what encoder and prediction network give, one step of the inputs after the other.

    `joint(encoded [*batch, 1, features], predicted [*batch, label + 1, features])` gives logits, not log-probabilities,
    such as those of
    `Dense(...).apply(params, jnp.tanh(encoded + predicted))`. They are computed again for the gradient, so
    `[*batch, time, label + 1, vocab]` is never there at once. `predicted[..., u, :]` has read u labels: let the
    prediction network read `begin(labels)`. What is off the masks, NaN too, reaches no gradient; `loss` takes the same.
    """
    encoded, predicted = jnp.asarray(encoded), jnp.asarray(predicted)
    if encoded.ndim < 2 or predicted.ndim != encoded.ndim or predicted.shape[:-2] != encoded.shape[:-2]:
        raise ValueError(
            "transducer.joint_lattice needs encoded [*batch, time, features] and predicted [*batch, label + 1, "
            f"features], got {errors.shape_of((encoded, predicted))}."
        )
    name = "transducer.joint_lattice"
    labels, _ = check_labels(name, labels, None, encoded.shape[:-2])
    count = labels.shape[-1]
    if predicted.shape[-2] != count + 1:
        raise ValueError(
            f"{name} needs predicted [*batch, label + 1, features], {count + 1} positions for {count} labels, got "
            f"{predicted.shape[-2]}: let the prediction network read begin(labels)."
        )
    mask, label_mask = _flags(name, mask, label_mask, (*encoded.shape[:-1], count))
    if mask is not None:
        encoded = masks.zero_unless(mask, encoded)
    if label_mask is not None:
        predicted = masks.zero_unless(_read(label_mask), predicted)

    @jax.checkpoint
    def one_step(x):
        log_probs = log_softmax(joint(x[..., None, :], predicted))
        found = lattice(log_probs[..., None, :, :], labels, blank=blank)
        return jax.tree.map(lambda leaf: leaf[..., 0, :], found)

    steps = lax.map(one_step, jnp.moveaxis(encoded, -2, 0))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -2), steps)


def begin(labels: Int[Array, "*batch label"], *, blank: int = 0) -> Int[Array, "*batch position"]:
    """The labels with the blank before them: what the prediction network reads.

    >>> begin(jnp.array([3, 1])).tolist()
    [0, 3, 1]
    """
    labels = jnp.asarray(labels)
    return jnp.pad(labels, [(0, 0)] * (labels.ndim - 1) + [(1, 0)], constant_values=blank)


def loss(
    lattice: Lattice,
    mask: Bool[Array, "*batch time"] | None = None,
    label_mask: Bool[Array, "*batch label"] | None = None,
) -> Float[Array, "*batch"]:
    """The negative log-probability in nats of the labels of each row, summed over their alignments.

    A step off `mask` is as if it were not there, gaps included; of the labels, whose number says which of the
    predictions are read, those on `label_mask` have to stand first, as `length_mask` has them. Half precision is
    computed in float32. Labels without a step have the loss inf, with gradients of 0.

    Raises:
        ValueError: if shapes do not agree, or the lattice, where it is concrete, holds no log-probabilities.
        TypeError: if a mask is not boolean, or there is no lattice.

    >>> log_probs = jnp.log(jnp.full((3, 2, 4), 0.25))  # three steps, one label: three alignments, each of 4 choices
    >>> from jaxseq.structured import transducer
    >>> f"{loss(transducer.lattice(log_probs, jnp.array([2]))):.4f}"  # 4 ln 4 - ln 3
    '4.4466'
    """
    given = _checked(lattice)
    mask, label_mask = _flags("transducer.loss", mask, label_mask, (*given.blank.shape[:-1], given.label.shape[-1]))
    if errors.are_known(*given, mask, label_mask):
        with jax.ensure_compile_time_eval():
            largest = float(_largest(given, mask, label_mask))
        if largest > _MOST:
            raise ValueError(
                f"transducer.loss needs a Lattice of log-probabilities, got {largest:.3g} for blank and label "
                "together: give lattice the jax.nn.log_softmax of logits, or let joint_lattice take it."
            )
    return _loss(given, mask, label_mask)


_MOST = 0.02  # the log of what blank and label have together, if log-probabilities were rounded to bfloat16


@jax.jit
def _largest(given, mask, label_mask):
    """The largest log of what blank and label have together."""
    both = jnp.logaddexp(
        given.blank, jnp.pad(given.label, [(0, 0)] * (given.label.ndim - 1) + [(0, 1)], constant_values=-jnp.inf)
    )
    both = both if mask is None else jnp.where(mask[..., None], both, -jnp.inf)
    both = both if label_mask is None else jnp.where(_read(label_mask)[..., None, :], both, -jnp.inf)
    return jnp.where(jnp.isnan(both), -jnp.inf, both).max(initial=-jnp.inf)


@functools.partial(jax.jit, inline=True)
def _loss(given, mask, label_mask):
    *batch, time, states = given.blank.shape
    spec = sharding.leading_spec(given, len(batch))
    keep = sharding.placed(jnp.ones((*batch, time), bool), spec) if mask is None else mask
    real = sharding.placed(jnp.ones((*batch, states - 1), bool), spec) if label_mask is None else label_mask
    steps, count = keep.sum(axis=-1), real.sum(axis=-1)
    read = _read(real)[..., None, :]
    given = jax.tree.map(lambda leaf: jnp.where(read[..., -leaf.shape[-1] :], leaf, -jnp.inf), given)
    given = given if mask is None else jax.tree.map(lambda leaf: _steps_first(keep, leaf), given)
    weights, ends = _diagonals(given, steps, count)
    start = jnp.where(jnp.arange(states) == 0, 0, -jnp.inf).astype(weights.dtype)
    emission = jnp.zeros((*batch, weights.shape[-3], states), weights.dtype)
    used = masks.length_mask(steps + count, weights.shape[-3]) & (steps > 0)[..., None]
    losses = -log_partition(Chain(start, Band(weights), emission, ends), used)
    return jnp.where(steps > 0, losses, jnp.where(count > 0, jnp.inf, 0).astype(losses.dtype))


def _flags(name, mask, label_mask, shape):
    """Both masks as arrays, checked for `[*batch, time, label]`."""
    *batch, time, count = shape
    mask, label_mask = (None if flags is None else jnp.asarray(flags) for flags in (mask, label_mask))
    for flags, what, size in ((mask, "mask", time), (label_mask, "label_mask", count)):
        if flags is not None:
            errors.check_flags(name, flags, what, (*batch, size))
    return mask, label_mask


def _read(label_mask):
    """The positions that count: before the first label and after each."""
    return masks.length_mask(label_mask.sum(axis=-1) + 1, label_mask.shape[-1] + 1)


def _checked(given: Lattice) -> Lattice:
    if not isinstance(given, Lattice):
        raise TypeError(f"transducer.loss needs a Lattice(blank, label), got {errors.shape_of(given)}.")
    blank, label = map(jnp.asarray, given)
    if blank.ndim < 2 or label.shape != (*blank.shape[:-1], blank.shape[-1] - 1):
        raise ValueError(
            "transducer.loss needs Lattice(blank [*batch, time, label + 1], label [*batch, time, label]), got "
            f"{errors.shape_of(given)}."
        )
    with jax.numpy_dtype_promotion("standard"):  # a choice of ours, whatever the caller lets promote by itself
        dtype = jnp.promote_types(jnp.result_type(blank, label), jnp.float32)
    return Lattice(blank.astype(dtype), label.astype(dtype))


def _steps_first(keep, leaf):
    """The steps that are kept, in order, and then zeros."""
    _, order = first_of(keep, keep)
    index = jnp.broadcast_to(order[..., None], leaf.shape)
    return jnp.take_along_axis(masks.zero_unless(keep, leaf), index, axis=-2)


def _diagonals(given: Lattice, steps, count) -> tuple[Array, Array]:
    """The weights of both moves on each diagonal, `[*batch, time + label, 2, label + 1]`, and those of the ends."""
    *batch, time, states = given.blank.shape
    inside = masks.length_mask(steps, time)[..., None]

    def skewed(leaf):  # [*batch, time, n] -> [*batch, time + label, n], column u moved u steps later
        leaf = jnp.where(inside, leaf, -jnp.inf)
        size = leaf.shape[-1]
        wide = jnp.pad(jnp.swapaxes(leaf, -1, -2), [(0, 0)] * (leaf.ndim - 1) + [(0, states)], constant_values=-jnp.inf)
        flat = wide.reshape(*batch, size * (time + states))[..., : size * (time + states - 1)]
        return jnp.swapaxes(flat.reshape(*batch, size, time + states - 1), -1, -2)

    up = jnp.pad(skewed(given.label), [(0, 0)] * (len(batch) + 1) + [(1, 0)], constant_values=-jnp.inf)
    last = jnp.maximum(steps - 1, 0)[..., None, None]
    leaving = jnp.take_along_axis(given.blank, jnp.broadcast_to(last, (*batch, 1, states)), axis=-2)[..., 0, :]
    ends = jnp.where(lax.broadcasted_iota(int, leaving.shape, len(batch)) == count[..., None], leaving, -jnp.inf)
    return jnp.stack([skewed(given.blank), up], axis=-2), ends
