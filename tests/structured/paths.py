"""Chains, and all their paths one by one in NumPy: what every dynamic program is compared with."""

import itertools
import math

import hypothesis
import jax
import numpy as np
from hypothesis import strategies

from jaxseq.structured.chains import Band, Chain

TIME, STATES = 4, 3
FORMS = ("constant", "rows", "varying", "band", "varying band")


def random_chain(seed, form="constant", batch=(2,), time=TIME, states=STATES, impossible=0.3):
    """A chain with normal potentials, some of which are -inf."""
    generator = np.random.default_rng(seed)

    def potentials(*shape):
        return np.where(generator.uniform(size=shape) < impossible, -np.inf, generator.normal(size=shape))

    leading = {"rows": batch, "varying": (*batch, time), "varying band": (*batch, time)}.get(form, ())
    transition = potentials(*leading, 2 if "band" in form else states, states)
    return Chain(
        potentials(states),
        Band(transition) if "band" in form else transition,
        potentials(*batch, time, states),
        potentials(*batch, states),
    )


def flags(time=TIME, batch=(2,)):
    """Random masks or resets for hypothesis."""
    size = math.prod(batch) * time
    return strategies.lists(strategies.booleans(), min_size=size, max_size=size).map(
        lambda values: np.array(values, bool).reshape(*batch, time)
    )


def lengths(time=TIME, batch=2):
    """Random masks of right-padded rows, also of 0 steps and of 1."""
    count = strategies.lists(strategies.integers(0, time), min_size=batch, max_size=batch)
    return count.map(lambda values: np.arange(time) < np.array(values)[:, None])


def poisoned(chain, mask, reset):
    """The chain with NaN in all places that are not read."""
    start, transition, emission, end = jax.tree.map(np.copy, chain)
    weights = transition.weights if isinstance(transition, Band) else transition
    *batch, time, _ = emission.shape
    emission[~mask] = np.nan
    for index in np.ndindex(*batch):
        docs = documents(mask[index], reset[index])
        moving = [step for steps in docs for step in steps[:-1]]
        unread = [step for step in range(time) if step not in moving]
        if weights.ndim > emission.ndim:
            weights[index][unread] = np.nan
        elif weights.ndim == emission.ndim and not moving:
            weights[index] = np.nan
        for part in (start, end):
            if part.ndim == emission.ndim - 1 and not docs:
                part[index] = np.nan
    if isinstance(transition, Band):
        for moves in range(weights.shape[-2]):
            weights[..., moves, :moves] = np.nan
    return Chain(start, transition, emission, end)


def check(*strategies):
    """A hypothesis test of few examples, the same ones each time, without a limit in time; the first failure counts."""
    phases = [hypothesis.Phase.generate]
    settings = hypothesis.settings(deadline=None, derandomize=True, max_examples=12, phases=phases)
    return lambda test: settings(hypothesis.given(*strategies)(test))


def row(chain, index):
    """The potentials of one row: start, transitions `[time, state, state]`, emission, end."""
    start, transition, emission, end = chain
    emission, states = emission[index], emission.shape[-1]
    banded = isinstance(transition, Band)
    weights = transition.weights if banded else transition
    if weights.ndim > 2:
        weights = weights[index]
    weights = np.broadcast_to(weights, (len(emission), *weights.shape[-2:]))
    if banded:
        dense = np.full((len(emission), states, states), -np.inf)
        for move, to in itertools.product(range(weights.shape[-2]), range(states)):
            if to >= move:
                dense[:, to - move, to] = weights[:, move, to]
        weights = dense
    start, end = (part[index] if part.ndim > 1 else part for part in (start, end))
    return start, weights, emission, end


def documents(mask, reset):
    """The unmasked steps of each document of one row."""
    found = [[]]
    for step, (keep, begins) in enumerate(zip(mask, reset, strict=True)):
        if begins:
            found.append([])
        if keep:
            found[-1].append(step)
    return [steps for steps in found if steps]


def all_paths(potentials, steps):
    """Every path over the steps of one document, and its score."""
    start, transition, emission, end = potentials
    for states in itertools.product(range(emission.shape[-1]), repeat=len(steps)):
        score = start[states[0]] + end[states[-1]] + sum(emission[t, z] for t, z in zip(steps, states, strict=True))
        score += sum(transition[t, i, j] for t, i, j in zip(steps[:-1], states[:-1], states[1:], strict=True))
        yield states, score
