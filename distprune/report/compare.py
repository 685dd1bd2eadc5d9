"""Several runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distprune.report import figures
from distprune.report.cells import column, number, percent, points, text
from distprune.report.figures import Series
from distprune.report.gather import Run
from distprune.report.parts import Column, Figure, Item, Section, Table

PLACES = ("run.dir", "tracking.")
"""Settings that say where things go, in which runs always differ."""


def comparison(runs: list[Run]) -> list[Section]:
    """The accuracy-sparsity curve, a table of results, settings that differ, and the course of all runs."""
    items: list[Item] = [_curve(runs), _results(runs)]
    if settings := _settings(runs):
        items.append(settings)
    return [Section("Runs compared", items), Section("Their course", _courses(runs))]


def _curve(runs: list[Run]) -> Item:
    rows = [
        {
            "name": run.name,
            "x": run.summary["prune/sparsity"],
            "y": run.summary.get("eval/top1"),
            "group": f"{run.config['model']['name']} {run.config['prune']['pattern']}",
        }
        for run in runs
    ]
    dense = {run.summary.get("dense/top1") for run in runs}
    level = dense.pop() if len(dense) == 1 else None
    told = "; ".join(f"{run.name} {_at(run)}" for run in runs)
    return Figure(
        "Accuracy against sparsity",
        f"Accuracy and sparsity: {told}.",
        figures.dots(rows, "sparsity", "top-1 %", level),
        figures.keys([run.name for run in runs]),
        wide=True,
        note="A line joins runs of one model and pattern." + ("" if level is None else " Dotted: the dense model."),
    )


def _at(run: Run) -> str:
    top1 = run.summary.get("eval/top1")
    return f"{'not known' if top1 is None else f'{top1:.2f} %'} at {run.summary['prune/sparsity']:.2%}"


def _results(runs: list[Run]) -> Item:
    has_channels = any(run.has_channels for run in runs)
    columns = [column("run"), Column("sparsity"), Column("dense"), Column("pruned"), Column("difference")]
    columns += [
        Column("nonzero parameters"),
        *([Column("MACs left")] if has_channels else []),
        Column("steps"),
        Column("s"),
    ]
    rows = []
    for run in runs:
        summary = run.summary
        drop = summary.get("eval/top1_drop")
        cells = [
            text(run.name),
            number(summary["prune/sparsity"], ".2%"),
            percent(summary.get("dense/top1")),
            percent(summary.get("eval/top1")),
            points(None if drop is None else -drop),
            number(summary["params/nonzero"]),
        ]
        if has_channels:
            left = summary["macs/left"] / summary["macs/dense"] if run.has_channels else None
            cells.append(number(left, ".1%"))
        rows.append((*cells, number(summary["steps"]), number(summary["wall_s"], ",.0f")))
    return Table("Results", tuple(columns), rows)


def _settings(runs: list[Run]) -> Item | None:
    flat = [_flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings if not name.startswith(PLACES)))
    differ = [name for name in names if len({str(settings.get(name)) for settings in flat}) > 1]
    if not differ:
        return None
    columns = (column("setting"), *(column(run.name) for run in runs))
    rows = [(text(name), *(text(_shown(settings.get(name))) for settings in flat)) for name in differ]
    return Table("Settings in which they differ", columns, rows)


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) and value else {f"{before}{key}": value}
    return flat


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _courses(runs: list[Run]) -> list[Item]:
    names, end = [run.name for run in runs], max(run.end for run in runs)
    items: list[Item] = []
    for title, figure, y, number_format, domain in (
        ("Sparsity", "prune/sparsity", "sparsity", ".0%", (0.0, 1.0)),
        ("Accuracy on the evaluation split", "eval/top1", "top-1 %", ".2f", None),
        ("Training loss", "train/loss", "loss", ",.4~g", None),
    ):
        is_held = figure == "prune/sparsity"
        series = [
            Series(
                run.name,
                run.held(figure, run.summary[figure]) if is_held else run.points(figure),
                dots=figure == "eval/top1",
            )
            for run in runs
        ]
        values = [value for one in series for _, value in one.points if value is not None]
        if not values:
            continue
        ends = "; ".join(f"{one.label} {one.points[-1][1]:.4g}" for one in series if one.points and one.points[-1][1])
        bounds = figures.around(values) if figure == "eval/top1" else domain
        items.append(
            Figure(
                f"{title} by run",
                f"{title} at the end: {ends}.",
                figures.lines(series, y, number=number_format, end=end, domain=bounds, far=y == "loss"),
                figures.keys(names),
            )
        )
    return items
