"""Checkpoints that are whole or not there: orbax writes the arrays, a manifest of checksums proves them.

A checkpoint is the folder `<step>` with the arrays in `arrays/`, what belongs to them in `extra.json`, and
`manifest.json`, which holds the size and SHA-256 of every other file. It is written under another name, flushed to the
disk and renamed as the last act, so that neither a killed process nor a full disk leaves a half one in place of a good
one; what the disk loses later, the checksums show.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     save(pathlib.Path(folder), 100, {"weights": np.arange(3)}, {"seconds": 1.5})
...     found = newest(pathlib.Path(folder))
...     restored = restore(found, {"weights": np.zeros(3, int)})
>>> found.step, found.extra, restored["weights"].tolist()
(100, {'seconds': 1.5}, [0, 1, 2])
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxseq.training.errors import UserError, disk_is_full, require
from jaxseq.training.forms import find_fault

_ARRAYS, _EXTRA, _MANIFEST, _PARTIAL = "arrays", "extra.json", "manifest.json", ".partial"


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole: its step, its folder, and the JSON values that were saved with it."""

    step: int
    path: pathlib.Path
    extra: dict[str, Any]


def save(folder: pathlib.Path, step: int, tree: Any, extra: dict[str, Any] | None = None, *, keep: int = 3) -> None:
    """Saves a tree of arrays as the checkpoint of a step, then removes all but the `keep` newest up to that step.

    Args:
        folder: holds the checkpoints of one run; made if it is not there.
        step: the name of the checkpoint; one of the same step is replaced.
        tree: arrays in containers that `restore` is given again.
        extra: values for JSON that belong to the arrays.
        keep: how many checkpoints stay, at least 1; those of later steps neither count nor go.

    Raises:
        UserError: if the disk is full. The earlier checkpoints are as they were, and nothing of the new one is left.
    """
    ocp = require("orbax.checkpoint")
    partial = folder.absolute() / f"{step:08d}{_PARTIAL}"
    arrays = jax.tree.map(np.asarray, tree)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _quiet_orbax(), contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
            checkpointer.save(partial / _ARRAYS, args=ocp.args.PyTreeSave(arrays))
        (partial / _EXTRA).write_text(json.dumps(extra or {}), encoding="utf-8")
        (partial / _MANIFEST).write_text(json.dumps(_digests(partial), indent=1), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        final = folder / f"{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not disk_is_full(error):
            raise
        raise UserError(f"no space left on the disk for the checkpoint of step {step} in {folder}") from error
    for old in [other for other in _steps(folder) if other <= step][:-keep]:
        shutil.rmtree(folder / f"{old:08d}")
    for left in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


def newest(
    folder: pathlib.Path, report: Callable[[str], None] = print, extra: dict[str, Any] | None = None
) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there are no checkpoints.

    `report` is told of each newer one that is not whole, and why. To be whole, its `extra` must have the form `extra`,
    see `forms.find_fault`.

    Raises:
        UserError: if there are checkpoints, and all of them are damaged.
    """
    damaged = []
    for step in reversed(_steps(folder)):
        path = folder / f"{step:08d}"
        damage = find_damage(path)
        if damage is None:
            found = json.loads((path / _EXTRA).read_text(encoding="utf-8"))
            fault = find_fault(found, extra or {}, "extra")
            if fault is None:
                for message in damaged:
                    report(f"{message}: using the one before it")
                return Checkpoint(step, path, found)
            damage = f"{_EXTRA} has no usable {fault}"
        damaged.append(f"the checkpoint of step {step} is damaged ({damage})")
    if damaged:
        raise UserError(
            f"all checkpoints of {folder.parent} are damaged ({len(damaged)} in {folder}): "
            "nothing was changed, start a new run"
        )
    return None


def remove_after(folder: pathlib.Path, step: int) -> None:
    """Removes the checkpoints of all steps after `step`, damaged or not."""
    for later in _steps(folder):
        if later > step:
            shutil.rmtree(folder / f"{later:08d}")


def find_damage(path: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, in a phrase; None if every file is as it was saved."""
    try:
        expected = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        found = _digests(path)
    except OSError as error:
        return f"cannot read {error.filename}: {error.strerror}"
    except ValueError:
        return f"{_MANIFEST} is not JSON"
    if not isinstance(expected, dict):
        return f"{_MANIFEST} is not an object of JSON"
    if _EXTRA not in expected or not any(name.startswith(f"{_ARRAYS}/") for name in expected):
        return f"{_MANIFEST} does not list {_EXTRA} and {_ARRAYS}/"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} is not what was written"
    return None


def restore(checkpoint: Checkpoint, like: Any) -> Any:
    """The tree of a checkpoint, as NumPy arrays.

    Args:
        checkpoint: from `newest`.
        like: a tree of the same structure, shapes and dtypes, abstract (`jax.eval_shape`) or not.

    Raises:
        UserError: (a ValueError) if the checkpoint holds a tree of another structure, or other shapes or dtypes.
    """
    ocp = require("orbax.checkpoint")
    options = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), like)
    arrays = checkpoint.path.absolute() / _ARRAYS
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
        held, needed = _leaves(checkpointer.metadata(arrays).item_metadata.tree), _leaves(like)
        for name in sorted(held.keys() | needed.keys()):
            if held.get(name) != needed.get(name):
                got, want = held.get(name, "nothing"), needed.get(name, "nothing")
                raise UserError(f"{checkpoint.path} is of another model: it holds {got} where {name} needs {want}")
        return checkpointer.restore(arrays, args=ocp.args.PyTreeRestore(item=like, restore_args=options))


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that it holds either what it held before or all of `content`.

    Raises:
        UserError: if the disk is full; the file is as it was.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        partial.write_bytes(content)
        _flush(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if not disk_is_full(error):
            raise
        raise UserError(f"no space left on the disk for {path}") from error


def _leaves(tree: Any) -> dict[str, str]:
    """The dtype and shape of each array, by its path; orbax names the fields of a tuple as those of a dict."""

    def name(key: Any) -> str:
        return str(next(getattr(key, kind) for kind in ("name", "key", "idx") if hasattr(key, kind)))

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(map(name, path)): f"{np.dtype(leaf.dtype).name} of shape {leaf.shape}" for path, leaf in leaves}


def _steps(folder: pathlib.Path) -> list[int]:
    names = (path.name for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
    return sorted(int(name) for name in names if name == f"{int(name):08d}")


def _digests(folder: pathlib.Path) -> dict[str, list[Any]]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / _MANIFEST)
    contents = {path: path.read_bytes() for path in paths}
    return {
        path.relative_to(folder).as_posix(): [len(content), hashlib.sha256(content).hexdigest()]
        for path, content in contents.items()
    }


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    # orbax logs the traceback of an error that it raises as well
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
