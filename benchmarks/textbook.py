"""Claims of the textbooks that are reported, not asserted: agreement at a distance, and depth at equal parameters.

python -m benchmarks.textbook
"""

import argparse
import pathlib
import statistics
from collections.abc import Iterator, Sequence

import jaxseq as js
from benchmarks import tasks

RESULTS = pathlib.Path(__file__).parent / "results"
HIDDEN = 32
LEARNED = 0.1  # a cross-entropy
PARAMETERS = 12_000


def agreement(distance: int, steps: int, seeds: int, only: str) -> Iterator[str]:
    """Rows: which cells learn agreement at a distance in a fixed budget, and after how many steps."""
    task, h = tasks.agreement(distance), HIDDEN
    n = task.inputs
    contenders = {
        "Elman, tanh, orthogonal": (js.Elman(n, h), tasks.default),
        "Elman, ReLU, identity": (js.Elman(n, h, activation="relu"), tasks.identity),
        "GRU, bias of z 0": (js.GRU(n, h), tasks.forget(0)),
        "GRU, bias of z 1": (js.GRU(n, h), tasks.forget(1)),
        "LSTM, forget bias 0": (js.LSTM(n, h), tasks.forget(0)),
        "LSTM, forget bias 1": (js.LSTM(n, h), tasks.forget(1)),
        "LSTM, chrono": (js.LSTM(n, h), tasks.chrono(distance)),
        "MinimalGRU": (js.MinimalGRU(n, h), tasks.default),
        "JANET": (js.JANET(n, h), tasks.default),
        "MinGRU": (js.MinGRU(n, h), tasks.default),
    }
    yield f"| cell ({h} units) | parameters | seeds that learn it | steps until then, median |"
    yield "| --- | ---: | ---: | ---: |"
    for name, (recurrent, init) in contenders.items():
        if only not in name:
            continue
        cell, needed = tasks.model(task, recurrent, inputs=h), []
        for seed in range(seeds):
            params, losses = tasks.train(task, cell, steps=steps, seed=seed, init=init)
            after = tasks.solved_after(losses, LEARNED)
            if after is not None and tasks.error(task, cell, params) < LEARNED:
                needed.append(after)
        median = f"{statistics.median(needed):.0f}" if needed else "-"
        yield f"| {name} | {tasks.size(recurrent):,} | {len(needed)} of {seeds} | {median} |"


def depth(length: int, steps: int, seeds: int, most: int) -> Iterator[str]:
    """Rows: one to `most` layers with about the same number of parameters, on the adding problem."""
    task = tasks.adding(length)

    def model(layers: int, units: int, wrap: type[js.Cell] | None = None) -> js.Cell:
        upper = js.GRU(units, units)
        cells = (js.GRU(task.inputs, units), *[wrap(upper) if wrap else upper] * (layers - 1))
        return tasks.model(task, *cells, inputs=units)

    yield "| layers | units a layer | parameters | plain, mean squared error | with shortcuts |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for layers in range(1, most + 1):
        units = min(range(4, 128), key=lambda units: abs(tasks.size(model(layers, units)) - PARAMETERS))
        figures = []
        for cell in dict.fromkeys((model(layers, units), model(layers, units, js.Residual))):  # one if layers is 1
            runs = [tasks.train(task, cell, steps=steps, seed=seed)[0] for seed in range(seeds)]
            errors = [tasks.error(task, cell, params) for params in runs]
            figures.append(f"{statistics.median(errors):.2g} ({min(errors):.2g} to {max(errors):.2g})")
        yield f"| {layers} | {units} | {tasks.size(model(layers, units)):,} | {figures[0]} | {', '.join(figures[1:])} |"


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--distance", type=int, default=30, help="words between subject and verb")
    parser.add_argument("--length", type=int, default=50, help="steps of the adding problem")
    parser.add_argument("--layers", type=int, default=6, help="the most layers")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="a part of the names of the cells to run")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    budget = f"{options.steps} steps of Adam (rate 0.002, batch 32, norm clipped at 1), {options.seeds} seeds"
    parts = [
        "# Claims of the textbooks, reported",
        tasks.where("python -m benchmarks.textbook"),
        f"## Agreement: was or were, {options.distance} words after the subject",
        f"Cat or cats, {options.distance} words of ten others, then: was or were? {budget}. Learned is a cross-entropy "
        f"of 1000 new sentences below {LEARNED}; by chance it is 0.69.",
    ]
    output = options.output / "textbook.md"
    parts = add_table(output, parts, agreement(options.distance, options.steps, options.seeds, options.only))
    parts += [
        "## Depth at equal parameters",
        f"GRU layers on the adding problem over {options.length} steps, about {PARAMETERS:,} parameters in all. "
        f"{budget}. Mean squared error of 1000 new sequences, median (lowest to highest); always saying 1 gives 0.167.",
    ]
    add_table(output, parts, depth(options.length, options.steps, options.seeds, options.layers))
    return output


def add_table(output: pathlib.Path, parts: list[str], rows: Iterator[str]) -> list[str]:
    """The paragraphs and a table of rows, written to the file row by row."""
    lines = []
    for row in rows:
        lines.append(row)
        tasks.write(output, [*parts, "\n".join(lines)])
    return [*parts, "\n".join(lines)]


if __name__ == "__main__":
    main()
