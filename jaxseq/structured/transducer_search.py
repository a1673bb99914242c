"""Decoding with a recurrent transducer, along the diagonals of its lattice."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks
from jaxseq.core.cell import Cell, Params
from jaxseq.structured import prefixes
from jaxseq.structured.ctc import log_softmax
from jaxseq.structured.prefixes import Beams, Prefixes


def beam_search(
    cell: Cell,
    params: Params,
    joint: Callable[[Array, Array], Array],
    encoded: Float[Array, "*batch time features"],
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    beams: int,
    max_labels: int,
    blank: int = 0,
) -> Beams:
    """The labels of the highest probability, at most `max_labels` a row; `beams=1` is greedy decoding.

    `cell`, from tokens to vectors, is the prediction network, which reads the blank before the first label; `joint` the
    function of `transducer.joint_lattice`, from `[beam, features]` of both to logits. Equal functions compile once: as
    `jax.tree_util.Partial(function, params)` its params are traced.

    All prefixes in the beam have taken the same number of steps in the lattice, a blank or a label each, so those with
    the same labels are in the same place, and their alignments add up; with enough beams the search is exact. Its
    `scores` are the `log_probs`. (Saon, Tüske and Audhkhasi, Alignment-Length Synchronous Decoding for RNN Transducer,
    ICASSP 2020, doi:10.1109/ICASSP40776.2020.9053040.)

    >>> import jaxseq as js
    >>> cell = js.Embed(5, 4)  # it reads the last label alone
    >>> def joint(encoded, predicted):
    ...     return encoded + jnp.pad(predicted, [(0, 0), (0, 1)])
    >>> out = beam_search(cell, cell.init(jax.random.key(0)), joint, jnp.ones((6, 5)), beams=3, max_labels=4)
    >>> out.tokens.shape, out.scores.shape
    ((3, 4), (3,))
    """
    name = "transducer.beam_search"
    encoded = jnp.asarray(encoded)
    beams = prefixes.check_search(name, beams, cell, encoded, mask)
    if encoded.ndim < 2 or not jnp.issubdtype(encoded.dtype, jnp.floating):
        raise ValueError(f"{name} needs floating encoded [*batch, time, features], got {errors.shape_of(encoded)}.")
    max_labels = prefixes.at_least(0, name, "max_labels", max_labels)
    blank = prefixes.at_least(0, name, "blank", blank)
    mask = None if mask is None else jnp.asarray(mask)
    if mask is not None:
        errors.check_flags(name, mask, "mask", encoded.shape[:-1])
    if jax.tree_util.all_leaves([joint]):  # a plain function becomes a pytree that compares by it
        joint = jax.tree_util.Partial(joint)
    keep = jnp.ones(encoded.shape[:-1], bool) if mask is None else mask
    return _search(cell, params, joint, encoded, keep, beams=beams, max_labels=max_labels, blank=blank)


class _Ended(NamedTuple):
    """The best prefixes that have ended, with their log-probabilities."""

    tokens: Int[Array, "beam label"]
    lengths: Int[Array, "beam"]
    score: Float[Array, "beam"]


class _Search(NamedTuple):
    """The prefixes on one diagonal, and the best of those that have ended."""

    prefixes: Prefixes
    score: Float[Array, "beam"]
    state: Any
    predicted: Any
    ended: _Ended


@functools.partial(jax.jit, static_argnames=("cell", "beams", "max_labels", "blank"))
def _search(cell, params, joint, encoded, keep, *, beams, max_labels, blank):
    def row(encoded, keep):
        time, steps = len(keep), keep.sum()
        encoded = masks.zero_unless(keep, encoded)[jnp.argsort(~keep, stable=True)]
        state, predicted = cell.step(params, cell.initial_state(params, (beams,)), jnp.full(beams, blank, int))
        if time == 0:
            encoded = jnp.zeros((1, encoded.shape[-1]), encoded.dtype)
        logits = jax.eval_shape(joint, jax.ShapeDtypeStruct((beams, encoded.shape[-1]), encoded.dtype), predicted)
        if logits.shape[:-1] != (beams,) or blank >= logits.shape[-1]:
            raise ValueError(
                f"transducer.beam_search needs a joint function that gives logits [beam, vocab] with the blank {blank} "
                f"below the vocab, for {beams} beams it gave {errors.shape_of(logits)}."
            )
        with jax.numpy_dtype_promotion("standard"):  # a choice of ours, whatever the caller lets promote by itself
            dtype = jnp.promote_types(logits.dtype, jnp.float32)
        vocab = logits.shape[-1]
        empty = Prefixes.empty(beams, max_labels, blank)
        first = jnp.where(jnp.arange(beams) == 0, 0, jnp.full(beams, -jnp.inf, dtype))
        nothing = jnp.full(beams, -jnp.inf, dtype)
        ended = jnp.where(steps == 0, first, nothing)  # without steps there is one path, the empty one
        alive = jnp.where(steps == 0, nothing, first)

        def step(s: _Search, diagonal):
            (tokens, lengths, _), score = s.prefixes, s.score
            at = diagonal - lengths
            here = encoded[jnp.clip(at, 0, max(time - 1, 0))]
            log_prob = log_softmax(joint(here, s.predicted)) + score[:, None]
            grows = (jnp.arange(vocab) != blank)[None] & (lengths < max_labels)[:, None]
            longer, same = jnp.where(grows, log_prob, -jnp.inf), log_prob[:, blank]
            ends = at == steps - 1
            ended = _best(s.ended, _Ended(tokens, lengths, jnp.where(ends, same, -jnp.inf)))
            same = jnp.where(ends, -jnp.inf, same)
            gained, longer = prefixes.merge(s.prefixes, same > -jnp.inf, longer, blank)
            same = jnp.logaddexp(same, gained)
            chosen = prefixes.choose(s.prefixes, same, longer)
            state, predicted = prefixes.read(cell, params, s.state, s.predicted, chosen)
            new = _Search(chosen.prefixes, chosen.of(same, longer), state, predicted, ended)
            return new, None

        begin = _Search(empty, alive, state, predicted, _Ended(empty.tokens, empty.lengths, ended))
        s, _ = lax.scan(step, prefixes.typed_as(begin, keep), jnp.arange(time + max_labels))
        return prefixes.clean(Beams(*s.ended, s.ended.score), blank)

    return prefixes.over_rows(row, keep.ndim - 1)(encoded, keep)


def _best(ended: _Ended, new: _Ended) -> _Ended:
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ended, new)
    order = lax.top_k(both.score, len(new.score))[1]
    return jax.tree.map(lambda leaf: leaf[order], both)
