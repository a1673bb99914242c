"""The benchmarks run, compare what they say they compare, and write what they say they write."""

import gzip
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxseq as js
from benchmarks import (
    alignments,
    babi,
    clockwork,
    contenders,
    linear_attention,
    linear_scan,
    long_memory,
    memory_cells,
    memory_tasks,
    mlstm,
    moving_average,
    newton,
    reservoirs,
    tagging,
    tasks,
    textbook,
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


def test_alignments_writes_a_table(tmp_path):
    table = alignments.main([alignments.Shape(2, 5, 2, 3)], tmp_path, rounds=1, seconds=0).read_text()
    assert "| 2, 5, 2, 3 | loss | " in table and "| 2, 5, 2, 3 | loss and gradient | " in table


@pytest.mark.slow
def test_newton_writes_iterations_and_speeds(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_fresh_processes", lambda function, argument, count: [function(argument)])
    settings = "--sizes 20,1,2 --rounds 1 --seconds 0 --output".split()
    rows = newton.main([*settings, str(tmp_path)]).read_text().splitlines()[-2:]
    for row, mode in zip(rows, ("forward", "gradient"), strict=True):
        assert row.startswith(f"| GRU | 20, 1, 2 | {mode} | ")
        few, more = map(int, row.split(" | ")[3].split(", "))
        assert few <= more <= 20 and row.split(" | ")[4] == f"{20 * few}, {20 * more}"


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


def test_adding_asks_for_the_sum_of_the_marked():
    xs, targets = map(np.asarray, tasks.adding(11).draw(jax.random.key(0), 200))
    assert xs.shape == (200, 11, 2) and (xs[..., 0] >= 0).all() and (xs[..., 0] < 1).all()
    rows, marked = np.nonzero(xs[..., 1])
    np.testing.assert_array_equal(rows, np.arange(200).repeat(2))
    assert set(marked[::2]) == set(range(5)) and set(marked[1::2]) == set(range(5, 11))  # one in each half
    np.testing.assert_allclose(targets, [row[row[:, 1] == 1, 0].sum() for row in xs], rtol=1e-6)
    assert tasks.adding(11).loss(jnp.ones((200, 11, 1)), targets) == pytest.approx(1 / 6, abs=0.05)


def test_copying_asks_for_the_symbols_after_the_delay():
    task = tasks.copying(7)
    xs, targets = map(np.asarray, task.draw(jax.random.key(0), 50))
    symbols = xs[:, :10]
    assert xs.shape == targets.shape == (50, 27) and set(symbols.flat) == set(range(8))
    np.testing.assert_array_equal(xs[:, 10:], np.broadcast_to([8] * 6 + [9] + [8] * 10, (50, 17)))
    np.testing.assert_array_equal(targets, np.concatenate([np.full((50, 17), 8), symbols], axis=1))
    blank = np.where(
        np.arange(27)[:, None] < 17, np.where(np.arange(9) == 8, 0, -1e9), np.where(np.arange(9) < 8, 0, -1e9)
    )
    guess = jnp.broadcast_to(blank.astype(np.float32), (50, 27, 9))  # who knows all but the symbols
    np.testing.assert_allclose(task.loss(guess, targets), task.trivial, rtol=1e-5)


def test_agreement_asks_for_the_number_of_the_subject():
    xs, targets = map(np.asarray, tasks.agreement(6).draw(jax.random.key(0), 100))
    assert xs.shape == (100, 7) and set(targets) == {0, 1} and set(xs[:, 1:].flat) == set(range(2, 12))
    np.testing.assert_array_equal(xs[:, 0], targets)


@pytest.fixture
def mnist(tmp_path):
    """Images and labels by part, written to a folder as the files of MNIST."""
    rng, parts = np.random.default_rng(0), {}
    for part, count in (("train", 30), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
        parts[part] = images, labels
    return tmp_path, parts


@pytest.mark.parametrize("side", [14, 28])
def test_digits_are_read_as_they_were_written(mnist, side):
    folder, parts = mnist
    task = tasks.digits(folder, side)

    def pixels(images):
        images = images.astype(float)
        corners = [images[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return (images if side == 28 else sum(corners) / 4).reshape(len(images), -1)

    xs, labels = map(np.asarray, task.test())
    assert xs.shape == (20, side * side, 1) and np.array_equal(labels, parts["t10k"][1])  # each once, in order
    np.testing.assert_allclose(255 * xs[..., 0], pixels(parts["t10k"][0]), atol=1)  # whole numbers
    xs, labels = map(np.asarray, task.draw(jax.random.key(0), 200))
    distances = np.abs(255 * xs[:, None, :, 0] - pixels(parts["train"][0])).max(-1)
    assert (distances.min(-1) <= 1).all() and len(set(distances.argmin(-1))) == 30
    np.testing.assert_array_equal(labels, parts["train"][1][distances.argmin(-1)])
    outputs = 5.0 * jax.nn.one_hot(np.array([[1, 3], [3, 1]]), 10)
    assert task.score(outputs, np.array([3, 3])) == 50  # the last output counts


def test_a_task_is_solved_when_the_mean_loss_is_low():
    losses = np.r_[np.ones(60), 0.0, np.ones(39), np.zeros(100)]
    assert tasks.solved_after(losses, 0.5) == 126  # 24 ones and 26 zeros
    assert tasks.solved_after(losses[:120], 0.5) is None
    assert tasks.solved_after(losses[-2:], 0.5) is None


@pytest.mark.parametrize("name", ["adding 9", "copying 5"])
def test_contenders_fit_their_tasks(name):
    task, length = memory_tasks.make_task(name)
    xs, targets = task.draw(jax.random.key(0), 2)
    for label, contender in memory_tasks.contenders(task.inputs, 8, length).items():
        cell = tasks.model(task, *contender.cells, inputs=8)

        def loss(key, cell=cell, contender=contender):
            params = contender.init(cell, key)
            assert jax.tree.structure(params) == jax.tree.structure(cell.init(key))
            return task.loss(cell.unroll(params, xs)[1], targets)

        assert jax.eval_shape(loss, jax.random.key(0)).shape == (), label


def test_independent_recurrent_weights_start_long():
    cell = tasks.model(tasks.adding(9), *memory_tasks.contenders(2, 64, 20)["2 IndRNN"].cells, inputs=64)
    _, lower, upper, _ = tasks.independent(20)(cell, jax.random.key(0))
    high = 2 ** (1 / 20)
    assert 0 <= lower.recurrent_weights.min() < 0.1 and 0.9 < lower.recurrent_weights.max() <= high
    assert 1 / high <= upper.recurrent_weights.min() < 1 < upper.recurrent_weights.max() <= high


@pytest.mark.slow
def test_memory_tasks_writes_tables_and_goes_on_where_it_stopped(mnist, tmp_path, capsys):
    settings = ["--hidden", "8", "--steps", "2", "--mnist", str(mnist[0]), "--output", str(tmp_path), "--only"]
    names = ["--tasks", "adding 6", "copying 3", "digits 14"]
    memory_tasks.main([*settings, "JANET", "--seeds", "1", *names])
    once = capsys.readouterr().out.splitlines()
    table = memory_tasks.main([*settings, "JANET", "--seeds", "2", *names])
    again = capsys.readouterr().out.splitlines()
    runs = json.loads(table.with_suffix(".json").read_text())
    assert [(run["task"], run["cell"], run["seed"]) for run in runs] == [
        (name, "JANET, chrono", seed) for seed in (0, 1) for name in names[1:]
    ]
    assert len(once) == len(again) == 3  # seed 0 was not trained again
    assert [run["parameters"] for run in runs[:3]] == [
        2 * 8 * (inputs + 8 + 1) + outputs * 9 for inputs, outputs in ((2, 1), (10, 9), (1, 10))
    ]
    text = table.read_text()
    low, high = sorted(run["figure"] for run in runs if run["task"] == "adding 6")
    assert f"| JANET, chrono | 185 | 0.005 | 2 | {(low + high) / 2:.2g} ({low:.2g} to {high:.2g}) | 0 | - |" in text
    assert "## Copying 3\n" in text and "10 ln 8 / 23 = 0.904" in text and "| % wrong: median" in text


def test_a_run_that_diverged_is_said_to():
    run = {"cell": "GRU", "parameters": 1234, "rate": 0.01, "solved_after": None}
    runs = [{**run, "figure": figure} for figure in (None, 0.002, None)]
    assert "| GRU | 1,234 | 0.01 | 3 | diverged (0.002 to diverged) | 1 | - |" in memory_tasks.table("adding 6", runs)


def test_memory_tasks_refuses_digits_without_a_folder():
    with pytest.raises(ValueError, match="digits 14 needs the files of MNIST: give their folder with --mnist."):
        memory_tasks.main(["--tasks", "digits 14"])


@pytest.mark.slow
def test_memory_tasks_times_training_steps(tmp_path):
    settings = ["--hidden", "8", "--tasks", "adding 6", "--only", "JANET", "--rounds", "2", "--output", str(tmp_path)]
    text = memory_tasks.main(["--speed", *settings]).read_text()
    assert text.count("| JANET, chrono |") == text.count("| LSTM, forget bias 1 |") == text.count(" | 1.00 |") == 1


@pytest.mark.slow
def test_textbook_writes_tables_and_keeps_what_was_written_by_hand(tmp_path):
    (tmp_path / "textbook.md").write_text("# Old\n\n## What it shows\n\nBy hand.\n")
    settings = "--distance 3 --length 5 --layers 2 --steps 2 --seeds 2 --only tanh --output".split()
    text = textbook.main([*settings, str(tmp_path)]).read_text()
    assert "| Elman, tanh, orthogonal | 1,440 | 0 of 2 | - |" in text  # 32 * (12 + 32 + 1)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 2 and rows[0][-1] == " |" and " to " in rows[1][-1]
    assert text.endswith("\n\n## What it shows\n\nBy hand.\n") and "# Old" not in text


def test_copy_and_recall_ask_for_what_was_shown():
    """The bits to give are those shown, in one order or after the item that is asked for."""
    xs, bits, mask = map(np.asarray, memory_cells.copy(jax.random.key(0), 20, 1, 5))
    for row in range(20):
        mark = int(xs[row, :, 8].argmax())
        assert xs[row, mark, 8] == 1 and xs[row, mark + 1 :].sum() == 0
        assert np.array_equal(xs[row, :mark, :8], bits[row][mask[row]])
        assert np.flatnonzero(mask[row]).tolist() == list(range(mark + 1, 2 * mark + 1))
    xs, bits, mask = map(np.asarray, memory_cells.recall(jax.random.key(0), 20, 2, 5))
    for row in range(20):
        items = [xs[row, t + 1 : t + 4, :6] for t in np.flatnonzero(xs[row, :, 6])]
        asked, end = np.flatnonzero(xs[row, :, 7])
        query = xs[row, asked + 1 : asked + 4, :6]
        answers = [after for item, after in zip(items, items[1:], strict=False) if np.array_equal(item, query)]
        assert end == asked + 4 == 4 * len(items) + 4 and np.flatnonzero(mask[row]).tolist() == [
            end + 1,
            end + 2,
            end + 3,
        ]
        assert any(np.array_equal(answer, bits[row][mask[row]]) for answer in answers)
        assert xs[row, end + 1 :].sum() == 0


@pytest.mark.slow
def test_memory_cells_write_runs_and_go_on(tmp_path):
    settings = [*"--tasks copy --only feed-forward --steps 2 --rows 2 --seeds".split()]
    table = memory_cells.main([*settings, "1", "--output", str(tmp_path)])
    first = json.loads(table.with_suffix(".json").read_text())
    assert len(first) == 1 and set(first[0]["wrong"]) == {"10", "20", "40", "80"}
    memory_cells.main([*settings, "2", "--output", str(tmp_path)])
    runs = json.loads(table.with_suffix(".json").read_text())
    assert runs[0] == first[0] and [run["seed"] for run in runs] == [0, 1]
    assert "| NTM, feed-forward controller | 13,260 | 2 | 0 | - |" in table.read_text()


def write_babi(folder, task, count):
    """A task in which one who went somewhere is there."""
    for part, seed in (("train", 0), ("test", 1)):
        random, lines = np.random.default_rng(seed), []
        for place in random.choice(["kitchen", "garden"], size=count):
            lines += [f"1 Mary went to the {place}.", f"2 Where is Mary? \t{place}\t1"]
        (folder / f"qa{task}_some-task_{part}.txt").write_text("\n".join(lines))


@pytest.mark.slow
def test_babi_trains_each_task_at_1_to_3_hops(tmp_path):
    for task in (1, 4):
        write_babi(tmp_path, task, 64)
    (tmp_path / "v1.2").mkdir()
    write_babi(tmp_path / "v1.2", 4, 32)
    assert len(babi.babi.read(babi.files(tmp_path, 4)[0])) == 32 and babi.name_of(tmp_path, 1) == "some task"
    settings = "--tasks 1 4 --restarts 2 --epochs 25 --babi".split()
    table = babi.main([*settings, str(tmp_path), "--output", str(tmp_path)])
    runs = json.loads(table.with_suffix(".json").read_text())
    assert [(run["task"], run["hops"]) for run in runs] == [(1, 3), (4, 3), (1, 1), (1, 2)]
    for run in runs:
        assert run["train_loss"][run["chosen"]] == min(run["train_loss"])
    assert "| 1 some task | 0.0 (" in table.read_text()
    with pytest.raises(ValueError, match="has no file qa7_"):
        babi.main(["--tasks", "7", "--babi", str(tmp_path), "--output", str(tmp_path / "v1.2")])


@pytest.mark.slow
def test_reservoirs_writes_tables_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    for name, value in {"STARTS": 3, "HELD_OUT": 2, "WARM_UP": 50, "CHOICES": ((0.9, 0.1, 0.2),)}.items():
        monkeypatch.setattr(reservoirs, name, value)
    settings = ["--units", "12", "--steps", "80", "--output", str(tmp_path), "--seeds"]
    reservoirs.main([*settings, "1"])
    once = capsys.readouterr().out.splitlines()
    text = reservoirs.main([*settings, "2"]).read_text()
    runs = json.loads((tmp_path / "reservoirs.json").read_text())
    assert len(once) == 2 and len(capsys.readouterr().out.splitlines()) == 2  # seed 0 was not fitted again
    assert [(run["task"], run["seed"]) for run in runs] == [
        (name, seed) for seed in (0, 1) for name in ("mackey-glass", "narma")
    ]
    assert text.count("| 12 | 80 | 2 |") == 2
    low, high = sorted(run["figure"] for run in runs if run["task"] == "narma")
    assert f"| 12 | 80 | 2 | {(low + high) / 2:.2g} ({low:.2g} to {high:.2g}) |  |" in text


def test_gathered_products_are_those_of_the_reservoir():
    dense, gathered = (kind(2, 9, density=0.3) for kind in (js.Reservoir, reservoirs.Gathered))
    params = dense.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (3, 5, 2))
    np.testing.assert_allclose(gathered.unroll(params, xs)[1], dense.unroll(params, xs)[1], rtol=1e-5, atol=1e-6)


CORPUS = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
lamb NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
rejects VBZ I-VP O
lamb NN I-NP O

"""


@pytest.mark.slow
def test_tagging_writes_a_table_and_goes_on_where_it_was_stopped(tmp_path, capsys):
    for part in ("train", "testa", "testb"):
        (tmp_path / f"eng.{part}").write_text(3 * CORPUS)
    settings = f"--conll {tmp_path} --sizes 4 --seeds 1 --steps 10 --hidden 4 --output {tmp_path}".split()
    output = tagging.main([*settings, "--models", "HMM", "BiLSTM-CRF"])
    rows = [line.split(" | ") for line in output.read_text().splitlines() if line.startswith("| 4 |")]
    assert [row[1] for row in rows] == ["HMM", "BiLSTM-CRF"]
    assert rows[0][4] == "100.0 (100.0 to 100.0)" and float(rows[0][-1].rstrip(" |")) > 0
    runs = json.loads(output.with_suffix(".json").read_text())
    assert all(0 <= run["missing"]["accuracy"] <= run["whole"]["accuracy"] <= 1 for run in runs)
    capsys.readouterr()
    tagging.main(settings)
    assert {run["model"] for run in json.loads(output.with_suffix(".json").read_text())} == set(tagging.MODELS)
    assert "'HMM'" not in capsys.readouterr().out
