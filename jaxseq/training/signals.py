"""Ending cleanly on SIGINT (Ctrl-C) and SIGTERM.

Python raises KeyboardInterrupt wherever it happens to be, and where that is a callback of XLA's compiler, the process
ends with a segmentation fault. So the handlers here only note the signal. A thread says what follows: it also runs
while the main one waits for XLA.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(Exception):
    """A run was asked to stop by a signal; it has saved its state after `step` steps."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped and saved after step {step}")
        self.step = step
        self.signum = signum


class Signals:
    """Notes the first SIGINT or SIGTERM in `received` while it is entered.

    A second one stops at once. Handlers that stood before come back at the end.

    Args:
        exits: whether the process is its own to end, as a command line's is. A second signal then ends it, with
            status 128 + the signal's number, and so does the first unless something `saves`. Without it, a second
            signal acts as it would have without this, and the first one is only noted.
    """

    received = 0
    saves = False

    def __init__(self, *, exits: bool = False) -> None:
        self._exits = exits
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
            return self
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._watch = threading.Thread(target=self._react, args=(reading,), daemon=True)
        self._watch.start()
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            self._restore()
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writing)
            self._watch.join()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        if not self._exits:
            self._restore()

    def _react(self, reading: int) -> None:
        first = True
        with open(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in self._before:  # of a handler that is not ours
                    continue
                stays = self.saves or not self._exits
                if first:
                    _say("stopping after this step and saving (Ctrl-C again to stop at once)" if stays else "stopping")
                if self._exits and not (first and stays):
                    _show_cursor()
                    os._exit(128 + number[0])
                first = False


@contextlib.contextmanager
def noted() -> Iterator[Signals]:
    """The signals inside the block, which has to look at `received`; those of the command line if it runs the block."""
    handler = signal.getsignal(signal.SIGINT)
    outer = getattr(handler, "__self__", None)
    if not isinstance(outer, Signals):
        with Signals() as signals:
            yield signals
        return
    try:
        yield outer
    finally:
        outer.saves = False


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is closed, or its reader has gone
        print(message, file=sys.stderr, flush=True)


def _show_cursor() -> None:
    terminal = sys.__stderr__
    with contextlib.suppress(OSError, ValueError):
        if terminal is not None and terminal.isatty():  # a progress bar hides the cursor
            print("\x1b[?25h", end="", file=terminal, flush=True)
