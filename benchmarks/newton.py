"""All steps at once by Newton's method beside the loop over time, forward and gradient.

python -m benchmarks.newton
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxseq as js
from benchmarks import timing


class Shape(NamedTuple):
    """Of a sequence of 8 features, and the units that read it."""

    time: int
    batch: int
    units: int


SHAPES = (Shape(512, 1, 4), Shape(4096, 1, 4), Shape(512, 1, 32), Shape(4096, 1, 8), Shape(512, 16, 16))
CELLS = {"GRU": js.GRU, "LSTM": js.LSTM}
METHODS = ("newton", "quasi")
FEATURES = 8


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    """Run the benchmark as the command line says; return the path of the table."""
    options = parser().parse_args(arguments)
    (results,) = timing.in_fresh_processes(run, options, 1)
    report = {
        **timing.circumstances(["jax", "jaxlib"]),
        "settings": {"rounds": options.rounds, "seconds": options.seconds},
        "results": results,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"newton-{timing.device_name()}.md"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.write_text(markdown(report))
    print(path.read_text())
    return path


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.newton", description=__doc__.partition("\n")[0])
    add = result.add_argument
    add("--cells", nargs="+", choices=tuple(CELLS), default=["GRU"])
    add("--sizes", nargs="+", type=lambda text: Shape(*map(int, text.split(","))), help="as TIME,BATCH,UNITS")
    add("--rounds", type=int, default=5, help="turns of each contender")
    add("--seconds", type=float, default=0.05, help="least time of a turn")
    add("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results", help="folder for the results")
    return result


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check that all find the same outputs and gradients, and time them."""
    results = []
    for name, shape in itertools.product(options.cells, options.sizes or SHAPES):
        cell = CELLS[name](FEATURES, shape.units)
        params = cell.init(jax.random.key(0))
        xs = jax.random.normal(jax.random.key(1), (shape.batch, shape.time, FEATURES))
        ways = {"unroll": lambda params, xs, cell=cell: cell.unroll(params, xs)[1], **dict(by_newton(cell))}
        went = {
            method: jax.jit(lambda params, xs, cell=cell, method=method: info(cell, method, params, xs))(params, xs)
            for method in METHODS
        }
        iterations = {method: int(each.iterations) if each.converged else None for method, each in went.items()}
        for mode in ("forward", "gradient"):
            calls = {way: call(function, mode, params, xs) for way, function in ways.items()}
            first, *others = (jax.tree.leaves(call()) for call in calls.values())
            for expected, *found in zip(first, *others, strict=True):
                for ours in found:
                    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * float(jnp.abs(expected).max()))
            figures = timing.interleave(calls, options.rounds, options.seconds)
            print(f"timed {name} {tuple(shape)} {mode}", file=sys.stderr)
            results.append(
                {
                    "cell": name,
                    "shape": shape._asdict(),
                    "mode": mode,
                    "iterations": iterations,
                    "milliseconds": {way: 1e3 * statistics.median(seconds) for way, seconds in figures.items()},
                    "speed": {way: timing.speed(figures[way], figures["unroll"]).median for way in METHODS},
                }
            )
    return results


def by_newton(cell: js.Cell):
    """The outputs by each method."""
    for method in METHODS:
        yield method, lambda params, xs, method=method: js.newton_unroll(cell, params, xs, method=method)[1]


def info(cell: js.Cell, method: Any, params: Any, xs: jax.Array) -> js.NewtonInfo:
    """How a method went."""
    return js.newton_unroll(cell, params, xs, method=method)[2]


def call(function: Callable[..., Any], mode: str, params: Any, xs: jax.Array) -> Callable[[], Any]:
    """A compiled call that waits for its results."""

    def loss(params, xs):
        return jnp.sum(function(params, xs) ** 2)

    compiled = jax.jit(function if mode == "forward" else jax.grad(loss, (0, 1)))
    return lambda: jax.block_until_ready(compiled(params, xs))


def markdown(report: dict[str, Any]) -> str:
    """The report as a table to read."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# All steps at once by Newton's method",
        "",
        f"`{report['command']}` on {report['date']}: {report['processor']}, {report['cores']} cores, device "
        f"{report['device']}, float32, {versions}. Milliseconds are medians over {report['settings']['rounds']} rounds "
        "in turns; the speeds are medians of the ratios to `unroll` within a round (above 1: faster than the loop).",
        "",
        "Every iteration computes all steps: `time × iterations` of them, where the loop computes `time`, but only the "
        "iterations, and the levels of each parallel scan, come one after the other. A device with few cores gains "
        "nothing by that. A dash: the iterations did not converge, and the loop took over.",
        "",
        "| cell | time, batch, units | mode | iterations newton, quasi | steps newton, quasi | unroll ms | newton ms "
        "| quasi ms | speed newton | speed quasi |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in report["results"]:
        counts = [result["iterations"][method] for method in METHODS]
        cells = [
            result["cell"],
            ", ".join(map(str, result["shape"].values())),
            result["mode"],
            ", ".join(str(count or "-") for count in counts),
            ", ".join(str(count * result["shape"]["time"]) if count else "-" for count in counts),
            *(f"{milliseconds:.3g}" for milliseconds in result["milliseconds"].values()),
            *(f"{result['speed'][method]:.2g}" for method in METHODS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
