"""The training loop: a pure step, run many times in one program, with logs, checkpoints and a clean stop.

The state of training is one tree of arrays; what a step draws at random comes from its seed and number. So a run that
goes on from a checkpoint is the same run, bit for bit.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxseq.training.errors import UserError
from jaxseq.training.progress import Progress
from jaxseq.training.runs import Run
from jaxseq.training.signals import Stopped, noted

StepFunction = Callable[[Any, jax.Array, Any], tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many steps to train for, and after how many to log, to save, and how many checkpoints to keep.

    Raises:
        ValueError: if `steps` is less than 0, or another number less than 1.
    """

    steps: int
    log_every: int
    save_every: int
    keep: int = 3

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("log_every", 1), ("save_every", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of a plan must be at least {least}, got {getattr(self, name)}")

    def stops(self, start: int) -> Iterator[int]:
        """The steps after `start` at which something is due, the last step included.

        >>> list(Plan(steps=10, log_every=4, save_every=6).stops(4))
        [6, 8, 10]
        """
        step = start
        while step < self.steps:
            step = min((step // every + 1) * every for every in (self.log_every, self.save_every))
            yield min(step, self.steps)


def fit(
    train_step: StepFunction,
    state: Any,
    data: Any,
    *,
    plan: Plan,
    run: Run,
    before_save: Callable[[int, Any], None] = lambda step, state: None,
    progress: Progress | None = None,
) -> Any:
    """Trains to the end of the plan, from the run's newest whole checkpoint if it has one; returns the final state.

    Args:
        train_step: `(state, step, data) -> (state, metrics)`, pure; metrics are scalars by name.
        state: the state before the first step, any tree of arrays.
        data: any tree of arrays, the same for each step.
        plan: the number of steps and what is due when.
        run: its log gets the means of the metrics since the line before, with the step and the time since the run
            began: `seconds` on the wall and `cpu_seconds` of the process.
        before_save: called with the number of steps done and the state when a checkpoint is due, to evaluate it.
        progress: shows the metrics and messages.

    Raises:
        Stopped: after SIGINT (Ctrl-C) or SIGTERM, once the steps under way are done and the state is saved.
        UserError: if a metric is no longer finite, or the disk is full; the checkpoints before that are whole.

    >>> import pathlib, tempfile
    >>> from jaxseq.training import runs
    >>> def halve(weight, step, data):
    ...     return weight - 0.5 * (weight - data), {"loss": (weight - data) ** 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = runs.create(pathlib.Path(folder), {})
    ...     weight = fit(halve, jnp.float32(8), jnp.float32(0), plan=Plan(steps=3, log_every=1, save_every=3), run=run)
    ...     losses = [record["loss"] for record in run.records()]
    >>> weight.item(), losses
    (1.0, [64.0, 16.0, 4.0])
    """
    progress = progress or Progress()
    step, extra = 0, {}
    resumed = run.resume(state, progress.say)
    if resumed is not None:
        step, state, extra = resumed
        done = step >= plan.steps
        progress.say("this run is finished" if done else f"continuing after step {step} of {plan.steps}")
    wall, cpu = time.perf_counter() - extra.get("seconds", 0), time.process_time() - extra.get("cpu_seconds", 0)
    state = jax.tree.map(jnp.array, state)  # a copy: _advance writes over what it is given
    with noted() as signals, progress.bar(step, plan.steps):
        for stop in plan.stops(step):
            state, metrics = _advance(train_step, state, step, stop - step, data)
            signals.saves = True  # while the first steps are compiled, there is nothing to save
            values = {name: float(value) for name, value in metrics.items()}
            step, clock = stop, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            for name, value in values.items():
                if not math.isfinite(value):
                    raise UserError(f"{name} is {value} after step {step}: lower the learning rate and start again")
            run.record({"step": step, **values, **clock})
            progress.update(step, values)
            due = step % plan.save_every == 0 or step == plan.steps
            if due:
                before_save(step, state)
            if due or signals.received:
                run.save(step, state, clock, keep=plan.keep)
            if signals.received:
                raise Stopped(step, signals.received)
    return state


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _advance(
    train_step: StepFunction, state: Any, start: Any, count: Any, data: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """`count` steps from step `start` on in one program, and the means of their metrics."""

    def body(index: Any, carry: Any) -> Any:
        state, total = carry
        state, metrics = train_step(state, start + index, data)
        return state, jax.tree.map(jnp.add, total, metrics)

    shapes = jax.eval_shape(train_step, state, start, data)[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state, total = jax.lax.fori_loop(0, count, body, (state, zeros))
    return state, jax.tree.map(lambda leaf: leaf / count, total)
