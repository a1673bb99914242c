import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.training import checkpoints, loop, runs
from jaxseq.training.errors import UserError
from jaxseq.training.signals import Signals

PLAN = loop.Plan(steps=10, log_every=2, save_every=3, keep=2)


@pytest.mark.parametrize(("name", "least"), [("steps", 0), ("log_every", 1), ("save_every", 1), ("keep", 1)])
def test_a_plan_that_makes_no_sense_is_refused(name: str, least: int):
    numbers = {"steps": 1, "log_every": 1, "save_every": 1}
    loop.Plan(**{**numbers, name: least})
    with pytest.raises(ValueError, match=f"{name} of a plan must be at least {least}, got {least - 1}"):
        loop.Plan(**{**numbers, name: least - 1})


def noisy_step(state: Any, step: Any, data: Any) -> Any:
    """A step with a state of its own, data, and noise from the number of the step."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (3,))
    weights = state["weights"] - 0.1 * (state["weights"] - data[step % len(data)] + 0.1 * noise)
    return {"weights": weights, "seen": state["seen"] + 1}, {"loss": jnp.sum(weights**2)}


def start() -> Any:
    return {"weights": jnp.zeros(3), "seen": jnp.int32(0)}


def train(
    path: pathlib.Path, before_save: Callable[[int, Any], None] = lambda step, state: None, **options: Any
) -> Any:
    """Trains in a run folder, which is made or opened."""
    run = runs.open_run(path) if path.exists() else runs.create(path, {})
    step = options.pop("step", noisy_step)
    return loop.fit(step, start(), jnp.arange(4.0), plan=PLAN, run=run, before_save=before_save, **options)


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The log without the times, which differ from run to run."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: record[name] for name in record if "seconds" not in name} for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    """A run that nothing interrupted: its folder and its final state."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, train(path)


def test_many_steps_in_one_program_are_the_steps_one_by_one(whole: tuple[pathlib.Path, Any]):
    state, losses = start(), []
    for step in range(PLAN.steps):
        state, metrics = noisy_step(state, step, jnp.arange(4.0))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(whole[1]["weights"], state["weights"], rtol=1e-5)
    assert whole[1]["seen"] == PLAN.steps
    logged = {line["step"]: line["loss"] for line in lines(whole[0])}
    assert list(logged) == [2, 3, 4, 6, 8, 9, 10]
    np.testing.assert_allclose(logged[2], np.mean(losses[:2]), rtol=1e-5)
    np.testing.assert_allclose(logged[9], losses[8], rtol=1e-5)


def test_saves_what_is_due_and_the_end(whole: tuple[pathlib.Path, Any]):
    assert sorted(os.listdir(whole[0] / "checkpoints")) == ["00000009", "00000010"]


class Crash(Exception):
    """Ends a run as a killed process does: nothing is saved."""


@pytest.mark.parametrize("crash_at", [3, 6, 10])
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(
    whole: tuple[pathlib.Path, Any], tmp_path: pathlib.Path, crash_at: int
):
    def crash(step: int, state: Any) -> None:
        if step == crash_at:
            raise Crash

    path = tmp_path / "run"
    with pytest.raises(Crash):
        train(path, crash)
    with (path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # cut off while it was written
    state = train(path)
    assert jax.tree.map(np.array_equal, state, whole[1]) == {"weights": True, "seen": True}
    assert lines(path) == lines(whole[0])


def test_goes_on_from_the_checkpoint_before_a_damaged_one(
    whole: tuple[pathlib.Path, Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "run"
    train(path)
    (path / "checkpoints" / "00000010" / "manifest.json").write_text("{")
    state = train(path)
    said = capsys.readouterr().out
    assert "the checkpoint of step 10 is damaged" in said and "continuing after step 9 of 10" in said
    assert np.array_equal(state["weights"], whole[1]["weights"]) and lines(path) == lines(whole[0])


@pytest.mark.parametrize(
    ("extra", "fault"), [({"seconds": 1.0}, "extra.logs"), ({"logs": {"metrics.jsonl": 0}}, "extra.logs.samples.txt")]
)
def test_a_checkpoint_that_does_not_say_how_long_the_logs_were_is_damaged(
    whole: tuple[pathlib.Path, Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], extra: Any, fault: str
):
    path = tmp_path / "run"
    train(path)
    checkpoints.save(path / "checkpoints", 10, whole[1], extra, keep=2)
    train(path)
    said = capsys.readouterr().out
    assert f"the checkpoint of step 10 is damaged (extra.json has no usable {fault}): using the one before" in said
    assert lines(path) == lines(whole[0])


def test_what_is_newer_than_where_a_run_goes_on_is_removed(tmp_path: pathlib.Path):
    path = tmp_path / "run"
    train(path)
    (path / "checkpoints" / "00000010" / "manifest.json").write_text("{")
    (path / "checkpoints" / "00000099").mkdir()

    def crash(step: int, state: Any) -> None:
        assert os.listdir(path / "checkpoints") == ["00000009"]
        raise Crash

    with pytest.raises(Crash):
        train(path, crash)


def contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(tmp_path: pathlib.Path):
    path = tmp_path / "run"
    train(path)
    for name in os.listdir(path / "checkpoints"):
        (path / "checkpoints" / name / "manifest.json").write_text("{")
    before = contents(path)
    with pytest.raises(
        UserError, match=r"all checkpoints of .*run are damaged .*: nothing was changed, start a new run"
    ):
        train(path)
    assert contents(path) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: None, r"metrics\.jsonl is gone or has lost lines: it cannot go on from step 10"),
        (lambda content: content[:-1], r"metrics\.jsonl is gone or has lost lines: it cannot go on from step 10"),
        (lambda content: content.replace(b'"', b"'", 1), r"line 1 of .*metrics\.jsonl is not a record in JSON"),
        (lambda content: b"\xff" + content[1:], r"line 1 of .*metrics\.jsonl is not a record in JSON"),
        (lambda content: b"1\n" + content, r"line 1 of .*metrics\.jsonl is not a record in JSON"),
    ],
)
def test_a_log_that_is_not_what_it_was_is_left_as_it_is(tmp_path: pathlib.Path, damage: Any, message: str):
    path = tmp_path / "run"
    train(path)
    log = path / "metrics.jsonl"
    content = damage(log.read_bytes())
    log.unlink()
    if content is not None:
        log.write_bytes(content)
    before = contents(path)
    with pytest.raises(UserError, match=message):
        train(path)
    assert contents(path) == before


def test_a_finished_run_stays_as_it_is(whole: tuple[pathlib.Path, Any]):
    before = lines(whole[0])
    assert np.array_equal(train(whole[0])["weights"], whole[1]["weights"])
    assert lines(whole[0]) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_saving(
    whole: tuple[pathlib.Path, Any], tmp_path: pathlib.Path, number: int, capsys: pytest.CaptureFixture[str]
):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    class Asking:
        """Sends the signal while steps run, between two checkpoints."""

        def __call__(self, state: Any, step: Any, data: Any) -> Any:
            jax.debug.callback(lambda step: step == 7 and os.kill(os.getpid(), number), step)
            return noisy_step(state, step, data)

    path = tmp_path / "run"
    with pytest.raises(loop.Stopped) as stopped:
        train(path, step=Asking())
    assert (stopped.value.step, stopped.value.signum) == (8, number)
    assert sorted(os.listdir(path / "checkpoints")) == ["00000006", "00000008"]
    assert capsys.readouterr().err == "stopping after this step and saving (Ctrl-C again to stop at once)\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert np.array_equal(train(path)["weights"], whole[1]["weights"]) and lines(path) == lines(whole[0])


def test_a_command_has_something_to_save_from_the_first_step_to_the_last(tmp_path: pathlib.Path):
    """A signal that comes while the steps compile ends it at once."""
    saves = []

    with Signals(exits=True) as signals:

        def step(state: Any, number: Any, data: Any) -> Any:
            saves.append(("compiling", signals.saves))
            return noisy_step(state, number, data)

        train(tmp_path / "run", lambda step, state: saves.append((step, signals.saves)), step=step)
        saves.append(("done", signals.saves))
    assert set(saves) == {("compiling", False), (3, True), (6, True), (9, True), (10, True), ("done", False)}


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: pathlib.Path):
    def diverging(state: Any, step: Any, data: Any) -> Any:
        return state, {"loss": jnp.where(step >= 5, jnp.nan, 1.0)}

    with pytest.raises(UserError, match="loss is nan after step 6: lower the learning rate"):
        train(tmp_path / "run", step=diverging)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["00000003"]


def test_the_clock_goes_on_with_the_run(tmp_path: pathlib.Path):
    path = tmp_path / "run"
    train(path)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for name in ("seconds", "cpu_seconds"):
        times = [record[name] for record in records]
        assert times == sorted(times) and times[0] > 0
    manifest = path / "checkpoints" / "00000010" / "manifest.json"
    manifest.unlink()
    train(path)
    again = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert again[-1]["seconds"] > again[-2]["seconds"] == records[-2]["seconds"]
