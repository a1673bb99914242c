"""A moving average of all steps at once, by sums of 1, 2, 4, ... inputs, beside the same step by step.

python -m benchmarks.moving_average
"""

import pathlib
from collections.abc import Sequence

import jax

import jaxseq as js
from benchmarks import ways

SHAPES = ((512, 1, 64, 8), (512, 16, 64, 8), (512, 16, 64, 100), (4096, 4, 16, 32))  # time, batch, features, window


class ByStep(js.MovingAverage):
    """The cell with the unroll that every cell inherits."""

    _unroll = js.Cell._unroll


def main(shapes: Sequence[tuple[int, int, int, int]] = SHAPES, results: pathlib.Path = ways.RESULTS) -> pathlib.Path:
    """Time all shapes; return the path of the table."""
    return ways.compare(
        "moving-average", "Moving averages", (case for shape in shapes for case in cases(*shape)), results
    )


def cases(time: int, batch: int, features: int, window: int):
    """Forward and training step of one shape."""
    cells = {"at once": js.MovingAverage(features, window), "step by step": ByStep(features, window)}
    xs = jax.random.normal(jax.random.key(0), (batch, time, features))
    yield from ways.modes(f"time {time}, batch {batch}, features {features}, window {window}", cells, (), xs)


if __name__ == "__main__":
    main()
