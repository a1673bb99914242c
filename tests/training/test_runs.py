import errno
import os
import pathlib

import pytest

from jaxseq.training import runs
from jaxseq.training.errors import UserError


def test_a_run_folder_is_new(tmp_path: pathlib.Path):
    run = runs.create(tmp_path / "a" / "run", {"seed": 1, "name": "naïve"})
    assert runs.open_run(run.path) == run
    with pytest.raises(UserError, match=r"already holds a run: continue it with --resume .*run, or give another --run"):
        runs.create(run.path, {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="already exists and is not an empty folder"):
            runs.create(tmp_path / name, {})
    with pytest.raises(UserError, match="cannot make the run folder .*: Not a directory"):
        runs.create(tmp_path / "file" / "run", {})
    (tmp_path / "empty").mkdir()
    runs.create(tmp_path / "empty", {})


@pytest.mark.parametrize("content", [None, "not JSON", "[1, 2]", b"\xff", '{"a":' * 100_000])
def test_what_is_not_a_run_is_refused(tmp_path: pathlib.Path, content: str | bytes | None):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"is not a run folder: it has no readable config\.json"):
        runs.open_run(tmp_path)


def test_new_runs_are_numbered(tmp_path: pathlib.Path):
    assert runs.next_free(tmp_path, "characters") == tmp_path / "characters-1"
    (tmp_path / "characters-1").mkdir()
    assert runs.next_free(tmp_path, "characters") == tmp_path / "characters-2"


def test_records_are_json_that_any_reader_takes(tmp_path: pathlib.Path):
    run = runs.create(tmp_path / "run", {})
    assert run.records() == []
    run.record({"step": 1, "loss": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.record({"loss": float("nan")})
    assert run.records() == [{"step": 1, "loss": 0.5}]


def test_a_full_disk_is_said_in_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    run = runs.create(tmp_path / "run", {})

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(UserError, match=r"^no space left on the disk for .*metrics\.jsonl$"):
        run.record({"step": 1})
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"^no space left on the disk for .*config\.json$"):
        runs.create(tmp_path / "other", {})
    assert os.listdir(tmp_path / "other") == []
