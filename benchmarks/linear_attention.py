"""Gated linear attention and the gated delta rule by chunks of steps, beside the same step by step.

python -m benchmarks.linear_attention
"""

import pathlib
from collections.abc import Sequence

import jax

import jaxseq as js
from benchmarks import ways

SHAPES = ((512, 1, 2, 16, 16), (2048, 1, 2, 16, 16), (512, 1, 4, 32, 64))  # time, batch, heads, key, value


class AttentionByStep(js.GatedLinearAttention):
    """The cell with the unroll that every cell inherits."""

    _unroll = js.Cell._unroll


class DeltaByStep(js.GatedDeltaNet):
    """The cell with the unroll that every cell inherits."""

    _unroll = js.Cell._unroll


def main(
    shapes: Sequence[tuple[int, int, int, int, int]] = SHAPES, results: pathlib.Path = ways.RESULTS
) -> pathlib.Path:
    """Time all shapes; return the path of the table."""
    found = (case for shape in shapes for case in cases(*shape))
    return ways.compare("linear-attention", "Linear attention", found, results)


def cases(time: int, batch: int, heads: int, key_size: int, value_size: int):
    """Forward and training step of both cells at one shape."""
    width = heads * value_size
    xs = jax.random.normal(jax.random.key(0), (batch, time, width))
    for chunked, by_step in ((js.GatedLinearAttention, AttentionByStep), (js.GatedDeltaNet, DeltaByStep)):
        cell, other = (layer(width, key_size, value_size, heads=heads) for layer in (chunked, by_step))
        label = f"{chunked.__name__}, time {time}, batch {batch}, heads {heads}, key {key_size}, value {value_size}"
        yield from ways.modes(label, {"by chunks": cell, "step by step": other}, cell.init(jax.random.key(1)), xs)


if __name__ == "__main__":
    main()
