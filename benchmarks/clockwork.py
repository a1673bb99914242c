"""A Clockwork RNN whose groups are unrolled one by one, beside the masked product of all groups at each step.

python -m benchmarks.clockwork
"""

import pathlib
from collections.abc import Sequence

import jax

import jaxseq as js
from benchmarks import ways

PERIODS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPES = ((128, 1, 256), (128, 16, 256), (128, 16, 512), (128, 16, 1024), (256, 32, 64))  # time, batch, hidden


class ByStep(js.ClockworkRNN):
    """The cell with the unroll that every cell inherits."""

    _unroll = js.Cell._unroll


def main(shapes: Sequence[tuple[int, int, int]] = SHAPES, results: pathlib.Path = ways.RESULTS) -> pathlib.Path:
    """Time all shapes; return the path of the table."""
    title = f"Unrolling a Clockwork RNN of {len(PERIODS)} groups with periods 1 to {PERIODS[-1]}"
    return ways.compare("clockwork", title, (case for shape in shapes for case in cases(*shape)), results)


def cases(time: int, batch: int, hidden: int):
    """Forward and training step of one shape, with 32 inputs."""
    cells = {"group by group": js.ClockworkRNN, "step by step": ByStep}
    cells = {name: kind(32, hidden, periods=PERIODS) for name, kind in cells.items()}
    params = cells["step by step"].init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (batch, time, 32))
    yield from ways.modes(f"time {time}, batch {batch}, hidden {hidden}", cells, params, xs)


if __name__ == "__main__":
    main()
