"""An mLSTM in chunks of steps, beside the same cell step by step.

python -m benchmarks.mlstm
"""

import pathlib
from collections.abc import Sequence

import jax

import jaxseq as js
from benchmarks import ways

SHAPES = ((256, 4, 64, 4), (256, 4, 256, 4), (1024, 1, 128, 2))  # time, batch, hidden, heads
CHUNKS = (16, 64)


class ByStep(js.MLSTM):
    """The cell with the unroll that every cell inherits."""

    _unroll = js.Cell._unroll


def main(
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    chunks: Sequence[int] = CHUNKS,
    results: pathlib.Path = ways.RESULTS,
) -> pathlib.Path:
    """Time all shapes with chunks of each size; return the path of the table."""
    each = (case for shape in shapes for chunk in chunks for case in cases(*shape, chunk))
    return ways.compare("mlstm", "Unrolling an mLSTM", each, results)


def cases(time: int, batch: int, hidden: int, heads: int, chunk: int):
    """Forward and training step of one shape, with 32 inputs."""
    cells = {
        "in chunks": js.MLSTM(32, hidden, heads=heads, chunk_size=chunk),
        "step by step": ByStep(32, hidden, heads=heads),
    }
    params = cells["in chunks"].init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (batch, time, 32))
    label = f"time {time}, batch {batch}, hidden {hidden}, heads {heads}, chunks of {chunk}"
    yield from ways.modes(label, cells, params, xs)


if __name__ == "__main__":
    main()
