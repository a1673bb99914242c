"""The benchmarks run, compare what they say they compare, and write what they say they write."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import (
    clockwork,
    contenders,
    linear_attention,
    linear_scan,
    long_memory,
    mlstm,
    moving_average,
    timing,
    unroll,
)

SHAPE = contenders.Shape(time=5, batch=2, input=3, hidden=4)


def test_unroll_writes_a_report_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # else set here for the processes that it starts
    settings = "--sizes 5,2,3,4 --rounds 2 --runs 1 --seconds 0 --output".split()
    table = unroll.main([*settings, str(tmp_path)])
    report = json.loads(table.with_suffix(".json").read_text())
    present = {"jaxseq", "plain", *(name for name in ("torch", "flax") if importlib.util.find_spec(name))}

    assert {(result["cell"], result["mode"]) for result in report["results"]} == {
        (cell, mode) for cell in ("lstm", "gru") for mode in ("forward", "train")
    }
    for result in report["results"]:
        assert result["shape"] == SHAPE._asdict()
        assert set(result["milliseconds"]) == present
        assert set(result["speed"]) == present - {"jaxseq"}
        assert [len(run["seconds"]["jaxseq"]) for run in result["runs"]] == [2]
    assert set(report["missing"]) == {"torch", "flax", "plain", "jaxseq"} - present
    assert set(report["geometric_means"]["all train"]) == present - {"jaxseq"}
    assert len(report["goals"]) == len(present) - 1
    assert report["versions"]["jax"] and report["processor"] and report["cores"] >= 1
    lines = table.read_text().splitlines()
    assert sum(line.startswith("| lstm | 5, 2, 3, 4 |") for line in lines) == 2
    assert any("slowest case against lax.scan: at least 0.95" in line for line in lines)


def test_a_missing_peer_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    problem = contenders.make_problem("gru", SHAPE)
    ready, missing = contenders.contenders(problem, ("torch", "flax", "plain"))
    assert set(ready) == {"jaxseq", "plain"}
    assert missing == {"torch": "not installed", "flax": "not installed"}


@pytest.mark.parametrize("mode", contenders.MODES)
def test_contenders_that_differ_stop_the_run(mode):
    problem = contenders.make_problem("lstm", SHAPE)
    other = problem._replace(params=problem.params._replace(bias=problem.params.bias * 1.01))
    ready = {"jaxseq": contenders.jaxseq(problem), "plain": contenders.plain(other)}
    with pytest.raises(AssertionError, match=f"plain and jaxseq differ in {mode}"):
        contenders.check_agreement(ready, mode, tolerance=1e-3)


def test_contenders_take_turns():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in ("a", "b", "c")}
    figures = timing.interleave(calls, rounds=2, seconds=0)
    # twice each: once to warm up
    assert turns == [*"aabbcc", *"bbccaa"]
    assert {name: len(values) for name, values in figures.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_speed_compares_within_rounds():
    # we slow down from round to round, the peer always takes three times as long
    assert timing.speed([1.0, 2.0, 4.0], [3.0, 6.0, 12.0]) == timing.Ratio(3.0, 3.0, 3.0)
    assert timing.speed([2.0], [1.0]).median == 0.5
    np.testing.assert_allclose(timing.geometric_mean([0.25, 1.0, 4.0]), 1.0)


def test_several_runs_give_their_median():
    runs = [{"jaxseq": [1.0, 1.0], "plain": [speed, speed]} for speed in (1.0, 5.0, 2.0)]
    result = unroll.summarize(unroll.Case("gru", SHAPE, "train"), runs)
    assert result["speed"] == {"plain": 2.0}
    assert result["milliseconds"] == {"jaxseq": 1e3, "plain": 2e3}
    assert [run["speed"]["plain"]["median"] for run in result["runs"]] == [1.0, 5.0, 2.0]


def test_a_goal_everywhere_looks_at_the_slowest_case():
    results = [{"mode": mode, "speed": {"plain": speed}} for mode, speed in [("forward", 0.9), ("train", 2.0)]]
    assert not unroll.judge(unroll.Goal("plain", 0.95, everywhere=True), results)["holds"]
    assert unroll.judge(unroll.Goal("plain", 0.95), results) == {
        "goal": "training step against lax.scan, geometric mean: at least 0.95",
        "reached": pytest.approx(2.0),
        "holds": True,
    }


def test_clockwork_writes_a_table(tmp_path):
    table = clockwork.main([(3, 1, 8)], tmp_path).read_text()
    assert "| time 3, batch 1, hidden 8, forward |" in table and "| time 3, batch 1, hidden 8, train |" in table


def test_moving_average_writes_a_table(tmp_path):
    table = moving_average.main([(5, 2, 3, 2)], tmp_path).read_text()
    assert "| time 5, batch 2, features 3, window 2, forward |" in table


@pytest.mark.slow
def test_linear_scan_writes_every_form(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # else set here for the processes that it starts
    settings = "--sizes 4,2,3 --rounds 1 --seconds 0 --output".split()
    table = linear_scan.main([*settings, str(tmp_path)])
    results = json.loads(table.with_suffix(".json").read_text())["results"]
    assert [(result["dtype"], result["mode"]) for result in results] == [
        (dtype, mode) for dtype in ("float32", "complex64") for mode in ("forward", "gradient")
    ]
    assert all(set(result["milliseconds"]) == {"sequential", "associative", "chunked"} for result in results)
    assert "| complex64 | 4, 2, 3 | gradient |" in table.read_text()


@pytest.mark.slow
def test_linear_attention_writes_a_table(tmp_path):
    table = linear_attention.main([(5, 2, 1, 2, 2)], tmp_path).read_text()
    assert "| GatedDeltaNet, time 5, batch 2, heads 1, key 2, value 2, train |" in table


@pytest.mark.slow
def test_long_memory_writes_what_the_compiler_sets_aside(tmp_path):
    table = long_memory.main(["--times", "3000", "--hidden", "16", "--steps", "1", "--output", str(tmp_path)])
    results = json.loads(table.with_suffix(".json").read_text())["results"]
    outer, inner, ours, plain = (result["temporaries"] for result in results)
    assert 2 * outer < inner < min(ours, plain) / 2
    losses = np.array([result["losses"] for result in results])
    np.testing.assert_allclose(losses, losses[:1].repeat(4, axis=0), rtol=1e-4)
    assert "| 3,000 | Remat(Stack((LSTM, Dense))) |" in table.read_text()


def test_mlstm_writes_a_table(tmp_path):
    table = mlstm.main([(3, 1, 4, 2)], [2], tmp_path).read_text()
    assert "| time 3, batch 1, hidden 4, heads 2, chunks of 2, train |" in table
