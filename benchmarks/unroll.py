"""Recurrent layers, forward and training step, beside torch, flax nnx and the same cell under `lax.scan`.

python -m benchmarks.unroll
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import timing
from benchmarks.contenders import CELLS, MODES, PEERS, Shape, check_agreement, contenders, make_problem

SHAPES = (
    Shape(35, 20, 200, 200),
    Shape(64, 32, 256, 256),
    Shape(100, 32, 128, 256),
    Shape(256, 64, 256, 512),
    Shape(500, 16, 64, 64),
    Shape(1000, 1, 32, 128),
    Shape(1000, 1, 8, 8),
)
TITLES = {"torch": "torch", "flax": "flax nnx", "plain": "lax.scan"}


class Goal(NamedTuple):
    """A speed to reach against a peer: in geometric mean over the training steps, or in every single case."""

    peer: str
    least: float
    everywhere: bool = False


GOALS = (Goal("flax", 1.3), Goal("torch", 0.75), Goal("plain", 0.95, everywhere=True))


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    """Run the benchmark as the command line says; return the path of the table."""
    options = parser().parse_args(arguments)
    if options.cores:
        timing.limit_cores(options.cores)
    runs = timing.in_fresh_processes(run, options, options.runs)
    results = [summarize(case, [run["seconds"][number] for run in runs]) for number, case in enumerate(cases(options))]
    report = {
        **timing.circumstances(["jax", "jaxlib", "torch", "flax", "numpy"]),
        "dtype": options.dtype,
        "settings": {"rounds": options.rounds, "seconds": options.seconds, "runs": options.runs},
        "missing": runs[0]["missing"],
        "results": results,
        "geometric_means": geometric_means(results),
        "goals": [judge(goal, results) for goal in GOALS if any(goal.peer in result["speed"] for result in results)],
    }
    name = "-".join(["unroll", timing.device_name(), *([options.dtype] if options.dtype != "float32" else [])])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    path = options.output / f"{name}.md"
    path.write_text(markdown(report))
    print(path.read_text())
    return path


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    listed = "; ".join(f"{number}: {tuple(shape)}" for number, shape in enumerate(SHAPES))
    result = argparse.ArgumentParser(prog="python -m benchmarks.unroll", description=__doc__.partition("\n")[0])
    add = result.add_argument
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=range(len(SHAPES)), help=listed)
    add("--sizes", nargs="+", type=sizes, help="other shapes instead, as TIME,BATCH,INPUT,HIDDEN")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--rounds", type=int, default=9, help="turns of each contender in a run")
    add("--seconds", type=float, default=0.1, help="least time of a turn")
    add("--runs", type=int, default=3, help="passes over all cases, of which a speed is the median")
    add("--cores", type=int, help="cores to use, by default all that this process may")
    add("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results", help="folder for the results")
    return result


def sizes(text: str) -> Shape:
    """A shape from `TIME,BATCH,INPUT,HIDDEN`."""
    return Shape(*map(int, text.split(",")))


class Case(NamedTuple):
    """One cell at one shape in one mode."""

    cell: str
    shape: Shape
    mode: str


def cases(options: argparse.Namespace) -> list[Case]:
    """What to time, modes of one problem side by side."""
    shapes = options.sizes or [SHAPES[index] for index in options.shapes]
    return [Case(*case) for case in itertools.product(options.cells, shapes, options.modes)]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check that all contenders compute the same, and time them: the seconds of each, a figure a round, by case."""
    exact = options.dtype == "float32" and jax.default_backend() == "cpu"  # GPUs multiply float32 as TF32
    seconds, missing = [], {}
    for (cell, shape), modes in itertools.groupby(cases(options), key=lambda case: case[:2]):
        ready, missing = contenders(make_problem(cell, shape, options.dtype), options.peers)
        for _, _, mode in modes:
            check_agreement(ready, mode, tolerance=1e-3 if exact else 5e-2)
            calls = {name: contender.run[mode] for name, contender in ready.items()}
            seconds.append(timing.interleave(calls, options.rounds, options.seconds))
            print(f"timed {cell} {tuple(shape)} {mode}", file=sys.stderr)
    return {"seconds": seconds, "missing": missing}


def summarize(case: Case, runs: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Median milliseconds and speeds over the runs, and all figures they come from."""
    speeds = [
        {name: timing.speed(run["jaxseq"], figures) for name, figures in run.items() if name != "jaxseq"}
        for run in runs
    ]
    return {
        "cell": case.cell,
        "mode": case.mode,
        "shape": case.shape._asdict(),
        "milliseconds": {
            name: statistics.median(1e3 * statistics.median(run[name]) for run in runs) for name in runs[0]
        },
        "speed": {name: statistics.median(run[name].median for run in speeds) for name in speeds[0]},
        "runs": [
            {"seconds": run, "speed": {name: ratio._asdict() for name, ratio in found.items()}}
            for run, found in zip(runs, speeds, strict=True)
        ],
    }


def geometric_means(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Speed against each peer by cell, or "all" cells, and mode."""
    means = {}
    for cell in (*CELLS, "all"):
        for mode in MODES:
            chosen = [
                result["speed"] for result in results if result["mode"] == mode and cell in (result["cell"], "all")
            ]
            if chosen:
                means[f"{cell} {mode}"] = {
                    peer: timing.geometric_mean(speed[peer] for speed in chosen) for peer in chosen[0]
                }
    return means


def judge(goal: Goal, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was reached of a goal."""
    if goal.everywhere:
        what = f"slowest case against {TITLES[goal.peer]}"
        reached = min(result["speed"][goal.peer] for result in results)
    else:
        what = f"training step against {TITLES[goal.peer]}, geometric mean"
        steps = [result["speed"][goal.peer] for result in results if result["mode"] == "train"]
        reached = timing.geometric_mean(steps) if steps else float("nan")
    return {"goal": f"{what}: at least {goal.least}", "reached": reached, "holds": reached >= goal.least}


def markdown(report: dict[str, Any]) -> str:
    """The report as tables to read."""
    names = list(report["results"][0]["milliseconds"])
    peers = names[1:]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    settings = report["settings"]
    lines = [
        "# Unrolling recurrent layers",
        "",
        f"`{report['command']}` on {report['date']}: {report['processor']}, {report['cores']} cores, "
        f"device {report['device']}, {report['dtype']}, {versions}, `GLIBC_TUNABLES={report['memory']}`.",
        "",
        f"Milliseconds of one call, and how many times as fast jaxseq is (above 1: faster): medians over "
        f"{settings['runs']} runs of {settings['rounds']} rounds.",
        *(f"\n{TITLES[name]} took no part: {reason}." for name, reason in report["missing"].items()),
        "",
        *row(
            "cell",
            "time, batch, input, hidden",
            "mode",
            "jaxseq ms",
            *(f"{TITLES[p]} ms" for p in peers),
            *(f"vs {TITLES[p]}" for p in peers),
        ),
    ]
    count = 4 + 2 * len(peers)
    lines += row(*["---"] * 3, *["---:"] * (count - 3))
    for result in report["results"]:
        shape = ", ".join(str(size) for size in result["shape"].values())
        times = (f"{result['milliseconds'][name]:.3g}" for name in names)
        lines += row(result["cell"], shape, result["mode"], *times, *(f"{result['speed'][peer]:.2f}" for peer in peers))
    if peers:
        lines += ["", *row("geometric mean", *(f"vs {TITLES[p]}" for p in peers)), *row("---", *["---:"] * len(peers))]
        for name, means in report["geometric_means"].items():
            lines += row(name, *(f"{means[peer]:.2f}" for peer in peers))
        lines += ["", *row("goal", "reached", "holds"), *row("---", "---:", "---")]
        for goal in report["goals"]:
            lines += row(goal["goal"], f"{goal['reached']:.2f}", "yes" if goal["holds"] else "no")
    return "\n".join(lines) + "\n"


def row(*cells: str) -> list[str]:
    """One line of a table."""
    return [f"| {' | '.join(cells)} |"]


if __name__ == "__main__":
    main()
