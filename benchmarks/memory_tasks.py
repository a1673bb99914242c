"""Cells on tasks that need a long memory: adding, copying, digits pixel by pixel.

python -m benchmarks.memory_tasks --mnist FOLDER
"""

import argparse
import pathlib

import jax

import jaxseq as js
from benchmarks import tasks

HIDDEN = 64


def contenders(inputs: int, length: int) -> dict[str, tuple[js.Cell, tasks.Init]]:
    """Cells of `HIDDEN` units, and how their params start."""
    h = HIDDEN
    return {
        "Elman, tanh, orthogonal": (js.Elman(inputs, h), tasks.default),
        "Elman, ReLU, identity (IRNN)": (js.Elman(inputs, h, activation="relu"), tasks.identity),
        "GRU": (js.GRU(inputs, h), tasks.default),
        "LSTM, forget bias 1": (js.LSTM(inputs, h), tasks.default),
        "LSTM, chrono": (js.LSTM(inputs, h), tasks.chrono(length)),
        "JANET, chrono": (js.JANET(inputs, h), tasks.chrono(length)),
        "CoRNN": (js.CoRNN(inputs, h), tasks.default),
        "2 MinGRU": (js.Stack((js.MinGRU(inputs, h), js.MinGRU(h, h))), tasks.default),
        "2 LRU, ReLU between": (
            js.Stack((js.LRU(inputs, h), js.Map("relu"), js.LRU(h, h), js.Map("relu"))),
            tasks.default,
        ),
    }


def table(name: str, task: tasks.Task, length: int, steps: int, seeds: int, only: str) -> list[str]:
    """A row for each cell: its error after so many steps, for each seed."""
    lines = [f"| {name} | parameters | error, one figure a seed | seconds a run |", "|---|---|---|---|"]
    for label, (recurrent, init) in contenders(task.inputs, length).items():
        if only not in label:
            continue
        cell = tasks.model(task, recurrent, inputs=HIDDEN)
        runs = [tasks.train(task, cell, steps=steps, seed=seed, init=init) for seed in range(seeds)]
        errors = ", ".join(f"{tasks.error(task, cell, params):.2g}" for params, _, _ in runs)
        lines.append(f"| {label} | {tasks.size(cell)} | {errors} | {min(seconds for _, _, seconds in runs):.0f} |")
        print(lines[-1], flush=True)
    return lines


def digits(folder: pathlib.Path, steps: int, only: str) -> list[str]:
    """A row for each cell: the share of test images it gets right."""
    train, test = tasks.digits(folder), tasks.digits(folder, "t10k")
    xs, labels = test.draw(jax.random.key(0), 5000)
    lines = ["| digits, 196 pixels | parameters | test accuracy | seconds |", "|---|---|---|---|"]
    for label, (recurrent, init) in contenders(1, 196).items():
        if only not in label:
            continue
        cell = tasks.model(train, recurrent, inputs=HIDDEN)
        params, _, seconds = tasks.train(train, cell, steps=steps, batch=64, init=init)
        accuracy = float((cell.unroll(params, xs)[1][:, -1].argmax(-1) == labels).mean())
        lines.append(f"| {label} | {tasks.size(cell)} | {accuracy:.3f} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=pathlib.Path, help="a folder with the files of MNIST; without it, no digits")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of the names of the cells to run")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results/memory-tasks.md"
    )
    options = parser.parse_args()
    text = [
        "# Tasks that need a long memory",
        tasks.where(),
        f"{HIDDEN} units; {options.steps} steps of Adam (0.002, batch 32, for digits 64), its norm clipped at 1. "
        "Errors are of new examples.",
    ]
    for length in (100, 600):
        task = tasks.adding(length)
        text += [
            f"## Adding two of {length} numbers\n\nMean squared error; always saying 1 gives 0.167. Published for 600, "
            "with 70 thousand parameters, trained longer: LSTM 0.164, GRU 5.3e-5, tanh RNN 0.177 (Bai et al. 2018).",
            "\n".join(table(f"adding, {length}", task, length, options.steps, options.seeds, options.only)),
        ]
    task = tasks.copying(50)
    text += [
        f"## Copying ten symbols after 50 steps\n\nCross-entropy in nats a step; {task.trivial:.3f} without a memory. "
        "Published for 1000 steps, where none solved it: LSTM 0.0204, GRU 0.0197, tanh RNN 0.0202, without a memory "
        "0.0204 (Bai et al. 2018).",
        "\n".join(table("copying, 50", task, 70, options.steps, options.seeds, options.only)),
    ]
    if options.mnist:
        text += [
            "## Digits, one pixel a step\n\nMNIST averaged to 14 x 14, one seed. Published for 28 x 28, trained to the "
            "end: tanh RNN 0.35, IRNN 0.97, LSTM 0.989 (Le et al. 2015, Cooijmans et al. 2017).",
            "\n".join(digits(options.mnist, options.steps, options.only)),
        ]
    options.output.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
