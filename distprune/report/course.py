"""The course of a run: figures over steps, rounds, and channels that go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from distprune.report import figures
from distprune.report.cells import column, number, text
from distprune.report.figures import Series
from distprune.report.gather import Points, Run
from distprune.report.parts import Column, Figure, Item, Table, Words

FEW_UPDATES = 20
SHADED = "In the figures over steps the ground is shaded where something was pruned."


def training(run: Run) -> Iterator[Item]:
    """Figures over steps."""
    yield from _sparsity(run)
    yield from _accuracy(run)
    yield from _losses(run)
    yield from _course(run)
    if run.pruning is not None:
        yield Words(SHADED)


def rounds(run: Run) -> Iterator[Item]:
    """Attempts of iterative pruning, and what the guard said."""
    tried: list[dict[str, Any]] = run.summary.get("prune/rounds") or []
    if not tried:
        return
    accepted, guard = [outcome for outcome in tried if outcome["accepted"]], run.summary.get("prune/guard")
    best = f"the sparsest that stayed is {max(o['sparsity'] for o in accepted):.2%}" if accepted else "none stayed"
    name = (guard or {}).get("set")
    dense = run.summary.get(f"dense/{name}/top1" if name else "dense/top1")
    bound = (
        "" if guard is None else f" The guard allows {guard['max_drop']:g} points on {name or 'the evaluation split'}."
    )
    yield Figure(
        "Attempts",
        f"{len(tried)} attempts, {len(tried) - len(accepted)} rolled back; {best}.",
        figures.attempts(tried, dense),
        note=f"Hollow: rolled back. Dotted: the dense model.{bound}",
    )
    columns = (
        Column("attempt"),
        Column("round"),
        Column("sparsity"),
        Column("top-1 %"),
        Column("drop"),
        column("what"),
    )
    yield Table(
        "Rounds",
        columns,
        [
            (
                number(i + 1),
                number(outcome["round"]),
                number(outcome["sparsity"], ".4%"),
                number(outcome["top1"], ".2f"),
                number(outcome["drop"], ".2f"),
                text("accepted" if outcome["accepted"] else "rolled back"),
            )
            for i, outcome in enumerate(tried)
        ],
        wide=False,
    )


def channels(run: Run) -> Iterator[Item]:
    """What is left of a model whose channels go, and when they went."""
    if not run.has_channels:
        return
    summary, series = run.summary, []
    for label, figure, dense in (
        ("multiply-accumulates", "macs/left", "macs/dense"),
        ("parameters", "params/left", "params/dense"),
    ):
        whole, left = summary[dense], run.held(figure, last(run.points(figure)))
        found = [(step, None if value is None else value / whole) for step, value in left]
        series += [Series(label, found, dots=len(found) < FEW_UPDATES)] if found else []
    if series:
        ends = ", ".join(f"{last(one.points):.1%} of the {one.label}" for one in series)
        yield Figure(
            "What is left of the model",
            f"Left at the end: {ends}.",
            figures.lines(series, "left", number=".0%", end=run.end, domain=(0, 1), shaded=run.pruning),
            figures.keys([one.label for one in series]),
        )
    if shrinks := summary.get("prune/shrinks"):
        yield Table(
            "When channels were removed",
            (
                Column("step"),
                Column("parameters"),
                Column("MACs"),
                Column("largest difference"),
                Column("ms a step before"),
            ),
            [
                (
                    number(shrunk["step"]),
                    number(shrunk["params"]),
                    number(shrunk["macs"]),
                    number(shrunk["difference"], ".1e"),
                    number(shrunk["step_ms"], ".2f"),
                )
                for shrunk in shrinks
            ],
            note="Difference: of outputs before and after the removal.",
        )


def _sparsity(run: Run) -> Iterator[Item]:
    asked, reached = (run.held(name, run.summary[name]) for name in ("prune/target_sparsity", "prune/sparsity"))
    if not reached:
        return
    series = [
        Series("asked", asked, dashed=True, stepped=True),
        Series("reached", reached, dots=len(reached) < FEW_UPDATES),
    ]
    yield Figure(
        "Sparsity asked and reached",
        f"At the end {last(reached):.2%} was reached, and {last(asked):.2%} asked.",
        figures.lines(series, "sparsity", number=".0%", end=run.end, domain=(0, 1), shaded=run.pruning),
        figures.keys(["asked", "reached"], dashed=["asked"]),
    )


def _accuracy(run: Run) -> Iterator[Item]:
    train, held_out = run.points("train/top1"), run.points("eval/top1")
    sets = [name for name in run.figures("eval/") if name.count("/") > 1 and name.endswith("/top1")][:5]
    series = [
        Series("evaluation", held_out, dots=True),
        Series("training batches", train, faint=True),
        *(
            Series(name.split("/", 1)[1].removesuffix("/top1"), run.points(name), dots=True, dashed=True)
            for name in sets
        ),
    ]
    series = [one for one in series if one.points]
    if not series:
        return
    dense, final = run.summary.get("dense/top1"), run.summary.get("eval/top1")
    begin = run.pruning[0] if run.pruning else 0
    shown = [
        value
        for one in series
        for step, value in one.points
        if value is not None and (one.label != "training batches" or step >= begin)
    ]
    low, high = figures.around([*shown, *([] if dense is None else [dense])])
    domain = (max(low, 0.0), min(high, 100.0))
    hidden = any(value is not None and value < domain[0] for _, value in train)
    told = f"Lower accuracies of training before step {begin:,} are not drawn." if hidden else ""
    yield Figure(
        "Accuracy beside the dense model",
        f"Top-1 of the dense model is {_percent(dense)}, of the pruned one at the end {_percent(final)}.",
        figures.lines(
            series,
            "top-1 %",
            number=".2f",
            end=run.end,
            domain=domain,
            level=None if dense is None else (dense, "dense model"),
            shaded=run.pruning,
        ),
        figures.keys([one.label for one in series], dashed=[one.label for one in series if one.dashed]),
        note=" ".join(filter(None, ("Dotted: the dense model." if dense is not None else "", told))),
    )


def _losses(run: Run) -> Iterator[Item]:
    names = [name for name in run.figures("train/loss") if any(value is not None for _, value in run.points(name))]
    if not names:
        return
    series = [Series(name.removeprefix("train/"), run.points(name)) for name in names]
    labels = [one.label for one in series]
    ends = ", ".join(f"{one.label} {last(one.points):.4g}" for one in series)
    yield Figure(
        "Training loss",
        f"At the end: {ends}.",
        figures.lines(series, "loss", end=run.end, far=True, shaded=run.pruning),
        figures.keys(labels),
    )


def _course(run: Run) -> Iterator[Item]:
    thresholds = [
        (row["trainer/step"], row["prune/threshold"])
        for row in run.rows
        if row.get("prune/newly_pruned") and "prune/threshold" in row
    ]
    for title, y, found in (
        ("Learning rate", "learning rate", run.points("train/lr")),
        ("Threshold of pruning", "threshold", thresholds),
        ("Gradient norm", "norm", run.points("train/grad_norm")),
    ):
        values = [value for _, value in found if value is not None]
        if values:
            yield Figure(
                title,
                f"{title} from {min(values):.3g} to {max(values):.3g}, at the end {values[-1]:.3g}.",
                figures.lines([Series(y, found)], y, end=run.end, far=y == "norm", shaded=run.pruning),
            )


def last(points: Points) -> float:
    """The last value that is known."""
    return next((value for _, value in reversed(points) if value is not None), math.nan)


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f} %"
