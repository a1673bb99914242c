"""The command line, with a tiny model on a small text: what a user meets, and what may go wrong."""

import ast
import dataclasses
import errno
import inspect
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jaxseq import cli
from jaxseq.recipes import characters
from jaxseq.training import checkpoints, language, runs
from jaxseq.training.text import Vocabulary

STEPS = 40  # of a run with these flags on the text below
FLAGS = ["--embedding-size", "4", "--hidden-size", "8", "--batch", "2", "--time", "8", "--epochs", "4"]
FLAGS += ["--log-every", "2", "--save-every", "4", "--sample-characters", "20", "--learning-rate", "0.03"]
TEXT = ("The cat sat on the mat.\nThe rat sat too.\n" * 5)[:190]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def train(text: pathlib.Path, run: pathlib.Path, *flags: str) -> int:
    """The exit status of a training run."""
    return cli.main(["train", "characters", "--text", str(text), "--run", str(run), *FLAGS, *flags])


@pytest.fixture(scope="module")
def finished(text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that nothing interrupted; tests that change it copy it."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(text, run) == 0
    return run


def final_state(run: pathlib.Path) -> tuple[int, Any]:
    """The step and the arrays of the newest whole checkpoint."""
    opened = runs.open_run(run)
    config = characters.stored_config(opened)
    cell = characters.model(config, Vocabulary(opened.about["vocabulary"]).size)
    adam = characters.optimizer(config, 1)
    like = jax.eval_shape(lambda key: language.initial_state(cell, adam, key, config.batch), jax.random.key(0))
    found = checkpoints.newest(opened.checkpoints)
    assert found is not None
    return found.step, checkpoints.restore(found, like)


def log(run: pathlib.Path) -> list[dict[str, Any]]:
    """The log without the times."""
    return [{name: line[name] for name in line if "seconds" not in name} for line in runs.open_run(run).records()]


def assert_same_run(run: pathlib.Path, other: pathlib.Path) -> None:
    (step, state), (other_step, other_state) = final_state(run), final_state(other)
    assert step == other_step == STEPS
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes()
    assert log(run) == log(other)
    assert (run / "samples.txt").read_text() == (other / "samples.txt").read_text()


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("jaxseq: ") and error.count("\n") == 1 and error.endswith("\n"), error
    for word in words:
        assert word in error


def test_a_run_folder_holds_all_that_the_run_was(finished: pathlib.Path, text: pathlib.Path):
    assert sorted(os.listdir(finished)) == ["checkpoints", "config.json", "loss.png", "metrics.jsonl", "samples.txt"]
    assert sorted(os.listdir(finished / "checkpoints")) == ["00000032", "00000036", "00000040"]
    about = json.loads((finished / "config.json").read_text())
    assert about["config"]["text"] == str(text) and about["config"]["hidden_size"] == 8
    assert about["text"]["characters"] == len(TEXT) and len(about["text"]["sha256"]) == 64
    assert about["vocabulary"] == "".join(sorted(set(TEXT)))
    assert set(about["baseline_bits"]["validation"]) == {"unigram", "5-gram"}
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "samples.txt").read_text().count("--- step ") == STEPS // 4
    records = log(finished)
    assert [line["step"] for line in records if "loss" in line] == list(range(2, STEPS + 1, 2))
    assert [line["step"] for line in records if "validation_bits_per_character" in line] == list(range(4, STEPS + 1, 4))
    assert list(records[-1]) == ["step", "test_bits_per_character"]
    first, last = (
        line["bits_per_character"]
        for line in (records[0], [line for line in records if "bits_per_character" in line][-1])
    )
    assert last < first - 0.5


def test_sampling_continues_the_prompt(finished: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    written = []
    for seed in ("0", "0", "1"):
        command = ["sample", str(finished), "--prompt", "The cat", "--characters", "30", "--seed", seed]
        assert cli.main(command) == 0
        written.append(capsys.readouterr().out)
    assert all(len(text) == 38 and text.startswith("The cat") and text.endswith("\n") for text in written)
    assert set(written[0]) <= set(TEXT) and written[0] == written[1] != written[2]


def documented(config: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and its bases."""
    found = {}
    for base in config.__mro__[:-1]:
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(below.value)
    return found


@pytest.mark.parametrize("config", [characters.Config, cli.Sample])
def test_every_field_is_a_flag_with_help(config: type, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main([*(["sample"] if config is cli.Sample else ["train", "characters"]), "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    options = re.split("─+╮|-{9,}", shown, maxsplit=1)[1]
    texts = documented(config)
    for field in dataclasses.fields(config):
        flag = "PATH" if (config, field.name) == (cli.Sample, "run") else f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{flag} (\S+ )?{re.escape(texts[field.name])}", options), field.name


def test_python_m_jaxseq_is_the_command():
    done = subprocess.run([sys.executable, "-m", "jaxseq", "--help"], capture_output=True, text=True, check=True)
    assert "train" in done.stdout and "sample" in done.stdout


def test_unknown_commands_and_flags_exit_with_2(capsys: pytest.CaptureFixture[str]):
    for command in ([], ["train"], ["fly"], ["train", "characters", "--wings", "2"], ["sample"]):
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no file or folder"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\xff", "is not UTF-8 text"),
        (b"The\0cat", "is binary"),
        (b"The cat sat on the", "characters of training text do not fill one window: batch 2 x time 8 needs 17"),
    ],
)
def test_a_bad_text_is_one_line(tmp_path: pathlib.Path, capsys, content: bytes | None, words: str):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert train(path, tmp_path / "run") == 2
    assert_one_line(capsys, words)
    assert not (tmp_path / "run").exists()


def test_a_bad_number_is_one_line(text: pathlib.Path, tmp_path: pathlib.Path, capsys):
    assert train(text, tmp_path / "run", "--dropout", "1.5") == 2
    assert_one_line(capsys, "--dropout must be at least 0 and less than 1, got 1.5")
    assert not (tmp_path / "run").exists()


def test_more_steps_than_can_be_counted_are_one_line(text: pathlib.Path, tmp_path: pathlib.Path, capsys):
    assert train(text, tmp_path / "run", "--epochs", "214748365") == 2  # of 10 steps each
    assert_one_line(capsys, "--epochs must be at most 214,748,364 for less than 2**31 steps with this text")
    assert cli.main(["sample", "run", "--characters", "10000001"]) == 2
    assert_one_line(capsys, "--characters must be at least 1 and at most 10,000,000, got 10000001")
    assert not (tmp_path / "run").exists()


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_existing_run_folder_is_left_alone(text: pathlib.Path, finished: pathlib.Path, capsys):
    before = snapshot(finished)
    assert train(text, finished) == 2
    assert_one_line(capsys, f"already holds a run: continue it with --resume {finished}")
    assert snapshot(finished) == before


def test_going_on_with_what_is_no_run_is_one_line(tmp_path: pathlib.Path, capsys):
    for path in (tmp_path, tmp_path / "none"):
        assert cli.main(["train", "characters", "--resume", str(path)]) == 2
        assert_one_line(capsys, "is not a run folder")
        assert cli.main(["sample", str(path)]) == 2
        assert_one_line(capsys, "is not a run folder")
    runs.create(tmp_path / "other", {"recipe": "chorales"})
    assert cli.main(["train", "characters", "--resume", str(tmp_path / "other")]) == 2
    assert_one_line(capsys, "is not a run of the recipe characters")
    runs.create(tmp_path / "older", {"recipe": "characters", "config": {"text": None, "size": 8}})
    assert cli.main(["sample", str(tmp_path / "older")]) == 2
    assert_one_line(capsys, "is a run of another version of jaxseq: its flags were text, size")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: {"recipe": "characters"}, "has no usable config"),
        (lambda about: about.pop("vocabulary"), "has no usable vocabulary"),
        (lambda about: about.update(opening=3), "has no usable opening"),
        (lambda about: about["text"].pop("sha256"), "has no usable text.sha256"),
        (lambda about: about["text"].update(characters="x"), "has no usable text.characters"),
        (lambda about: about["text"].update(skipped_files=5), "has no usable text.skipped_files"),
        (lambda about: about.update(baseline_bits={"validation": 3}), "has no usable baseline_bits.validation"),
        (lambda about: about["baseline_bits"].pop("validation"), "has no usable baseline_bits.validation"),
        (lambda about: about.update(vocabulary=about["vocabulary"][::-1]), "needs a vocabulary in order"),
        (lambda about: about.update(vocabulary=about["vocabulary"][0] + about["vocabulary"]), "each character once"),
        (lambda about: about.update(opening="ä"), "and an opening out of it"),
        (lambda about: about["config"].update(batch="2"), "has no usable config.batch"),
        (lambda about: about["config"].update(learning_rate=10**400), "has no usable config.learning_rate"),
        (lambda about: about["config"].update(layers=0), "--layers must be at least 1 and less than 2**31, got 0"),
        (lambda about: about["config"].update(epochs=10**12), "--epochs must be at least 1 and less than 2**31, got"),
        (
            lambda about: about["config"].update(hidden_size=9),
            "is of another model: it holds float32 of shape (2, 8) where",
        ),
    ],
)
def test_a_config_changed_by_hand_is_one_line(finished: pathlib.Path, tmp_path: pathlib.Path, capsys, change, words):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    about = json.loads((run / "config.json").read_text())
    changed = change(about)
    (run / "config.json").write_text(json.dumps(changed if words == "has no usable config" else about))
    before = snapshot(run)
    for command in (["train", "characters", "--resume", str(run)], ["sample", str(run), "--prompt", "The"]):
        capsys.readouterr()
        assert cli.main(command) == 2
        assert_one_line(capsys, words)
    assert snapshot(run) == before


def test_damaged_checkpoints_alone_are_one_line(finished: pathlib.Path, tmp_path: pathlib.Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").write_text("null")
    before = snapshot(run)
    for command in (["train", "characters", "--resume", str(run)], ["sample", str(run), "--prompt", "The"]):
        assert cli.main(command) == 2
        assert_one_line(capsys, f"all checkpoints of {run} are damaged", "nothing was changed, start a new run")
    assert snapshot(run) == before


def test_a_log_changed_by_hand_is_one_line(finished: pathlib.Path, tmp_path: pathlib.Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b"{", b"(", 1))
    assert cli.main(["train", "characters", "--resume", str(run)]) == 2
    assert_one_line(capsys, f"line 1 of {log} is not a record in JSON")
    log.unlink()
    assert cli.main(["train", "characters", "--resume", str(run)]) == 2
    assert_one_line(capsys, f"{log} is gone or has lost lines")


@pytest.mark.parametrize("command", [["train", "characters"], ["sample", "run"]])
def test_a_seed_that_is_none_is_one_line(command: list[str], capsys):
    assert cli.main([*command, "--seed", "99999999999999999999999"]) == 2
    assert_one_line(capsys, "--seed must be at least 0 and less than 2**32, got 99999999999999999999999")


def test_output_that_its_reader_does_not_take(finished: pathlib.Path):
    command = [sys.executable, "-m", "jaxseq", "sample", str(finished), "--prompt", "The", "--characters", "5"]
    reading, writing = os.pipe()
    os.close(reading)
    for arguments in (command, [*command[:3], "--help"]):
        done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (141, "")
    os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_output_that_has_no_room_is_one_line(finished: pathlib.Path):
    command = [sys.executable, "-m", "jaxseq", "sample", str(finished), "--prompt", "The", "--characters", "5"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("jaxseq: ") and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_training_ends_when_its_reader_has_gone(text: pathlib.Path, tmp_path: pathlib.Path):
    process = start("--text", str(text), "--run", str(tmp_path / "run"), *FLAGS)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 141


def test_characters_that_the_output_cannot_show_are_escaped(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(characters, "sample", lambda path, sampling: "naïve\n日")
    assert cli.main(["sample", "run"]) == 0
    assert raw.getvalue().split() == [rb"na\xefve", rb"\u65e5"]


def test_going_on_takes_the_flags_of_the_run_only(finished: pathlib.Path, text: pathlib.Path, capsys, monkeypatch):
    resume = ["train", "characters", "--resume", str(finished)]
    assert cli.main([*resume, "--hidden-size", "9", "--epochs", "4", "--run", "elsewhere"]) == 2
    changed = f"--run elsewhere (it began with {finished}), --hidden-size 9 (it began with 8)"
    assert_one_line(capsys, f"--resume continues {finished} as it began: leave out {changed}\n")
    before = log(finished), final_state(finished)
    monkeypatch.chdir(text.parent)
    assert cli.main([*resume, "--text", text.name, *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "this run is finished" in said and "continuing" not in said and "bits per character, " in said
    assert jax.tree.all(jax.tree.map(np.array_equal, (log(finished), final_state(finished)), before))


def test_going_on_with_another_text_is_one_line(finished: pathlib.Path, tmp_path: pathlib.Path, capsys):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    shutil.copytree(finished, run)
    text.write_text(TEXT.replace("rat", "bat"))
    about = json.loads((run / "config.json").read_text())
    about["config"]["text"] = str(text)
    (run / "config.json").write_text(json.dumps(about))
    before = snapshot(run)
    assert cli.main(["train", "characters", "--resume", str(run)]) == 2
    assert_one_line(capsys, "is no longer the text that", "began with")
    assert snapshot(run) == before


def test_sampling_without_a_prompt_says_what_it_goes_on_from(finished: pathlib.Path, capsys):
    capsys.readouterr()
    assert cli.main(["sample", str(finished), "--characters", "30"]) == 0
    said, opening = capsys.readouterr(), json.loads((finished / "config.json").read_text())["opening"]
    assert said.err == f"the text goes on from the validation part, after {opening!r}\n"
    assert len(said.out) == 31 and not said.out.startswith(opening)


def test_line_ends_of_a_prompt_are_those_of_a_text(finished: pathlib.Path, capsys):
    capsys.readouterr()
    assert cli.main(["sample", str(finished), "--prompt", "mat.\r\nThe\r", "--characters", "5"]) == 0
    assert capsys.readouterr().out.startswith("mat.\nThe\n")


def test_a_prompt_of_unknown_characters_is_one_line(finished: pathlib.Path, capsys):
    assert cli.main(["sample", str(finished), "--prompt", "The cät?"]) == 2
    assert_one_line(capsys, "the prompt has characters that the run's training text does not have: '?ä'")
    assert cli.main(["sample", str(finished), "--top-p", "7"]) == 2
    assert_one_line(capsys, "--top-p must be more than 0 and at most 1, got 7")


def test_sampling_uses_the_checkpoint_before_a_damaged_one(finished: pathlib.Path, tmp_path: pathlib.Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in (run / "checkpoints" / "00000040" / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["sample", str(run), "--characters", "5"]) == 0
    assert "the checkpoint of step 40 is damaged" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert cli.main(["sample", str(run)]) == 2
    assert_one_line(capsys, f"has no checkpoint yet: continue it with jaxseq train characters --resume {run}")


@pytest.mark.parametrize("command", [["train", "characters"], ["sample", "run"]])
def test_a_signal_before_training_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys, command: list[str]):
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(cli, "_run", lambda arguments: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main(command) == 130
    assert ends == [130] and capsys.readouterr().err == "stopping\n"


def test_a_missing_extra_is_one_line(capsys, monkeypatch: pytest.MonkeyPatch):
    for package in ("tyro", "orbax.checkpoint", "rich.progress", "matplotlib.figure"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert cli.main(["train", "characters"]) == 2
        assert_one_line(capsys, "is not installed", 'pip install "jaxseq[train]"')


def go_back(run: pathlib.Path, step: int) -> None:
    """Takes away the checkpoints after a step."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def test_a_full_disk_loses_nothing(finished: pathlib.Path, tmp_path: pathlib.Path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    go_back(run, 32)
    flush = checkpoints._flush

    def full(path: pathlib.Path) -> None:
        if "00000040" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_flush", full)
        assert cli.main(["train", "characters", "--resume", str(run)]) == 2
    assert_one_line(capsys, "no space left on the disk for the checkpoint of step 40")
    assert sorted(os.listdir(run / "checkpoints")) == ["00000032", "00000036"]
    assert cli.main(["train", "characters", "--resume", str(run)]) == 0
    assert_same_run(run, finished)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system with room for the run and little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_goes_on_when_a_full_disk_has_room_again(finished: pathlib.Path, small_disk: pathlib.Path, capfd):
    run = small_disk / "run"
    shutil.copytree(finished, run)
    go_back(run, 32)
    with (small_disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        for _ in range(100):
            ballast.write(bytes(8192))
    assert cli.main(["train", "characters", "--resume", str(run)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("jaxseq: no space left on the disk for ") and error.count("\n") == 1
    assert final_state(run)[0] == 32
    (small_disk / "ballast").unlink()
    assert cli.main(["train", "characters", "--resume", str(run)]) == 0
    assert_same_run(run, finished)


def start(*arguments: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "jaxseq", "train", "characters", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits, two minutes at most, for something that a running process does."""
    for _ in range(12_000):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"nothing happened: {process.communicate()[0]}")


@pytest.mark.slow
def test_a_killed_and_an_interrupted_run_end_as_one_that_was_not(
    finished: pathlib.Path, text: pathlib.Path, tmp_path: pathlib.Path
):
    run = tmp_path / "run"

    def steps() -> list[int]:
        folder = run / "checkpoints"
        return [int(name) for name in os.listdir(folder) if name.isdecimal()] if folder.exists() else []

    process = start("--text", str(text), "--run", str(run), *FLAGS)
    wait_until(process, lambda: bool(steps()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = max(steps())
    assert process.returncode == -signal.SIGKILL and killed_at < STEPS

    process = start("--resume", str(run))
    wait_until(process, lambda: max(steps()) > killed_at)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130 and f"continuing after step {killed_at} of {STEPS}" in said
    assert "stopping after this step and saving (Ctrl-C again to stop at once)\n" in said
    assert re.search(rf"stopped and saved after step \d+: continue with jaxseq train characters --resume {run}\n", said)
    assert killed_at < max(steps()) < STEPS

    assert cli.main(["train", "characters", "--resume", str(run)]) == 0
    assert_same_run(run, finished)
