"""Transitions that move up by a few states, and the log-partition of such chains with its gradient written out.

It is a second form of the loop in `passes`, for the sake of its gradient. Derived from the steps, that would take each
exp and log a second time. But the forward loop has the share of each move in what arrives at a state; with these the
way back, the posterior of the states, is a linear recurrence. For alignments it makes the gradient faster by half
(`benchmarks/results/alignments-cpu.md`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from jaxseq.core import masks
from jaxseq.core.unroll import scan_from_fresh
from jaxseq.structured.semirings import logsumexp


class Band(NamedTuple):
    """Transitions that move up by 0 to K - 1 states: `weights[..., k, j]` is that from state j - k to state j.

    What would begin below state 0 is not read. The alignments of CTC and of transducers are such.
    """

    weights: Float[Array, "... moves state"]


class Potentials(NamedTuple):
    """The log potentials of a banded chain, time first; with `[time, ...]` weights where they vary."""

    start: Float[Array, "*batch state"]
    weights: Float[Array, "... moves state"]
    emission: Float[Array, "time *batch state"]
    end: Float[Array, "*batch state"]


class Flags(NamedTuple):
    """The steps that count, those that begin a document, and the last ones of documents."""

    keep: Bool[Array, "time *batch"] | None
    reset: Bool[Array, "time *batch"] | None
    last: Bool[Array, "time *batch"]


@jax.custom_jvp
def log_partition(potentials: Potentials, flags: Flags) -> Float[Array, "*batch"]:
    """The log of the sum over all paths of the exponentials of their scores, as in `chains.log_partition`."""
    return _forward(potentials, flags)[0]


def _forward(p: Potentials, flags: Flags) -> tuple[Array, Array, list[Array]]:
    """The log-partition; the posterior of each state where a document ends, `[time, *batch, state]`; and the share of
    each move in what arrives at each state after a step, such arrays as well.
    """
    varying, constant = (p.weights, None) if p.weights.ndim > p.emission.ndim else (None, p.weights)

    def step(arriving, inputs):
        emission, weights, keep, reset = inputs
        weights = weights if constant is None else constant
        if reset is not None:
            arriving = masks.select(reset, p.start, arriving)
        here = arriving + emission
        scale = _finite(here.max(axis=-1))
        here -= jnp.broadcast_to(scale[..., None], here.shape)
        moved = [_up(here, k) + weights[..., k, :] for k in range(weights.shape[-2])]
        largest = _finite(functools.reduce(jnp.maximum, moved))
        parts = [jnp.exp(part - largest) for part in moved]
        total = sum(parts)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        after = jnp.where(empty, -jnp.inf, jnp.log(total) + largest)
        if keep is not None:
            after, scale = masks.select(keep, after, arriving), masks.zero_unless(keep, scale)
        return after, (here, scale, [part / total for part in parts])

    xs = (p.emission, varying, flags.keep, flags.reset)
    _, (here, scales, shares) = scan_from_fresh(lax.scan, step, p.start, xs, len(p.emission), False)
    here += jnp.broadcast_to(p.end, here.shape)
    log_z = logsumexp(here, -1)
    ends = jnp.exp(here - jnp.where(jnp.isneginf(log_z), 0, log_z)[..., None])
    total = masks.zero_unless(flags.last, log_z).sum(axis=0) + scales.sum(axis=0)
    return total, masks.zero_unless(flags.last, ends), shares


def _up(states, k):
    """What is in each state, as that of the state k above."""
    return jnp.pad(states, [(0, 0)] * (states.ndim - 1) + [(k, 0)], constant_values=-jnp.inf)[..., : states.shape[-1]]


def _down(states, k):
    return jnp.pad(states, [(0, 0)] * (states.ndim - 1) + [(0, k)])[..., k:]


def _finite(largest):
    return lax.stop_gradient(jnp.where(jnp.isneginf(largest), 0, largest))


def _derivative(primals, tangents):
    """The expected number of times that each potential is used, times its tangent."""
    (p, flags), (tangent, _) = primals, tangents
    total, ends, shares = _forward(p, flags)

    def back(after, inputs):
        ends, shares, keep, reset = inputs
        here = ends + sum(_down(after * share, k) for k, share in enumerate(shares))
        before, begun = here if keep is None else masks.select(keep, here, after), None
        if reset is not None:
            before, begun = masks.zero_unless(~reset, before), masks.zero_unless(reset, before)
        if keep is not None:
            here, after = masks.zero_unless(keep, (here, after))
        return before, (here, begun, after)

    xs = (ends, shares, flags.keep, flags.reset)
    first, (states, begun, after) = scan_from_fresh(lax.scan, back, jnp.zeros_like(p.start), xs, len(ends), True)
    change = jnp.zeros_like(total)
    if not isinstance(tangent.start, SymbolicZero):
        change += ((first if begun is None else first + begun.sum(axis=0)) * tangent.start).sum(axis=-1)
    if not isinstance(tangent.emission, SymbolicZero):
        change += (states * tangent.emission).sum(axis=(0, -1))
    if not isinstance(tangent.end, SymbolicZero):
        change += (ends.sum(axis=0) * tangent.end).sum(axis=-1)
    if not isinstance(tangent.weights, SymbolicZero):
        used = jnp.stack([after * share for share in shares], axis=-2)
        used = used if p.weights.ndim == used.ndim else used.sum(axis=0, keepdims=True)
        change += (used * tangent.weights).sum(axis=(0, -2, -1))
    return total, change


log_partition.defjvp(_derivative, symbolic_zeros=True)
