"""Plots, drawn with matplotlib as figures that the caller shows or saves."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

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


def gradient_flow(norms: Mapping[str, Any]) -> Any:
    """A figure of gradient norms over time on a logarithmic axis.

    Args:
        norms: by name, what `diagnostics.gradient_flow` gives, `[*batch, time]`; of a batch the median is drawn, and a
            band from the lower to the upper quartile. Zeros, as at padding, are left out.

    >>> import jax, jax.numpy as jnp, jaxseq as js
    >>> cell = js.Elman(2, 3)
    >>> params = cell.init(jax.random.key(0))
    >>> flow = js.diagnostics.gradient_flow(cell, params, jnp.ones((4, 9, 2)), lambda ys: ys[:, -1].sum())
    >>> gradient_flow({"Elman": flow}).axes[0].get_yscale()
    'log'
    """
    if not isinstance(norms, Mapping):
        raise TypeError(f'gradient_flow needs norms by name, {{"name": norms}}, got {type(norms).__name__}.')
    figure, axes = _axes(xlabel="step", ylabel="norm of dL/dh", yscale="log")
    for name, values in norms.items():
        rows = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
        rows = np.where(rows > 0, rows, np.nan)
        seen = np.flatnonzero(~np.isnan(rows).all(axis=0))
        low, middle, high = np.nanquantile(rows[:, seen], [0.25, 0.5, 0.75], axis=0)
        axes.plot(seen + 1, middle, label=name)
        if len(rows) > 1:
            axes.fill_between(seen + 1, low, high, alpha=0.2)
    axes.legend()
    return figure


def jacobian_singular_values(values: Any) -> Any:
    """A figure of singular values through time, of each step's Jacobian and of their products, on logarithmic axes.

    `values` is what `diagnostics.jacobian_singular_values` gives for one sequence, or the same of a batch, of which the
    median is drawn.

    >>> import jax, jax.numpy as jnp, jaxseq as js
    >>> cell = js.Elman(2, 3)
    >>> found = js.diagnostics.jacobian_singular_values(cell, cell.init(jax.random.key(0)), jnp.ones((9, 2)))
    >>> [axes.get_ylabel() for axes in jacobian_singular_values(found).axes]
    ['of one step', 'of all steps so far']
    """
    figure = require("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, part, label in zip(panels, values, ("of one step", "of all steps so far"), strict=True):
        lines = np.median(np.asarray(part, np.float64).reshape(-1, *np.shape(part)[-2:]), axis=0)
        colors = require("matplotlib").colormaps["viridis"](np.linspace(0, 0.9, lines.shape[-1]))
        for line, color in zip(lines.T, colors, strict=True):
            axes.plot(np.arange(1, len(line) + 1), np.where(line > 0, line, np.nan), color=color, linewidth=1)
        axes.axhline(1, linestyle="--", linewidth=1, color="gray")
        axes.set(xlabel="step", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    figure.suptitle("singular values of the Jacobian")
    return figure


def lyapunov_exponents(exponents: Mapping[str, Any]) -> Any:
    """A figure of Lyapunov spectra: by name, the exponents `[*batch, count]`, of a batch their mean.

    >>> lyapunov_exponents({"Henon map": [0.419, -1.623]}).axes[0].get_ylabel()
    'nats per step'
    """
    figure, axes = _axes(xlabel="exponent", ylabel="nats per step")
    for name, values in exponents.items():
        mean = np.mean(np.reshape(values, (-1, np.shape(values)[-1])), axis=0)
        axes.plot(np.arange(1, len(mean) + 1), mean, label=name, marker="o", markersize=4)
    axes.axhline(0, linestyle="--", linewidth=1, color="gray")
    axes.legend()
    return figure


def fixed_points(points: Any, trajectories: Any = None) -> Any:
    """A figure of fixed points in the plane of the two largest principal components, and of their eigenvalues.

    Args:
        points: what `diagnostics.fixed_points` gives. Points at which all eigenvalues are below 1 in magnitude, which
            attract, are filled, the others are hollow.
        trajectories: states `[..., time, *features]` of the same tree to draw as lines; they then span the plane.

    >>> state, speed = np.eye(3), np.zeros(3)
    >>> from jaxseq.diagnostics import FixedPoints
    >>> figure = fixed_points(FixedPoints(state, speed, np.full((3, 3), 0.5 + 0.1j), np.ones(3)))
    >>> [axes.get_title() for axes in figure.axes]
    ['3 fixed points', 'eigenvalues']
    """
    figure = require("matplotlib.figure").Figure(figsize=(9, 4.5), layout="constrained")
    plane, spectrum = figure.subplots(1, 2)
    count = len(points.speed)
    if count == 0:
        raise ValueError("There is no fixed point to draw: give more starts, more steps or a larger tolerance.")
    vectors = _vectors(points.state, 1)
    lines = np.zeros((0, 1, vectors.shape[-1])) if trajectories is None else _vectors(trajectories, None)
    spread = lines.reshape(-1, vectors.shape[-1]) if lines.size else vectors
    center = spread.mean(axis=0)
    basis = np.linalg.svd(spread - center)[2][:2].T
    for line in lines:
        plane.plot(*_pad((line - center) @ basis), color="gray", linewidth=0.7, alpha=0.5)
    attracts = (np.abs(points.eigenvalues) < 1).all(axis=-1)
    x, y = _pad((vectors - center) @ basis)
    plane.scatter(x, y, c=np.where(attracts[:, None], np.array([[0, 0, 0.8]]), 1.0), edgecolors=(0, 0, 0.8), zorder=3)
    plane.set(title=f"{count} fixed points", xlabel="first component", ylabel="second component")
    spectrum.add_patch(require("matplotlib.patches").Circle((0, 0), 1, fill=False, color="gray", linestyle="--"))
    spectrum.scatter(points.eigenvalues.real, points.eigenvalues.imag, s=8)
    spectrum.set(title="eigenvalues", xlabel="real", ylabel="imaginary", aspect="equal")
    return figure


def free_parameters(lengths: Sequence[int], counts: Mapping[str, Sequence[int]]) -> Any:
    """A figure of how many numbers models of a sequence need as it grows longer, on a logarithmic axis.

    Args:
        lengths: of the sequences.
        counts: by the name of a model, what `graphical.free_parameters` gives for each length.

    >>> from jaxseq.structured import graphical
    >>> models, lengths = {"table": "table", "chain of order 2": 2}, [1, 2, 4, 8]
    >>> counts = {name: [graphical.free_parameters(m, 10, length) for length in lengths] for name, m in models.items()}
    >>> free_parameters(lengths, counts).axes[0].get_yscale()
    'log'
    """
    figure, axes = _axes(xlabel="steps", ylabel="free parameters", yscale="log")
    for name, values in counts.items():
        axes.plot(lengths, [float(value) for value in values], label=name, marker="o", markersize=4)
    axes.legend()
    return figure


def weights(
    weights: Mapping[str, Any], *, xlabel: str = "step", ylabel: str = "place", places: Sequence[str] | None = None
) -> Any:
    """A figure of weights over places, an image for each name: where heads of a memory are, what attention looks at.

    Args:
        weights: by name, `[time, place]`, or `[hop, sentence]` of a memory network.
        xlabel: the name of the first axis.
        ylabel: the name of the second axis.
        places: what stands at each place, such as the sentences of a story; by default their numbers.

    >>> figure = weights({"written": np.eye(3), "read": np.eye(3)})
    >>> [axes.get_title() for axes in figure.axes]
    ['written', 'read']
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f'weights needs arrays by name, {{"name": array}}, got {type(weights).__name__}.')
    images = {name: np.asarray(image, np.float64) for name, image in weights.items()}
    for name, image in images.items():
        if image.ndim != 2 or (places is not None and image.shape[1] != len(places)):
            wanted = "place" if places is None else len(places)
            raise ValueError(f"weights needs arrays [time, {wanted}], got {name!r} of the shape {image.shape}.")
    figure = require("matplotlib.figure").Figure(figsize=(1 + 4 * len(images), 4), layout="constrained")
    panels = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, (name, image) in zip(panels, images.items(), strict=True):
        axes.imshow(image.T, aspect="auto", cmap="gray_r", vmin=0, vmax=max(1.0, image.max(initial=0)))
        axes.set(title=name, xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if places is not None:
            axes.set_yticks(range(len(places)), places)
    return figure


def _axes(**labels: str) -> tuple[Any, Any]:
    figure = require("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(**labels)
    axes.grid(alpha=0.3)
    return figure, axes


def _vectors(state: Any, batch_rank: int | None) -> np.ndarray:
    """The floating numbers of states as vectors: `[points, units]`, or `[rows, time, units]` if no rank is given."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state) if np.issubdtype(np.asarray(leaf).dtype, np.floating)]
    rank = batch_rank or max(leaf.ndim for leaf in leaves) - 1
    vectors = np.concatenate([leaf.reshape(*leaf.shape[:rank], -1) for leaf in leaves], axis=-1)
    return vectors if batch_rank else vectors.reshape(-1, *vectors.shape[-2:])


def _pad(points: np.ndarray) -> np.ndarray:
    """Coordinates `[2, points]`, also where there is but one component."""
    return np.pad(points, ((0, 0), (0, 2 - points.shape[-1]))).T


def png(figure: Any) -> bytes:
    """The PNG file of a figure.

    >>> png(learning_curves({"training": ([1], [2.0])}))[:4]
    b'\\x89PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
