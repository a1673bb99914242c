"""Beam search over prefixes: alignments of the same labels are added up, so that labels compete, not alignments."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks, sharding
from jaxseq.core.cell import Cell


class Beams(NamedTuple):
    """The label sequences found, the best first: tokens, the blank after the first `lengths`.

    `log_probs` sums the alignments that were not pruned, and `scores`, by which the beams are chosen, adds what a
    language model gives. Where there are fewer sequences than beams, both are -inf and the length is 0.
    """

    tokens: Int[Array, "*batch beam label"]
    lengths: Int[Array, "*batch beam"]
    log_probs: Float[Array, "*batch beam"]
    scores: Float[Array, "*batch beam"]


class Prefixes(NamedTuple):
    """The prefixes of the beam, and whether the one is the other or begins it, `[the one, the other]`."""

    tokens: Int[Array, "beam label"]
    lengths: Int[Array, "beam"]
    begins: Bool[Array, "beam beam"]

    @classmethod
    def empty(cls, beams: int, labels: int, blank: int) -> "Prefixes":
        """One empty prefix, and others that are none."""
        return cls(jnp.full((beams, labels), blank, int), jnp.zeros(beams, int), jnp.eye(beams, dtype=bool))


class Chosen(NamedTuple):
    """The best candidates: from which prefix each comes, by which token if it is longer, and what they are."""

    parent: Int[Array, "beam"]
    token: Int[Array, "beam"]
    longer: Bool[Array, "beam"]
    prefixes: Prefixes

    def of(self, same: Array, longer: Array) -> Array:
        """What belongs to the chosen ones, of what belongs to prefixes that stay `[beam]` or grow `[beam, vocab]`."""
        return jnp.where(self.longer, longer[self.parent, self.token], same[self.parent])


def last_tokens(tokens: Int[Array, "beam label"], lengths: Int[Array, "beam"], blank: int) -> Int[Array, "beam"]:
    """The last token of each prefix, the blank of an empty one."""
    at = lax.broadcasted_iota(int, tokens.shape, 1) == lengths[:, None] - 1
    return jnp.where(at, tokens, 0).sum(axis=1) + jnp.where(lengths == 0, blank, 0)


def merge(
    prefixes: Prefixes, possible: Array, longer: Array, blank: int
) -> tuple[Float[Array, "beam"], Float[Array, "beam vocab"]]:
    """What prefixes gain from shorter ones that grow into them, and what grows into no other prefix."""
    last = last_tokens(prefixes.tokens, prefixes.lengths, blank)
    same = prefixes.begins & (prefixes.lengths[:, None] + 1 == prefixes.lengths[None])
    same &= possible[None]  # [from, into]
    gained = jnp.where(same, longer[:, last], -jnp.inf).max(axis=0)
    merged = same.astype(longer.dtype) @ jax.nn.one_hot(last, longer.shape[-1], dtype=longer.dtype) > 0
    return gained, jnp.where(merged, -jnp.inf, longer)


def choose(before: Prefixes, same: Float[Array, "beam"], longer: Float[Array, "beam vocab"]) -> Chosen:
    """The best of the prefixes that stay the same, and of those that grow by a token."""
    beams, vocab = longer.shape
    index = lax.top_k(jnp.concatenate([same, longer.ravel()]), beams)[1]
    grows, cell = index >= beams, jnp.maximum(index - beams, 0)
    parent, token = jnp.where(grows, cell // vocab, index), (cell % vocab).astype(int)
    tokens, lengths = before.tokens[parent], before.lengths[parent]
    at = (lax.broadcasted_iota(int, tokens.shape, 1) == lengths[:, None]) & grows[:, None]
    tokens = jnp.where(at, jnp.broadcast_to(token[:, None], tokens.shape), tokens)
    # one that grew begins another if its parent did, and the token after that is the same
    following = jnp.pad(tokens, ((0, 0), (0, 1)))[:, lengths].T
    lengths = lengths + grows.astype(int)
    begins = before.begins[parent][:, parent] & (lengths[:, None] <= lengths[None])
    begins &= ~grows[:, None] | (following == token[:, None])
    return Chosen(parent, token, grows, Prefixes(tokens, lengths, begins))


def read(cell: Cell, params: Any, state: Any, output: Array, chosen: Chosen) -> tuple[Any, Array]:
    """State and output of a cell that has read the tokens of the chosen prefixes."""
    before = jax.tree.map(lambda leaf: leaf[chosen.parent], (state, output))
    return masks.select(chosen.longer, cell.step(params, before[0], chosen.token), before)


def typed_as(tree: Any, row: Array) -> Any:
    """The same numbers, as one row of a batch that stands where that of `row` does."""
    nothing = jnp.zeros_like(row.sum(), int)
    return jax.tree.map(lambda leaf: jnp.where(nothing == 0, leaf, jnp.zeros_like(leaf)), tree)


def over_rows(search: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """A search in one row, for arrays with so many batch axes."""
    return functools.reduce(lambda mapped, _: jax.vmap(mapped), range(rows), search)


def clean(beams: Beams, blank: int) -> Beams:
    """Without what stands in beams that hold nothing."""
    found = beams.scores > -jnp.inf
    lengths = jnp.where(found, beams.lengths, 0)
    index = lax.broadcasted_iota(int, beams.tokens.shape, beams.tokens.ndim - 1)
    return beams._replace(tokens=jnp.where(index < lengths[..., None], beams.tokens, blank), lengths=lengths)


def static_number(value: Any) -> int | None:
    """A whole number that is no tracer as an int, one of NumPy too; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def at_least(least: int, name: str, what: str, value: Any) -> int:
    """A static number; raises ValueError unless it is one of at least that."""
    number = static_number(value)
    if number is None or number < least:
        raise ValueError(f"{name} needs {what} >= {least}, a static number, got {value!r}.")
    return number


def check_search(name: str, beams: int, cell: Cell | None, *arrays: Any) -> int:
    """The number of beams; raises unless there is one, and the cell, if any, reads tokens."""
    if sharding.out_sharding(PartitionSpec(), *jax.tree.leaves(arrays)) is not None:
        raise ValueError(
            f"{name} searches row by row: arrays that are sharded by their types go through jax.shard_map."
        )
    beams = at_least(1, name, "beams", beams)
    if cell is not None and not (isinstance(cell, Cell) and cell.input_rank == 0):
        raise TypeError(f"{name} needs a Cell that reads tokens, got {cell}.")
    return beams


class _Search(NamedTuple):
    """Of each prefix, the alignments that end with the blank and those that do not; what a language model says."""

    prefixes: Prefixes
    blank: Float[Array, "beam"]
    label: Float[Array, "beam"]
    score: Float[Array, "beam"]
    state: Any
    logits: Array  # of the language model, `[beam, vocab]`


@functools.partial(jax.jit, static_argnames=("cell", "beams", "blank"))
def search(
    log_probs: Float[Array, "*batch time vocab"],
    mask: Bool[Array, "*batch time"],
    cell: Cell | None,
    params: Any,
    weight: Array,
    bonus: Array,
    *,
    beams: int,
    blank: int,
) -> Beams:
    """The prefixes that CTC gives the highest scores: see `ctc.beam_search`."""
    time, vocab = log_probs.shape[-2:]
    dtype = log_probs.dtype
    first = jnp.arange(beams) == 0

    def following(logits):  # what each token would add to the score
        if cell is None:
            return jnp.full((beams, vocab), bonus)
        logits = jnp.where(jnp.arange(vocab) == blank, -jnp.inf, logits.astype(dtype))
        log_prob = jax.nn.log_softmax(logits)
        return jnp.where(jnp.isneginf(log_prob) & (weight == 0), 0, weight * log_prob) + bonus

    def begin():
        state, logits = (), jnp.zeros((beams, 0))
        if cell is not None:
            state, logits = cell.step(params, cell.initial_state(params, (beams,)), jnp.full(beams, blank, int))
            if logits.shape != (beams, vocab):
                raise ValueError(
                    f"ctc.beam_search needs a cell whose step gives logits of the vocab {vocab}, but {cell} gives "
                    f"{errors.shape_of(logits)} for {beams} tokens."
                )
        nothing = jnp.full(beams, -jnp.inf, dtype)
        alone = jnp.where(first, 0, nothing)
        return _Search(Prefixes.empty(beams, time, blank), alone, nothing, jnp.zeros(beams, dtype), state, logits)

    def step(s: _Search, inputs):
        log_prob, keep = inputs
        last, total = last_tokens(s.prefixes.tokens, s.prefixes.lengths, blank), jnp.logaddexp(s.blank, s.label)
        again = jnp.arange(vocab) == last[:, None]  # the same label once more only after a blank
        longer = log_prob + jnp.where(again, s.blank[:, None], total[:, None])
        longer = jnp.where(jnp.arange(vocab) == blank, -jnp.inf, longer)
        gained, longer = merge(s.prefixes, total > -jnp.inf, longer, blank)
        on_blank, on_label = total + log_prob[blank], jnp.logaddexp(s.label + log_prob[last], gained)
        score = s.score[:, None] + following(s.logits)
        chosen = choose(s.prefixes, jnp.logaddexp(on_blank, on_label) + s.score, longer + score)
        state, logits = (s.state, s.logits) if cell is None else read(cell, params, s.state, s.logits, chosen)
        new = _Search(
            prefixes=chosen.prefixes,
            blank=chosen.of(on_blank, jnp.full_like(longer, -jnp.inf)),
            label=chosen.of(on_label, longer),
            score=chosen.of(s.score, score),
            state=state,
            logits=logits,
        )
        return jax.tree.map(lambda new, old: jnp.where(keep, new, old), new, s), None

    def row(log_probs, mask):
        s, _ = lax.scan(step, typed_as(begin(), mask), (log_probs, mask))
        total = jnp.logaddexp(s.blank, s.label)
        score = jnp.where(jnp.isneginf(total), -jnp.inf, total + s.score)
        return clean(Beams(s.prefixes.tokens, s.prefixes.lengths, total, score), blank)

    return over_rows(row, mask.ndim - 1)(log_probs, mask)
