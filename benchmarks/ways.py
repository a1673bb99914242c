"""Two ways to compute the same, timed in turns: a table of what the first gains."""

import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing

ROUNDS, SECONDS = 7, 0.05
RESULTS = pathlib.Path(__file__).parent / "results"


def compare(
    name: str, title: str, cases: Iterable[tuple[str, Mapping[str, Callable[[], Any]]]], results: pathlib.Path
) -> pathlib.Path:
    """Check that both calls of each case agree, time them, and write the table; returns its path."""
    facts = timing.circumstances(["jax", "jaxlib"])
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rows = []
    for label, calls in cases:
        (first, _), (second, _) = calls.items()
        outputs = [jax.tree.leaves(call()) for call in calls.values()]
        for ours, theirs in zip(*outputs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3 * float(jnp.abs(theirs).max()) + 1e-6)
        figures = timing.interleave(calls, ROUNDS, SECONDS)
        speed = timing.speed(figures[first], figures[second])
        milliseconds = " | ".join(f"{1e3 * statistics.median(values):.3g}" for values in figures.values())
        rows.append((first, second, f"| {label} | {milliseconds} | {speed.median:.2f} |"))
    first, second, _ = rows[0]
    lines = [
        f"# {title}",
        "",
        f"`{facts['command']}` on {facts['date']}: {facts['processor']}, {facts['cores']} cores, device "
        f"{facts['device']}, float32, {versions}. Milliseconds are medians over {ROUNDS} rounds in turns, the speed "
        "is the median of the ratios within a round (above 1: the first way is faster).",
        "",
        f"| case | {first} ms | {second} ms | speed |",
        "| --- | ---: | ---: | ---: |",
        *(row for *_, row in rows),
    ]
    path = results / f"{name}-{timing.device_name()}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())
    return path


def modes(label: str, cells: Mapping[str, Any], params: Any, xs: jax.Array):
    """Two cases: the forward pass of each cell, and its gradient, of the sum of the squares of its outputs."""

    def forward(cell):
        return jax.jit(lambda params, xs: cell.unroll(params, xs)[1])

    def train(cell):
        return jax.jit(jax.grad(lambda params, xs: jnp.sum(cell.unroll(params, xs)[1] ** 2), argnums=(0, 1)))

    def called(run):
        return lambda: jax.block_until_ready(run(params, xs))

    for mode in (forward, train):
        yield f"{label}, {mode.__name__}", {name: called(mode(cell)) for name, cell in cells.items()}
