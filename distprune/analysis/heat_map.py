"""What each layer costs at each sparsity, as a picture."""

from __future__ import annotations

from distprune.analysis.sensitivity_folder import SensitivityFolder
from distprune.analysis.sensitivity_report import Sensitivity, shown

INCHES_PER_ROW, INCHES_PER_COLUMN = 0.24, 0.72
DARK = 0.55


def draw(found: Sensitivity, folder: SensitivityFolder) -> None:
    """Write sensitivity.png: layers downwards, sparsities across, in each field the points of top-1 lost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    levels, layers = found.levels, list(found.layers.values())
    drops = [[found.drop(layer, level) for level in levels] for layer in layers]
    height = INCHES_PER_ROW * len(layers)
    figure = Figure(figsize=(INCHES_PER_COLUMN * len(levels), height), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    norm = PowerNorm(0.5, 0, max(1.0, max(map(max, drops))), clip=True)
    axes.imshow(drops, cmap="Blues", norm=norm, aspect="auto")
    for row, values in enumerate(drops):
        for column, drop in enumerate(values):
            colour = "white" if norm(drop) > DARK else "black"
            axes.text(column, row, f"{drop:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels], fontsize=8)
    axes.set_yticks(range(len(layers)), map(shown, found.layers), fontsize=8)
    axes.set_xlabel("sparsity of the layer, all others dense", fontsize=8)
    beside = axes.secondary_yaxis("right")
    allocated = [f"{layer.allocated:.3f} of {layer.weights:,}" for layer in layers]
    beside.set_yticks(range(len(layers)), allocated, fontsize=8)
    axes.tick_params(length=0)
    beside.tick_params(length=0)
    axes.set_title(f"Points of top-1 lost, of {found.dense.top1:.2f} %", fontsize=9, loc="left")
    text = f"gets, for {found.target:g}"
    axes.annotate(text, (1, 1), (6, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9)
    with folder.into_place(folder.heat_map.name) as partial:
        figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.1)
