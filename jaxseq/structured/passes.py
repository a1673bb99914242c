"""The passes over a chain: sums over paths forward, in a loop or as a tree over time, and choices on the way back."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxseq.core import masks, sharding
from jaxseq.core.unroll import scan_from_fresh
from jaxseq.structured import banded, semirings
from jaxseq.structured.banded import Band
from jaxseq.structured.semirings import Semiring


class Parts(NamedTuple):
    """A chain that was checked: time first, one dtype, axes of a batch everywhere, and zeros where nothing is read."""

    start: Float[Array, "*batch state"]
    transition: Any  # [time?, *batch or ones, from, to], or a Band
    emission: Float[Array, "time *batch state"]
    end: Float[Array, "*batch state"]
    keep: Bool[Array, "time *batch"] | None
    reset: Bool[Array, "time *batch"] | None

    def split(self) -> tuple[Any, Any]:
        """The transitions that vary from step to step, and those that do not: one of them is None."""
        varying = jax.tree.leaves(self.transition)[0].ndim > self.emission.ndim
        return (self.transition, None) if varying else (None, self.transition)

    def flags(self) -> tuple[Bool[Array, "time *batch"], masks.Places]:
        """The mask, all True without one, and where in it documents begin and end."""
        keep = jnp.ones_like(self.emission[..., 0], bool) if self.keep is None else self.keep
        places = masks.places(keep.shape, self.keep, self.reset, axis=0)
        return keep, sharding.placed(places, jax.typeof(keep).sharding.spec)


@functools.partial(jax.jit, inline=True)
def parts_of(
    start: Array, transition: Any, emission: Array, end: Array, mask: Array | None, reset: Array | None
) -> Parts:
    """`Parts` of the potentials of a `Chain` and its flags, whose shapes and dtypes fit.

    What is not read (off the mask, out of the last step of a document, below state 0 of a band, in rows without steps)
    is replaced, so that a NaN there reaches neither value nor gradient.
    """
    *batch, _, states = emission.shape
    nothing = jnp.zeros_like(emission.sum(axis=-2))  # placed on devices as the rows are
    start, end = (jnp.broadcast_to(part, (*batch, states)) + nothing for part in (start, end))
    keep, reset = (None if flags is None else jnp.moveaxis(flags, -1, 0) for flags in (mask, reset))
    parts = Parts(start, transition, jnp.moveaxis(emission, -2, 0), end, keep, reset)
    every, places = parts.flags()
    moving = every & ~places.last

    def read(weights):
        if weights.ndim > emission.ndim:
            return masks.zero_unless(moving, jnp.moveaxis(weights, -3, 0))
        if weights.ndim == emission.ndim:  # those of a row
            return masks.zero_unless(moving.any(axis=0), weights)
        return jnp.expand_dims(weights, tuple(range(emission.ndim - weights.ndim)))

    transition = jax.tree.map(read, transition)
    if isinstance(transition, Band):
        inside = jnp.arange(states) >= jnp.arange(transition.weights.shape[-2])[:, None]
        inside = sharding.spread(inside, transition.weights)
        transition = Band(jnp.where(inside, transition.weights, -jnp.inf))
    start, end = masks.zero_unless(every.any(axis=0), (start, end))
    return parts._replace(
        start=start, transition=transition, emission=masks.zero_unless(every, parts.emission), end=end
    )


class Forward(NamedTuple):
    """The sums over paths that end in each state at each step, up to a factor a step; and over all whole paths."""

    states: Float[Array, "time ..."]
    total: Float[Array, "..."]


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(semiring: Semiring, parallel: bool, *parts: Any) -> Forward:
    """The sums over paths of `Parts`, in a loop, or as a tree."""
    p = Parts(*parts)
    last = p.flags()[1].last
    states, scale = (_tree if parallel and len(p.emission) else _loop)(semiring, p)

    def whole(states, last):  # the sum over the states of the last step of a document
        sums = semiring.sum(semiring.times(states, semiring.lift(p.end)), -1)
        return _select(semiring, last, sums, jnp.full_like(sums, semiring.one))

    product = semiring.product(jax.vmap(whole)(states, last), 0)
    empty = semiring.sum(semiring.lift(jnp.zeros_like(p.start[..., :1])), -1)
    product = _select(semiring, last.any(axis=0), product, empty)
    return Forward(states, semiring.times(product, semiring.lift(scale)) if semiring.scaled else product)


@jax.jit
def banded_log_partition(*parts: Any) -> Float[Array, "*batch"]:
    """The log-partition of `Parts` whose transition is a `Band`, in a loop."""
    p = Parts(*parts)
    potentials = banded.Potentials(p.start, p.transition.weights, p.emission, p.end)
    return banded.log_partition(potentials, banded.Flags(p.keep, p.reset, p.flags()[1].last))


def _select(semiring, flags, chosen, otherwise):
    """`masks.select` where elements may have an axis in front."""
    if semiring.ranks is None:
        return masks.select(flags, chosen, otherwise)
    return jax.vmap(masks.select, in_axes=(None, 0, 0))(flags, chosen, otherwise)


def _rescaled(semiring, elements, axes):
    """Elements divided by the largest along the last `axes`, and the log of what they were divided by, `[*batch]`."""
    first = elements if semiring.ranks is None else elements[0]
    last = tuple(range(-axes, 0))
    if not semiring.scaled:
        return elements, jnp.zeros_like(first.sum(axis=last))
    largest = lax.stop_gradient(first.max(axis=last))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    return semiring.times(elements, semiring.lift(jnp.expand_dims(-largest, last))), largest


def _padded(semiring, elements):
    """Elements with all the ranks of the semiring."""
    return semiring.sum(elements[..., None], -1)


def _loop(semiring: Semiring, p: Parts) -> tuple[Array, Array]:
    """Step by step; the carry is the sum over paths that arrive in each state, before its emission."""
    start = _padded(semiring, semiring.lift(p.start))
    varying, constant = p.split()

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(arriving, inputs):
        emission, transition, keep, reset = inputs
        if reset is not None:
            arriving = _select(semiring, reset, start, arriving)
        here, scale = _rescaled(semiring, semiring.times(arriving, semiring.lift(emission)), 1)
        moved = semiring.sum(_moved(semiring, here, transition if constant is None else constant), -2)
        if keep is not None:
            moved, scale = _select(semiring, keep, moved, arriving), masks.zero_unless(keep, scale)
        return moved, (here, scale)

    xs = (p.emission, varying, p.keep, p.reset)
    _, (states, scales) = scan_from_fresh(lax.scan, step, start, xs, len(p.emission), False)
    return states, scales.sum(axis=0)


def _tree(semiring: Semiring, p: Parts) -> tuple[Array, Array]:
    """As a tree of products of matrices; from a fresh start on, all rows of a product are what arrives from `start`."""
    start = _padded(semiring, semiring.lift(p.start))
    varying, constant = p.split()
    count = p.emission.shape[-1]
    last = p.flags()[1].last
    stay = jnp.where(jnp.eye(count, dtype=bool), 0.0, -jnp.inf).astype(p.emission.dtype)
    fresh = lax.broadcasted_iota(int, last.shape, 0) == 0
    if p.reset is not None:
        fresh |= p.reset

    def element(emission, transition, keep, fresh):
        transition = _dense(transition if constant is None else constant)
        lifted = semiring.times(semiring.lift(emission[..., :, None]), semiring.lift(transition))
        matrix = _padded(semiring, lifted)
        if keep is not None:
            held = _padded(semiring, semiring.lift(jnp.broadcast_to(stay, (*emission.shape, count))))
            matrix = _select(semiring, keep, matrix, held)
        begun = jnp.broadcast_to(semirings.matmul(semiring, start[..., None, :], matrix), matrix.shape)
        return _rescaled(semiring, _select(semiring, fresh, begun, matrix), 2)

    def combine(earlier, later):
        (a, scale_a, fresh_a), (b, scale_b, fresh_b) = earlier, later
        product, scale = _rescaled(semiring, semirings.matmul(semiring, a, b), 2)
        scale = scale_b + masks.zero_unless(~fresh_b, scale_a + scale)
        return _select(semiring, fresh_b, b, product), scale, fresh_a | fresh_b

    matrices, scales = jax.vmap(element)(p.emission, varying, p.keep, fresh)
    matrices, scales, _ = lax.associative_scan(jax.vmap(combine), (matrices, scales, fresh))

    def here(arriving, scale, fresh, emission):
        arriving = _select(semiring, fresh, start, arriving)
        states, rescale = _rescaled(semiring, semiring.times(arriving, semiring.lift(emission)), 1)
        return states, masks.zero_unless(~fresh, scale) + rescale

    def from_before(after):  # what stood after the step before; nothing reads what is before the first
        return jnp.concatenate([jnp.zeros_like(after[:1]), after[:-1]])

    states, scales = jax.vmap(here)(from_before(matrices[..., 0, :]), from_before(scales), fresh, p.emission)
    return states, masks.zero_unless(last, scales).sum(axis=0)


def _moved(semiring, states, transition):
    """The products of what is in each state with its transitions, `[..., from, to]` or `[..., moves, to]`."""
    if not isinstance(transition, Band):
        return semiring.times(states[..., :, None], semiring.lift(transition))
    unchanged = [(0, 0)] * (states.ndim - 1)
    moves, count = transition.weights.shape[-2:]
    shifted = [jnp.pad(states, [*unchanged, (k, 0)], constant_values=semiring.zero)[..., :count] for k in range(moves)]
    return semiring.times(jnp.stack(shifted, axis=-2), semiring.lift(transition.weights))


def _dense(transition):
    """Transitions as matrices."""
    if not isinstance(transition, Band):
        return transition
    *leading, moves, count = transition.weights.shape
    move = jnp.arange(count) - jnp.arange(count)[:, None]
    index = jnp.broadcast_to(jnp.clip(move, 0, moves - 1), (*leading, count, count))
    taken = jnp.take_along_axis(transition.weights, index, axis=-2)
    return jnp.where(jnp.broadcast_to((move >= 0) & (move < moves), taken.shape), taken, -jnp.inf)


def column(transition: Any, state: Array) -> Array:
    """The transitions from each state to one, `[..., from]`; states out of range are clipped."""
    weights = transition.weights if isinstance(transition, Band) else transition
    count = weights.shape[-1]
    state = jnp.clip(state, 0, count - 1)
    if weights.size == math.prod(weights.shape[-2:]):  # the same for all rows
        taken = sharding.rows(weights.reshape(weights.shape[-2:]).T, state)
    else:
        taken = jnp.take_along_axis(weights, state[..., None, None], axis=-1)[..., 0]
    if not isinstance(transition, Band):
        return taken
    move = state[..., None] - jnp.expand_dims(jnp.arange(count), tuple(range(state.ndim)))
    inside = (move >= 0) & (move < weights.shape[-2])
    return jnp.where(inside, jnp.take_along_axis(taken, jnp.clip(move, 0, weights.shape[-2] - 1), axis=-1), -jnp.inf)


@functools.partial(jax.jit, static_argnums=(0, 1))
def walk(pick: Callable[..., Array], parallel: bool, states: Array, keys: Any, rank: Any, *parts: Any) -> Array:
    """The states of a path, chosen from the last to the first: `pick(key, scores [*batch, ranks * S], rank)`.

    `states` `[time, ranks, *batch, S]` are those of `forward`; an index counts the states of all ranks.
    """
    p = Parts(*parts)
    keep, places = p.flags()
    varying, constant = p.split()
    count = p.emission.shape[-1]

    def back(after, inputs):
        here, transition, keep, last, key = inputs
        onward = column(transition if constant is None else constant, after % count)
        onward = masks.select(last, p.end, jnp.broadcast_to(onward, p.end.shape))
        scores = jnp.concatenate([scores + onward for scores in here], axis=-1)
        chosen = pick(key, scores, jnp.where(last, rank, after // count))
        return jnp.where(keep, chosen, after)

    inputs = (states, varying, keep, places.last, keys)
    nowhere = jnp.zeros_like(keep.any(axis=0), int)
    if not parallel or not len(p.emission):

        def step(after, inputs):
            after = back(after, inputs)
            return after, after

        _, chosen = scan_from_fresh(lax.scan, step, nowhere, inputs, len(p.emission), True)
    else:  # whereto each index leads, for all of them; then these maps are composed

        def maps(inputs):
            return jax.vmap(lambda index: back(nowhere + index, inputs))(jnp.arange(states.shape[1] * count))

        def compose(later, earlier):
            return jnp.take_along_axis(earlier, later, axis=1)

        chosen = lax.associative_scan(compose, jax.vmap(maps)(inputs), reverse=True)[:, 0]
    return jnp.moveaxis(jnp.where(keep, chosen % count, 0), 0, -1)
