"""Linear recurrences h' = a h + b, forward and gradient: a loop, a tree, and a loop over chunks side by side.

python -m benchmarks.linear_scan
"""

import argparse
import functools
import itertools
import json
import math
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
    """Of the drive; the decay has one number for each of its elements."""

    time: int
    batch: int
    channels: int


SHAPES = (Shape(1024, 1, 8), Shape(1024, 1, 1024), Shape(1024, 32, 128), Shape(16384, 1, 8), Shape(16384, 1, 128))


def chunked(decay: jax.Array, drive: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """About √T chunks of about √T steps: all chunks advance together from 0, then hand their last states on."""
    time, length = drive.shape[0], 2 ** math.ceil(math.log2(drive.shape[0]) / 2)
    decays, drives = (
        array.reshape(time // length, length, *array.shape[1:]).swapaxes(0, 1) for array in (decay, drive)
    )

    def step(carry, inputs):
        (product, state), (a, b) = carry, inputs
        carry = a * product, a * state + b
        return carry, carry

    zero = jnp.zeros_like(drives[0])
    (whole, last), (products, states) = jax.lax.scan(step, (zero + 1, zero), (decays, drives))
    final, ends = js.linear_scan(whole, last, state, implementation="sequential")
    states = states + products * jnp.concatenate([state[None], ends[:-1]])
    return final, states.swapaxes(0, 1).reshape(drive.shape)


FORMS: dict[str, Callable[..., Any]] = {
    "sequential": functools.partial(js.linear_scan, implementation="sequential"),
    "associative": functools.partial(js.linear_scan, implementation="associative"),
    "chunked": chunked,
}
MODES = ("forward", "gradient")


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    """Run the benchmark as the command line says; return the path of the table."""
    options = parser().parse_args(arguments)
    (results,) = timing.in_fresh_processes(run, options, 1)
    report = {
        **timing.circumstances(["jax", "jaxlib"]),
        "dtypes": options.dtypes,
        "settings": {"rounds": options.rounds, "seconds": options.seconds},
        "results": results,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"linear-scan-{timing.device_name()}.md"
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.write_text(markdown(report))
    print(path.read_text())
    return path


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.linear_scan", description=__doc__.partition("\n")[0])
    add = result.add_argument
    add("--sizes", nargs="+", type=lambda text: Shape(*map(int, text.split(","))), help="as TIME,BATCH,CHANNELS")
    add("--dtypes", nargs="+", choices=("float32", "complex64"), default=["float32", "complex64"])
    add("--rounds", type=int, default=3, help="turns of each contender")
    add("--seconds", type=float, default=0.02, help="least time of a turn")
    add("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results", help="folder for the results")
    return result


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check that all forms compute the same, and time them: median milliseconds by dtype, shape and mode."""
    results = []
    for dtype, shape, mode in itertools.product(options.dtypes, options.sizes or SHAPES, MODES):
        calls = {name: call(form, mode, problem(dtype, shape)) for name, form in FORMS.items()}
        outcomes = [jax.tree.leaves(call()) for call in calls.values()]
        for other in outcomes[1:]:
            for ours, theirs in zip(outcomes[0], other, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * float(jnp.abs(ours).max()))
        figures = timing.interleave(calls, options.rounds, options.seconds)
        milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in figures.items()}
        print(f"timed {dtype} {tuple(shape)} {mode}", file=sys.stderr)
        results.append({"dtype": dtype, "shape": shape._asdict(), "mode": mode, "milliseconds": milliseconds})
    return results


def problem(dtype: str, shape: Shape) -> tuple[jax.Array, ...]:
    """Decays of absolute value below 1, normal drives and a state."""
    keys = jax.random.split(jax.random.key(0), 4)
    decay = jax.random.uniform(keys[0], shape)
    if dtype == "complex64":
        decay = decay * jnp.exp(2j * jnp.pi * jax.random.uniform(keys[1], shape))
    drive = jax.random.normal(keys[2], shape, dtype)
    return decay.astype(dtype), drive, jax.random.normal(keys[3], shape[1:], dtype)


def call(form: Callable[..., Any], mode: str, given: tuple[jax.Array, ...]) -> Callable[[], Any]:
    """A compiled call that waits for its results."""

    def loss(*given):
        last, states = form(*given)
        return jnp.sum(jnp.abs(last) ** 2) + jnp.sum(jnp.abs(states) ** 2)

    compiled = jax.jit(form if mode == "forward" else jax.grad(loss, (0, 1, 2)))
    return lambda: jax.block_until_ready(compiled(*given))


def markdown(report: dict[str, Any]) -> str:
    """The report as a table to read."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Linear recurrences",
        "",
        f"`{report['command']}` on {report['date']}: {report['processor']}, {report['cores']} cores, device "
        f"{report['device']}, {versions}. Milliseconds, medians over {report['settings']['rounds']} rounds.",
        "",
        f"| dtype | time, batch, channels | mode | {' | '.join(FORMS)} |",
        f"| --- | --- | --- |{' ---: |' * len(FORMS)}",
    ]
    for result in report["results"]:
        shape = ", ".join(map(str, result["shape"].values()))
        times = " | ".join(f"{result['milliseconds'][name]:.3g}" for name in FORMS)
        lines.append(f"| {result['dtype']} | {shape} | {result['mode']} | {times} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
