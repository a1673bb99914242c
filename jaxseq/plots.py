"""Plots, drawn with matplotlib as figures that the caller shows or saves."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from jaxseq.training.errors import require


def learning_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    levels: Mapping[str, float] | None = None,
    *,
    xlabel: str = "step",
    ylabel: str = "loss",
) -> Any:
    """A figure of curves over training, with horizontal lines for what they are compared with.

    Args:
        curves: by name, the x and y values of each; few points are marked.
        levels: by name, the heights of the dashed lines.
        xlabel: the name of the x axis.
        ylabel: the name of the y axis.

    Returns:
        A `matplotlib.figure.Figure` that no window holds: `figure.savefig("loss.png")`, or the last line of a cell.

    >>> figure = learning_curves({"training": ([10, 20], [3.0, 2.5])}, {"5-gram": 2.2}, ylabel="bits per character")
    >>> figure.axes[0].get_ylabel()
    'bits per character'
    """
    figure = require("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    for name, (xs, ys) in curves.items():
        axes.plot(xs, ys, label=name, marker="o" if len(xs) <= 30 else None, markersize=4)
    for index, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, label=f"{name} ({level:.2f})", linestyle="--", linewidth=1, color=f"C{index + len(curves)}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def png(figure: Any) -> bytes:
    """The PNG file of a figure.

    >>> png(learning_curves({"training": ([1], [2.0])}))[:4]
    b'\\x89PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
