"""The folder of one training run: what it is, its log as JSON lines, its samples and its checkpoints."""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from jaxseq.training import checkpoints
from jaxseq.training.errors import UserError, disk_is_full
from jaxseq.training.forms import find_fault

_ABOUT, _METRICS, _SAMPLES = "config.json", "metrics.jsonl", "samples.txt"
_SAVED = {"logs": {_METRICS: int, _SAMPLES: int}}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder; `create` and `open_run` make one. A checkpoint remembers how long the logs were when it was saved.

    So a run that goes on from a checkpoint first cuts its logs back to it, and no line stands in them twice.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = create(pathlib.Path(folder) / "run", {"seed": 0})
    ...     run.record({"step": 10, "loss": 2.5})
    ...     open_run(run.path).about, run.records()
    ({'seed': 0}, [{'step': 10, 'loss': 2.5}])
    """

    path: pathlib.Path
    about: dict[str, Any]

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def check(self, form: Any) -> None:
        """Raises UserError, naming what is wrong, if `about` has not this form; see `forms.find_fault`."""
        fault = find_fault(self.about, form)
        if fault is not None:
            raise UserError(f"{_ABOUT} of {self.path} has no usable {fault}")

    def record(self, values: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`; UserError if the disk is full."""
        _append(self.path / _METRICS, json.dumps(values, allow_nan=False) + "\n")

    def write_sample(self, sample: str) -> None:
        """Adds a text to `samples.txt`; UserError if the disk is full."""
        _append(self.path / _SAMPLES, sample)

    def records(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, without a last one that is not whole; UserError if another one is garbled."""
        path = self.path / _METRICS
        return _parse(path, path.read_bytes() if path.exists() else b"")

    def save(self, step: int, state: Any, extra: dict[str, Any], *, keep: int = 3) -> None:
        """Saves `state` as the checkpoint of a step; see `checkpoints.save`."""
        logs = {name: _length(self.path / name) for name in (_METRICS, _SAMPLES)}
        checkpoints.save(self.checkpoints, step, state, {"logs": logs, **extra}, keep=keep)

    def resume(self, like: Any, report: Callable[[str], None] = print) -> tuple[int, Any, dict[str, Any]] | None:
        """Goes back to the newest whole checkpoint: its step, its state and its `extra`; None if there is none yet.

        Later checkpoints and what the logs say of later steps are removed, as they will be written again.

        Raises:
            UserError: if all checkpoints are damaged, or the newest whole one holds the state of another model, or
                `metrics.jsonl` is not what it was up to there. Nothing is changed then.
        """
        checkpoint = checkpoints.newest(self.checkpoints, report, _SAVED)
        if checkpoint is None:
            self._cut({})
            return None
        state, logs = checkpoints.restore(checkpoint, like), checkpoint.extra["logs"]
        path = self.path / _METRICS
        if _length(path) < logs[_METRICS]:
            raise UserError(f"{path} is gone or has lost lines: it cannot go on from step {checkpoint.step}")
        if logs[_METRICS]:
            with path.open("rb") as file:
                _parse(path, file.read(logs[_METRICS]))
        self._cut(logs)
        checkpoints.remove_after(self.checkpoints, checkpoint.step)
        return checkpoint.step, state, checkpoint.extra

    def _cut(self, logs: dict[str, int]) -> None:
        for name in (_METRICS, _SAMPLES):
            path = self.path / name
            if path.exists():
                os.truncate(path, min(logs.get(name, 0), _length(path)))


def create(path: pathlib.Path, about: dict[str, Any]) -> Run:
    """A new run folder that keeps `about`, values for JSON, in `config.json`.

    Raises:
        UserError: if the folder exists and is not empty, cannot be made, or the disk is full.
    """
    if (path / _ABOUT).exists():
        raise UserError(f"{path} already holds a run: continue it with --resume {path}, or give another --run")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists and is not an empty folder: give another --run")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {path}: {error.strerror}") from error
    checkpoints.write_whole(path / _ABOUT, (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
    return Run(path, about)


def open_run(path: pathlib.Path) -> Run:
    """The run in a folder.

    Raises:
        UserError: if the folder does not hold a run.
    """
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise UserError(f"{path} is not a run folder: it has no readable {_ABOUT}")
    return Run(path, about)


def next_free(parent: pathlib.Path, name: str) -> pathlib.Path:
    """The first of `parent/name-1`, `parent/name-2` and so on that does not exist."""
    candidates = (parent / f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in candidates if not path.exists())


def _parse(path: pathlib.Path, content: bytes) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"line {number} of {path} is not a record in JSON: mend or remove it")
        records.append(record)
    return records


def _append(path: pathlib.Path, content: str) -> None:
    try:
        with path.open("ab") as file:
            file.write(content.encode("utf-8", "replace"))
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise UserError(f"no space left on the disk for {path}") from error


def _length(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0
