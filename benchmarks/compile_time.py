"""Time to trace and compile the gradient of an unroll, beside the same cell under `lax.scan`.

python -m benchmarks.compile_time
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import jaxseq as js
from benchmarks import timing

LAYERS = (1, 12)
GOAL = 1.5  # times lax.scan, at most


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    """Run the benchmark as the command line says; return the path of the table."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__.partition("\n")[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = options.parse_args(arguments)
    results = [measure(layers, options.rounds) for layers in LAYERS]
    report = {**timing.circumstances(["jax", "jaxlib"]), "rounds": options.rounds, "results": results}
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"compile-time-{timing.device_name()}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path = stem.with_suffix(".md")
    path.write_text(markdown(report))
    print(path.read_text())
    return path


def measure(layers: int, rounds: int) -> dict:
    """Seconds to trace and compile the gradient of a stack of LSTM layers, both ways in turns."""
    cell = js.Stack((js.LSTM(32, 64), *[js.LSTM(64, 64)] * (layers - 1)))
    plain = js.Stack(tuple(map(js.Plain, cell.layers)))
    seconds = {"jaxseq": [], "lax.scan": []}
    for number in range(rounds + 1):
        turns = [("jaxseq", cell), ("lax.scan", plain)]
        for name, contender in turns if number % 2 else turns[::-1]:
            found = compile_seconds(contender)
            if number:  # the first round warms up
                seconds[name].append(found)
    ratios = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
    return {"layers": layers, "seconds": seconds, "ratio": statistics.median(ratios)}


def compile_seconds(cell: js.Cell) -> float:
    """Seconds from a function to its compiled gradient, with nothing cached."""
    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((16, 50, 32), jnp.float32)

    def loss(params, xs):
        return jnp.sum(cell.unroll(params, xs)[1] ** 2)

    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, xs).compile()
    return time.perf_counter() - start


def markdown(report: dict) -> str:
    """The report as a table to read."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Compiling the gradient of LSTM layers",
        "",
        f"`{report['command']}` on {report['date']}: {report['processor']}, {report['cores']} cores, {versions}; "
        f"medians over {report['rounds']} rounds of tracing and compiling. Goal: at most {GOAL} times `lax.scan`.",
        "",
        "| layers | jaxseq s | lax.scan s | times lax.scan |",
        "| --- | ---: | ---: | ---: |",
    ]
    for result in report["results"]:
        ours, theirs = (statistics.median(values) for values in result["seconds"].values())
        lines.append(f"| {result['layers']} | {ours:.2f} | {theirs:.2f} | {result['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
