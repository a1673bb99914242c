"""Cells on tasks that need a long memory: adding, copying, digits pixel by pixel.

python -m benchmarks.memory_tasks --mnist FOLDER
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jaxseq as js
from benchmarks import tasks, timing

RESULTS = pathlib.Path(__file__).parent / "results"
TASKS = ("adding 100", "adding 600", "copying 50", "digits 14")


class Kind(NamedTuple):
    """What is the same for tasks of one kind: the budget, what counts as solved, and what a table says."""

    steps: int
    batch: int
    solved: float | None
    figure: str
    about: str  # of the number in the task's name, the steps of a sequence, and the figure without a memory


KINDS = {
    "adding": Kind(
        steps=2000,
        batch=32,
        solved=0.01,
        figure="mean squared error",
        about="The sum of the two marked of {number} numbers in [0, 1). The figure is the mean squared error of 1000 "
        "new sequences; always saying 1 gives {trivial:.3f}. Solved is an error below 0.01.",
    ),
    "copying": Kind(
        steps=2000,
        batch=32,
        solved=0.03,
        figure="cross-entropy",
        about="Ten symbols of eight, then {number} blanks, then the ten again. The figure is the cross-entropy in nats "
        "a step of 1000 new sequences; without a memory it is 10 ln 8 / {length} = {trivial:.3f}. Solved is one below "
        "0.03.",
    ),
    "digits": Kind(
        steps=1000,
        batch=64,
        solved=None,
        figure="% wrong",
        about="MNIST, a pixel a step, {number} x {number} pixels row by row (14: averaged 2 x 2). The figure is the "
        "percentage of the 10,000 test images, each once, that are read wrongly after the last step of training; "
        "nothing was chosen by it. 1000 steps are about one pass.",
    ),
}
COMPARED = {  # what differs from the published figures
    "adding 600": "Published: Bai et al. 2018, with 70 thousand parameters; there training went on for longer.",
    "copying 50": "Published only for a delay of 1000: LSTM 0.0204, GRU 0.0197, tanh RNN 0.0202, and without a memory "
    "0.0204, so none of them solved it (Bai et al. 2018, 16 thousand parameters). This delay is shorter.",
    "digits 14": "Published for 28 x 28 pixels, trained for many passes: (a) 100 units, Le et al. 2015 and Cooijmans "
    "et al. 2017; (b) 70 thousand parameters, Bai et al. 2018.",
}
PUBLISHED = {
    "adding 600": {"LSTM, forget bias 1": "0.164", "GRU": "5.3e-5", "Elman, tanh, orthogonal": "0.177"},
    "digits 14": {
        "Elman, tanh, orthogonal": "65.0 (a), 78.5 (b)",
        "Elman, ReLU, identity (IRNN)": "3.0 (a)",
        "LSTM, forget bias 1": "1.1 (a), 12.8 (b)",
        "GRU": "3.8 (b)",
    },
}


class Contender(NamedTuple):
    """Cells one after another, how they start, their rate, and the most steps they are run over."""

    cells: tuple[js.Cell, ...]
    init: tasks.Init = tasks.default
    rate: float = 5e-3
    longest: int = 1000


def contenders(inputs: int, hidden: int, length: int) -> dict[str, Contender]:
    """Cells of `hidden` units for sequences of `length`, each as its paper starts it."""
    n, h = inputs, hidden
    oscillators = Contender((js.CoRNN(n, h),), rate=2e-3)
    if n == 2:  # adding has its own in the paper's code
        oscillators = Contender((js.CoRNN(n, h, time_step=0.06, frequency=66.0, damping=15.0),), rate=0.02)
    periods = (1, 2, 4, 8, 16, 32, 64, 128)

    def residual(layer: js.Cell) -> tuple[js.Cell, ...]:
        return (js.Dense(n, h), js.Residual(layer), js.Residual(layer))

    def pointwise(layer: js.Cell) -> js.Cell:
        return js.Stack((layer, js.Map("gelu"), js.Dense(h, h)))

    ring = js.LRU(h, h, r_min=0.9, r_max=0.999, max_phase=math.pi / 10)
    attention = js.GatedLinearAttention(h, h // 8, h // 4, heads=4)
    return {
        "Elman, tanh, orthogonal": Contender((js.Elman(n, h),), rate=1e-3),
        "Elman, ReLU, identity (IRNN)": Contender((js.Elman(n, h, activation="relu"),), tasks.identity, rate=1e-3),
        "2 IndRNN": Contender((js.IndRNN(n, h), js.IndRNN(h, h)), tasks.independent(length), rate=1e-3),
        "AntisymmetricRNN": Contender((js.AntisymmetricRNN(n, h),), rate=1e-3, longest=200),
        "CoRNN": oscillators,
        "ClockworkRNN, periods 1 to 128": Contender((js.ClockworkRNN(n, h, periods=periods),), longest=200),
        "GRU": Contender((js.GRU(n, h),)),
        "LSTM, forget bias 1": Contender((js.LSTM(n, h),)),
        "LSTM, chrono": Contender((js.LSTM(n, h),), tasks.chrono(length)),
        "JANET, chrono": Contender((js.JANET(n, h),), tasks.chrono(length)),
        "SLSTM, 4 heads": Contender((js.SLSTM(n, h),), longest=200),
        "2 MinGRU": Contender((js.MinGRU(n, h), js.MinGRU(h, h))),
        "2 LRU": Contender(residual(pointwise(ring)), rate=1e-3),
        "2 S5": Contender(residual(pointwise(js.S5(h, h))), rate=1e-3),
        "2 GatedLinearAttention, 4 heads": Contender(residual(attention), rate=1e-3, longest=100),
        "2 MLSTM, 4 heads": Contender(residual(js.MLSTM(h, h)), rate=1e-3, longest=100),
        "TransformerBlock, 4 heads": Contender(
            (js.Dense(n, h), js.TransformerBlock(h, 4, length, h)), rate=1e-3, longest=100
        ),
    }


def make_task(name: str, mnist: pathlib.Path | None = None) -> tuple[tasks.Task, int]:
    """The task called "adding LENGTH", "copying DELAY" or "digits SIDE", and the steps of its sequences."""
    kind, number = name.split()
    size = int(number)
    if kind == "digits":
        if mnist is None:
            raise ValueError(f"{name} needs the files of MNIST: give their folder with --mnist.")
        return tasks.digits(mnist, size), size**2
    return (tasks.adding(size), size) if kind == "adding" else (tasks.copying(size), size + 20)


def train_once(
    task: tasks.Task, kind: Kind, contender: Contender, hidden: int, steps: int, seed: int
) -> dict[str, Any]:
    """Trains once: the size, the figure, None if it diverged, and after how many steps the task was solved."""
    cell = tasks.model(task, *contender.cells, inputs=hidden)
    params, losses = tasks.train(
        task, cell, steps=steps, seed=seed, batch=kind.batch, rate=contender.rate, init=contender.init
    )
    figure = tasks.error(task, cell, params)
    return {
        "parameters": tasks.size(cell),
        "trivial": task.trivial,
        "rate": contender.rate,
        "figure": figure if math.isfinite(figure) else None,
        "solved_after": kind.solved and tasks.solved_after(losses, kind.solved),
    }


def table(name: str, runs: Sequence[dict[str, Any]]) -> str:
    """A row for each cell: how many seeds solved the task and when, and the figures."""
    kind, published = KINDS[name.split()[0]], PUBLISHED.get(name, {})
    columns = ["cell", "parameters", "rate", "seeds", f"{kind.figure}: median (lowest to highest)"]
    columns += ["solved by", "steps until then, median"] * (kind.solved is not None)
    columns += ["published"] * bool(published)
    rows = []
    for label in {run["cell"] for run in runs}:
        own = [run for run in runs if run["cell"] == label]
        figures = [math.inf if run["figure"] is None else run["figure"] for run in own]
        needed = [run["solved_after"] for run in own if run["solved_after"] is not None]
        middle, *ends = statistics.median(figures), min(figures), max(figures)
        row = [
            label,
            f"{own[0]['parameters']:,}",
            f"{own[0]['rate']:g}",
            f"{len(own)}",
            "{} ({} to {})".format(*map(short, (middle, *ends))),
        ]
        if kind.solved is not None:
            solved = sum(figure < kind.solved for figure in figures)
            row += [f"{solved}", f"{statistics.median(needed):.0f}" if needed else "-"]
        rows.append((middle, row + [published.get(label, "")] * bool(published)))
    heads = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*heads, *(row for _, row in sorted(rows))])


def short(figure: float) -> str:
    """A figure of which two digits count."""
    return "diverged" if figure == math.inf else f"{figure:.2g}"


def report(hidden: int, runs: Sequence[dict[str, Any]]) -> list[str]:
    """The paragraphs around the tables of all runs."""
    parts = [
        "# Tasks that need a long memory",
        tasks.where("python -m benchmarks.memory_tasks --mnist FOLDER"),
        f"{hidden} units a layer, one layer unless a number stands before the name. Adam at the rate in the table, the "
        "norm of its gradient clipped at 1, for a fixed number of steps. Each cell starts as its paper says. The rate "
        "is 0.005 for gated cells, that of its paper's code for CoRNN, and 0.001 else; none was tuned for a cell or a "
        "task. 2 LRU, S5, GatedLinearAttention and MLSTM have shortcuts, the first two with GELU and a dense layer in "
        "each; the Transformer block attends to the whole sequence. What is slow on a CPU is left out of the longer "
        "tasks. A seed has solved a task if its figure says so; the steps are those until the mean loss of 50 of them "
        "does.",
    ]
    for name in sorted({run["task"] for run in runs}, key=lambda name: (*TASKS, name).index(name)):
        kind, own = KINDS[name.split()[0]], [run for run in runs if run["task"] == name]
        about = kind.about.format(number=name.split()[1], length=own[0]["length"], trivial=own[0]["trivial"])
        budget = f"{own[0]['steps']} steps of {kind.batch} sequences."
        parts += [
            f"## {name.capitalize()}",
            " ".join([about, budget, COMPARED.get(name, "")]).rstrip(),
            table(name, own),
        ]
    return parts


def learn(options: argparse.Namespace, names: Sequence[str]) -> pathlib.Path:
    """Trains who was not trained yet, a seed after the other, and writes down every run at once."""
    output = options.output / "memory-tasks.md"
    stored = output.with_suffix(".json")
    runs = json.loads(stored.read_text()) if stored.exists() else []
    made = {name: make_task(name, options.mnist) for name in names}
    for seed in range(options.seeds):
        for name, (task, length) in made.items():
            kind = KINDS[name.split()[0]]
            steps = options.steps or kind.steps
            for label, contender in contenders(task.inputs, options.hidden, length).items():
                key = dict(task=name, cell=label, seed=seed, hidden=options.hidden, steps=steps, length=length)
                if (
                    not any(part in label for part in options.only)
                    or length > contender.longest
                    or any(key.items() <= r.items() for r in runs)
                ):
                    continue
                runs.append({**key, **train_once(task, kind, contender, options.hidden, steps, seed)})
                print(runs[-1], flush=True)
                stored.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
                tasks.write(output, report(options.hidden, [run for run in runs if run["hidden"] == options.hidden]))
    return output


def wait(task: tasks.Task, cell: js.Cell, **settings: Any) -> None:
    """Trains until the losses are there."""
    tasks.train(task, cell, **settings)[1].block_until_ready()


def speed(options: argparse.Namespace, names: Sequence[str], steps: int = 5) -> pathlib.Path:
    """Milliseconds of a training step of each contender, in turns, and as a multiple of the LSTM's."""
    parts = [
        "# Training steps on tasks that need a long memory",
        tasks.where("python -m benchmarks.memory_tasks --speed"),
        f"{options.hidden} units, the cells and batches of [memory-tasks.md](memory-tasks.md), float32. Milliseconds "
        f"are medians over {options.rounds} rounds in turns; the ratio to the LSTM is the median within a round.",
    ]
    output = options.output / "memory-tasks-speed.md"
    for name in names:
        task, length = make_task(name, options.mnist)
        calls, ours = {}, "LSTM, forget bias 1"
        for label, contender in contenders(task.inputs, options.hidden, length).items():
            if length <= contender.longest and any(part in label for part in [*options.only, ours]):
                cell = tasks.model(task, *contender.cells, inputs=options.hidden)
                batch = KINDS[name.split()[0]].batch
                calls[label] = functools.partial(wait, task, cell, steps=steps, batch=batch, init=contender.init)
        figures = timing.interleave(calls, options.rounds, seconds=0)
        lines = ["| cell | ms a step | LSTM = 1 |", "| --- | ---: | ---: |"]
        for label, seconds in figures.items():
            ratio = timing.speed(figures[ours], seconds).median
            lines.append(f"| {label} | {1e3 * statistics.median(seconds) / steps:.1f} | {ratio:.2f} |")
        parts += [f"## {name.capitalize()}", "\n".join(lines)]
        tasks.write(output, parts)
    return output


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=pathlib.Path, help="a folder with the files of MNIST; without it, no digits")
    parser.add_argument("--tasks", nargs="+", help="such as 'adding 100' 'copying 50' 'digits 28'")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the cells to run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="another budget, for all tasks")
    parser.add_argument("--hidden", type=int, default=64, help="units, a multiple of 8")
    parser.add_argument("--speed", action="store_true", help="time training steps; run alone on a quiet machine")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    names = options.tasks or [name for name in TASKS if options.mnist or not name.startswith("digits")]
    return (speed if options.speed else learn)(options, names)


if __name__ == "__main__":
    main()
