"""Plots of the pages of docs, as SVG beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams |= {"svg.hashsalt": "distprune", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
import matplotlib.pyplot as plt  # noqa: E402 (behind the choice of a backend)
from matplotlib.figure import Figure  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e")
Line = Sequence[tuple[float, float]]


def bars(name: str, groups: Mapping[str, Mapping[str, float]], unit: str, logarithmic: bool = False) -> str:
    """Horizontal bars, by group; where the file lies, as pages of docs name it."""
    figure, axes = plt.subplots(len(groups), 1, figsize=(7, 0.5 + 1.5 * len(groups)), squeeze=False, sharex=True)
    for axis, (group, values) in zip(axes[:, 0], groups.items(), strict=True):
        drawn = axis.barh(list(values), list(values.values()), color=COLOURS[0], height=0.65)
        axis.bar_label(drawn, fmt=lambda ms: f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}", padding=3)
        axis.invert_yaxis()
        axis.set_title(group, loc="left", fontsize=9, fontweight="bold")
        if logarithmic:
            axis.set_xscale("log")
        axis.margins(x=0.12)
    axes[-1, 0].set_xlabel(unit)
    return _saved(figure, name)


def curves(name: str, lines: Mapping[str, tuple[Line, Line]], x: str, y: str) -> str:
    """Dots that were measured and lines of a model, logarithmic in y; where the file lies."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for colour, (label, (dots, line)) in zip(COLOURS, lines.items(), strict=False):
        axis.plot(*zip(*line, strict=True), color=colour, label=label)
        axis.plot(*zip(*dots, strict=True), "o", color=colour, markersize=5)
    axis.set_yscale("log")
    axis.set(xlabel=x, ylabel=y)
    axis.legend(frameon=False)
    return _saved(figure, name)


def _saved(figure: Figure, name: str) -> str:
    folder = DOCS / "benchmarks"
    folder.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    return f"benchmarks/{name}.svg"
