"""Claims of the textbooks that are reported, not asserted: agreement at a distance, and depth at equal parameters.

python -m benchmarks.textbook
"""

import argparse
import pathlib
import statistics
from collections.abc import Callable

import jaxseq as js
from benchmarks import tasks
from benchmarks.tasks import size, where

HIDDEN = 32


def agreement(steps: int, seeds: int) -> list[str]:
    """Which cells learn agreement at a distance of 30 words in a fixed budget, and after how many steps."""
    task = tasks.agreement(30)
    n, h = task.inputs, HIDDEN
    contenders = {
        "Elman, tanh": (js.Elman(n, h), tasks.default),
        "Elman, ReLU with identity": (js.Elman(n, h, activation="relu"), tasks.identity),
        "GRU": (js.GRU(n, h), tasks.default),
        "LSTM, forget bias 0": (js.LSTM(n, h), tasks.forget(0)),
        "LSTM, forget bias 1": (js.LSTM(n, h), tasks.forget(1)),
        "MinimalGRU": (js.MinimalGRU(n, h), tasks.default),
        "JANET": (js.JANET(n, h), tasks.default),
    }
    lines = [f"| cell ({h} units) | seeds that learn it | steps until then, median |", "|---|---|---|"]
    for name, (recurrent, init) in contenders.items():
        cell, needed = tasks.model(task, recurrent, inputs=h), []
        for seed in range(seeds):
            params, values, _ = tasks.train(task, cell, steps=steps, seed=seed, init=init)
            learned = (values < 0.1).nonzero()[0]
            if len(learned) and tasks.error(task, cell, params) < 0.1:
                needed.append(int(learned[0]))
        median = f"{statistics.median(needed):.0f}" if needed else "-"
        lines.append(f"| {name} | {len(needed)} of {seeds} | {median} |")
    return lines


def depth(steps: int, seeds: int) -> list[str]:
    """One to six layers with about the same number of parameters, on the adding problem."""
    task, budget = tasks.adding(50), 12_000
    lines = [
        "| layers | units a layer | parameters | plain, mean squared error | with shortcuts |",
        "|---|---|---|---|---|",
    ]
    for count in range(1, 7):

        def build(units: int, wrap: Callable[[js.Cell], js.Cell], count: int = count) -> js.Cell:
            upper = (wrap(js.GRU(units, units)) for _ in range(count - 1))
            return tasks.model(task, js.GRU(task.inputs, units), *upper, inputs=units)

        units = min(range(4, 128), key=lambda units: abs(size(build(units, js.Plain)) - budget))
        errors = []
        for wrap in (lambda cell: cell, js.Residual):
            cell = build(units, wrap)
            runs = [
                tasks.error(task, cell, tasks.train(task, cell, steps=steps, seed=seed)[0]) for seed in range(seeds)
            ]
            errors.append(statistics.median(runs))
        lines.append(f"| {count} | {units} | {size(build(units, js.Plain))} | {errors[0]:.4f} | {errors[1]:.4f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results/textbook.md")
    options = parser.parse_args()
    text = [
        "# Claims of the textbooks, reported",
        where(),
        "## Agreement: was or were, 30 words after the subject",
        f"{options.steps} steps of Adam (0.002, batch 32, norm clipped at 1); learned is a cross-entropy below 0.1 "
        "(chance: 0.69).",
        "\n".join(agreement(options.steps, options.seeds)),
        "## Depth at equal parameters",
        f"The adding problem over 50 steps, {options.steps} steps of training, median of {options.seeds} seeds; always "
        "saying 1 gives 0.167.",
        "\n".join(depth(options.steps, options.seeds)),
    ]
    options.output.write_text("\n\n".join(text) + "\n")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
