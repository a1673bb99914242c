"""What a user sees while a run trains: a bar with the metrics, and lines above it."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from jaxseq.training.errors import require


class Progress:
    """A progress bar on a terminal; elsewhere (a file, a pipe) only the lines that are said.

    Args:
        unit: what a step consumes, for the speed, such as "characters".
        per_step: how many of them.
    """

    def __init__(self, unit: str = "steps", per_step: int = 1) -> None:
        self._unit, self._per_step = unit, per_step
        self._console: Any = require("rich.console").Console(highlight=False)
        self._console.on_broken_pipe = _raise  # rich would exit with status 1
        self._bar: Any = None
        self._last = (0, 0.0)

    def say(self, message: str) -> None:
        """Prints a message above the bar, as it is."""
        self._console.print(message, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, step: int, steps: int) -> Iterator[None]:
        """Shows the bar, at `step` of `steps`."""
        rich = require("rich.progress")
        columns = (
            rich.BarColumn(bar_width=None),
            rich.TextColumn("{task.completed}/{task.total}"),
            rich.TextColumn("{task.fields[metrics]}"),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=self._console, disable=not self._console.is_terminal) as self._bar:
            self._bar.add_task("", total=steps, completed=step, metrics="compiling")
            self._last = (step, time.perf_counter())
            yield

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Moves the bar to `step` and shows the metrics and the speed since the last update."""
        (last, then), now = self._last, time.perf_counter()
        self._last = (step, now)
        speed = (step - last) * self._per_step / max(now - then, 1e-9)
        shown = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items()]
        self._bar.update(
            self._bar.task_ids[0], completed=step, metrics="  ".join([*shown, f"{speed:,.0f} {self._unit}/s"])
        )


def _raise() -> None:
    raise BrokenPipeError
