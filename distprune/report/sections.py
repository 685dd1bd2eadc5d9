"""What is shown of one run, section by section. A section without anything to show is left out."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import Any

from distprune.report import figures
from distprune.report.cells import accuracy, column, difference, many, number, percent, points, size, text
from distprune.report.figures import Series
from distprune.report.gather import Points, Run
from distprune.report.parts import Cell, Column, Figure, Item, Kernels, RunPage, Section, Table, Tile, Words
from distprune.report.weights import SHOWN_FILTERS, Histogram

LAYER = "prune/layer/"
WORST = 20
KINDS = ("noise", "blur", "brightness", "contrast", "jpeg")
STRENGTHS = (1, 2, 3)
SMALL_DROP = 0.1
SHADED = "Shaded: the steps in which something was pruned."


def run_page(run: Run) -> RunPage:
    """All of one run."""
    sections = [
        Section("Training", [*_sparsity(run), *_accuracy(run), *_losses(run), *_course(run)]),
        Section("Rounds", list(_rounds(run))),
        Section("Channels", list(_channels(run))),
        Section("Layers", [*_heat_map(run), *_layers(run), *_histograms(run), *_kernels(run)]),
        Section("Size and speed", list(_cost(run))),
        Section("Evaluation sets", list(_validation(run))),
    ]
    return RunPage(
        name=run.name,
        verdict=verdict(run),
        tiles=list(_tiles(run)),
        sections=[section for section in sections if section.items],
        config=run.config_text,
        versions=run.summary.get("versions", {}),
    )


def verdict(run: Run) -> str:
    """What came of it, in a sentence or two."""
    summary = run.summary
    drop = summary.get("eval/top1_drop")
    if drop is None:
        cost = "its accuracy is not known"
    elif abs(drop) < SMALL_DROP:
        cost = f"accuracy stayed where it was ({accuracy(summary['eval/top1'], summary['dense/top1'])})"
    else:
        word = "fell" if drop > 0 else "rose"
        cost = f"accuracy {word} by {abs(drop):.2f} points ({accuracy(summary['eval/top1'], summary['dense/top1'])})"
    if run.has_channels:
        gone = 1 - summary["macs/left"] / summary["macs/dense"]
        removed = summary["params/total"] < summary["params/dense"]
        how = "without" if removed else "if channels that are zero were removed, without"
        what = f"The model runs {how} {gone:.1%} of its multiply-accumulates and {_params_gone(summary):.1%} of its parameters"
    else:
        what = f"{summary['prune/sparsity']:.2%} of the {summary['prune/weights']:,} prunable weights are zero"
    words = (run.analysis or {}).get("words") or []
    hint = "" if words or run.has_channels else " Zeros alone do not make dense kernels faster."
    return f"{what}, and {cost}.{hint} {' '.join(words)}".strip()


def _params_gone(summary: dict[str, Any]) -> float:
    left = summary["params/total"] if summary["params/total"] < summary["params/dense"] else summary["params/nonzero"]
    return 1 - float(left) / float(summary["params/dense"])


def _tiles(run: Run) -> Iterator[Tile]:
    summary = run.summary
    drop = summary.get("eval/top1_drop")
    yield Tile(
        "Accuracy, dense → pruned",
        accuracy(summary.get("eval/top1"), summary.get("dense/top1")),
        "" if drop is None else f"{-drop:+.2f} points",
    )
    if (perplexity := summary.get("eval/perplexity")) is not None:
        yield Tile("Perplexity", f"{perplexity:,.4g}", "pruned")
    if run.has_channels:
        yield _left("Multiply-accumulates", summary["macs/dense"], summary["macs/left"])
        yield _left("Parameters", summary["params/dense"], summary["params/total"])
    else:
        yield Tile(
            "Sparsity",
            f"{summary['prune/sparsity']:.2%}",
            f"{summary['prune/zeros']:,} of {summary['prune/weights']:,} prunable weights",
        )
        yield _left("Parameters, nonzero", summary["params/total"], summary["params/nonzero"])
    sizes = _sizes(run)
    if "dense" in sizes:
        form = min(sizes, key=lambda name: sizes[name])
        smaller = sizes[form] < sizes["dense"]
        now = f"{size(sizes['dense'])} → {size(sizes[form])}" if smaller else size(sizes["dense"])
        yield Tile("Size on disk", now, form if smaller else "zeros are stored as any weight is")
    ranks = summary["world_size"]
    yield Tile(
        "Trained",
        f"{summary['steps']:,} steps",
        f"in {_time(summary['wall_s'])} on {ranks} process{'es' if ranks > 1 else ''}",
    )


def _left(label: str, dense: float, left: float) -> Tile:
    return Tile(label, f"{many(dense)} → {many(left)}", f"{left / dense:.1%} left")


def _time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def _sparsity(run: Run) -> Iterator[Item]:
    asked, reached = run.points("prune/target_sparsity"), run.points("prune/sparsity")
    if not reached:
        return
    series = [Series("asked", asked, dashed=True, stepped=True), Series("reached", reached, dots=len(reached) < 60)]
    yield Figure(
        "Sparsity asked and reached",
        f"Sparsity reached {_last(reached):.2%} at step {reached[-1][0]:,}, where {_last(asked):.2%} was asked.",
        figures.lines(series, "sparsity", number=".0%", domain=(0, 1), shaded=run.pruning),
        figures.keys(["asked", "reached"], dashed=["asked"]),
    )


def _last(points: Points) -> float:
    return next((value for _, value in reversed(points) if value is not None), math.nan)


def _accuracy(run: Run) -> Iterator[Item]:
    train, held_out = run.points("train/top1"), run.points("eval/top1")
    sets = [name for name in run.figures("eval/") if name.count("/") > 1 and name.endswith("/top1")][:5]
    series = [
        Series("evaluation", held_out, dots=True),
        Series("training batches", train),
        *(Series(name.split("/", 1)[1].removesuffix("/top1"), run.points(name), dots=True, dashed=True) for name in sets),
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
            domain=domain,
            level=None if dense is None else (dense, "dense model"),
            shaded=run.pruning,
        ),
        figures.keys([one.label for one in series], dashed=[one.label for one in series if one.dashed]),
        note=" ".join(filter(None, ("Dotted: the dense model." if dense is not None else "", told))),
    )


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2f} %"


def _losses(run: Run) -> Iterator[Item]:
    names = [name for name in run.figures("train/loss") if any(value is not None for _, value in run.points(name))]
    if not names:
        return
    series = [Series(name.removeprefix("train/"), run.points(name)) for name in names]
    labels = [one.label for one in series]
    ends = ", ".join(f"{one.label} {_last(one.points):.4g}" for one in series)
    yield Figure(
        "Training loss",
        f"At the end: {ends}.",
        figures.lines(series, "loss", shaded=run.pruning),
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
                figures.lines([Series(y, found)], y, shaded=run.pruning),
            )


def _rounds(run: Run) -> Iterator[Item]:
    rounds: list[dict[str, Any]] = run.summary.get("prune/rounds") or []
    if not rounds:
        return
    accepted, guard = [outcome for outcome in rounds if outcome["accepted"]], run.summary.get("prune/guard")
    best = f"the sparsest that stayed is {max(o['sparsity'] for o in accepted):.2%}" if accepted else "none stayed"
    name = (guard or {}).get("set")
    dense = run.summary.get(f"dense/{name}/top1" if name else "dense/top1")
    bound = "" if guard is None else f" The guard allows {guard['max_drop']:g} points on {name or 'the evaluation split'}."
    yield Figure(
        "Attempts",
        f"{len(rounds)} attempts, {len(rounds) - len(accepted)} rolled back; {best}.",
        figures.attempts(rounds, dense),
        note=f"Hollow: rolled back. Dotted: the dense model.{bound}",
    )
    columns = (Column("attempt"), Column("round"), Column("sparsity"), Column("top-1 %"), Column("drop"), column("what"))
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
            for i, outcome in enumerate(rounds)
        ],
    )


def _channels(run: Run) -> Iterator[Item]:
    if not run.has_channels:
        return
    summary, series = run.summary, []
    for label, figure, dense in (
        ("multiply-accumulates", "macs/left", "macs/dense"),
        ("parameters", "params/left", "params/dense"),
    ):
        whole = summary[dense]
        found = [(step, None if value is None else value / whole) for step, value in run.points(figure)]
        series += [Series(label, found, dots=len(found) < 60)] if found else []
    if series:
        ends = ", ".join(f"{_last(one.points):.1%} of the {one.label}" for one in series)
        yield Figure(
            "What is left of the model",
            f"Left at the end: {ends}.",
            figures.lines(series, "left", number=".0%", domain=(0, 1), shaded=run.pruning),
            figures.keys([one.label for one in series]),
        )
    if shrinks := summary.get("prune/shrinks"):
        yield Table(
            "When channels were removed",
            (Column("step"), Column("parameters"), Column("MACs"), Column("largest difference"), Column("ms a step before")),
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


def _heat_map(run: Run) -> Iterator[Item]:
    layers = {name.removeprefix(LAYER): run.points(name) for name in run.figures(LAYER)}
    if not layers:
        return
    ends = {name: _last(found) for name, found in layers.items()}
    most, least = max(ends, key=lambda name: ends[name]), min(ends, key=lambda name: ends[name])
    yield Figure(
        "Sparsity of each layer over time",
        f"At the end {most} is the sparsest layer with {ends[most]:.2%}, {least} the densest with {ends[least]:.2%}.",
        figures.heat_map(layers),
        scale=("dense", "all zero"),
    )


def _layers(run: Run) -> Iterator[Item]:
    layers, counted = run.summary["prune/layers"], (run.analysis or {}).get("layers") or {}
    has_macs = any(name in counted for name in layers)
    zeros, weights = ("gone", "channels") if run.has_channels else ("zeros", "weights")
    columns = [column("layer"), column("shape"), Column(weights), Column(zeros), Column("sparsity")]
    columns += [Column("MACs"), Column("effective MACs")] if has_macs else []
    rows = []
    for name, layer in layers.items():
        cells = [
            text(name),
            text(" × ".join(map(str, layer["shape"]))),
            number(math.prod(layer["shape"])),
            number(layer["zeros"]),
            number(layer["sparsity"], ".2%", share=layer["sparsity"]),
        ]
        if has_macs:
            cells += [number((counted.get(name) or {}).get(key)) for key in ("macs", "effective_macs")]
        rows.append(tuple(cells))
    yield Table("Layers at the end", tuple(columns), rows)


def _histograms(run: Run) -> Iterator[Item]:
    if not run.histograms:
        if run.bytes_on_disk.get("dense") is None:
            yield Words("No histograms: the dense model was not kept in this folder.")
        return
    total = len(run.summary["prune/layers"])
    shown = f"{len(run.histograms)} of {total} layers. " if len(run.histograms) < total else ""
    yield Words(f"Weights that are not zero, before the first was pruned and at the end. {shown}")
    for name, found in run.histograms.items():
        yield Figure(
            name,
            f"Weights of {name}: {_nonzero(found, 'before')} are not zero before, {_nonzero(found, 'after')} after.",
            figures.histogram(found),
            figures.keys(["before", "after"]),
            note=f"zeros: {found.before.zeros:,} → {found.after.zeros:,}",
            small=True,
        )


def _nonzero(found: Histogram, when: str) -> str:
    return f"{sum(getattr(found, when).counts):,}"


def _kernels(run: Run) -> Iterator[Item]:
    if not run.kernels:
        return
    layer = run.kernels[0].layer
    zeros, weights = (sum(getattr(kernel, key) for kernel in run.kernels) for key in ("zeros", "weights"))
    some = f"{SHOWN_FILTERS} filters" if len(run.kernels) >= SHOWN_FILTERS else "Filters"
    yield Kernels(
        f"{some} of {layer}, before and after",
        f"Of {weights:,} weights in these filters of {layer}, {zeros:,} are zero after pruning.",
        run.kernels,
    )


def _sizes(run: Run) -> dict[str, float]:
    """Bytes by form."""
    measured = (run.analysis or {}).get("sizes") or {}
    exported = {f"export {name}": count for name, (count, _) in run.exports.items()}
    return {name: count for name, count in {**run.bytes_on_disk, **measured, **exported}.items() if count}


def _cost(run: Run) -> Iterator[Item]:
    sizes = _sizes(run)
    if sizes:
        told = ", ".join(f"{name} {size(count)}" for name, count in sizes.items())
        yield Figure(
            "Size on disk",
            f"Size on disk: {told}.",
            figures.bars(
                [{"label": name, "value": count / 1000, "text": size(count)} for name, count in sizes.items()], "kB"
            ),
        )
    if run.analysis is None:
        command = shlex.join(["distprune", "analyze", str(run.path)])
        yield Words("Latency and compressed sizes are measured by", command)
    else:
        yield from _latency(run.analysis)
    if rows := list(_exported(run)):
        columns = (column("export"), Column("size"), Column("of dense"), Column("top-1"))
        yield Table("Exports", columns, rows)


def _latency(analysis: dict[str, Any]) -> Iterator[Item]:
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in analysis["latency"]:
        groups.setdefault((row["device"], row["threads"], row["batch"]), []).append(row)
    machine = analysis["machine"]
    for (device, threads, batch), rows in groups.items():
        known = [row for row in rows if row["median_ms"] is not None]
        if not known:
            continue
        where = machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
        yield Figure(
            f"Latency at batch {batch} on {device}",
            "Median: " + ", ".join(f"{row['form']} {row['median_ms']:.3g} ms" for row in known) + ".",
            figures.bars(
                [
                    {
                        "label": row["form"],
                        "value": row["median_ms"],
                        "low": row["low_ms"],
                        "high": row["high_ms"],
                        "text": f"{row['median_ms']:.3g} ms",
                    }
                    for row in known
                ],
                "ms, median and spread",
            ),
            note=f"{where}; torch {machine['torch']}",
        )


def _exported(run: Run) -> Iterator[tuple[Cell, ...]]:
    dense = _sizes(run).get("dense")
    for name, (count, told) in run.exports.items():
        top1 = next((told[key] for key in ("eval/top1", "top1") if key in told), None)
        yield text(name), Cell(size(count), count), number(count / dense if dense else None, ".1%"), percent(top1)


def _validation(run: Run) -> Iterator[Item]:
    if run.validation is None:
        command = shlex.join(["distprune", "validate", str(run.path)])
        yield Words("Corrupted images, classes, and where dense and pruned disagree are counted by", command)
        return
    sets: dict[str, dict[str, Any]] = run.validation["sets"]
    plain = {name: found for name, found in sets.items() if _corruption(name) is None}
    yield Table(
        "Dense and pruned side by side",
        (
            column("set"),
            Column("samples"),
            Column("dense"),
            Column("pruned"),
            Column("difference"),
            Column("agree"),
            Column("lost"),
            Column("gained"),
        ),
        [
            (
                text(name),
                number(found["samples"]),
                percent(_top1(found, "dense")),
                percent(_top1(found, "pruned")),
                points(difference(_top1(found, "pruned"), _top1(found, "dense"))),
                number(found.get("agree")),
                number(found.get("lost")),
                number(found.get("gained")),
            )
            for name, found in plain.items()
        ],
        note="Lost: the dense model was right and the pruned one is wrong. Gained: the reverse.",
    )
    yield from _corruptions(sets)
    yield from _classes(plain)


def _top1(found: dict[str, Any], form: str) -> float | None:
    return (found.get(form) or {}).get("top1")


def _corruption(name: str) -> tuple[str, int] | None:
    kind, _, strength = name.rpartition("-")
    return (kind, int(strength)) if kind in KINDS and strength.isdigit() and int(strength) in STRENGTHS else None


def _corruptions(sets: dict[str, dict[str, Any]]) -> Iterator[Item]:
    found = {corruption: sets[name] for name in sets if (corruption := _corruption(name)) is not None}
    drops = {key: difference(_top1(one, "dense"), _top1(one, "pruned")) for key, one in found.items()}
    known = [drop for drop in drops.values() if drop is not None]
    if not found:
        return
    largest = max([*known, SMALL_DROP])
    rows = [
        (
            text(kind),
            number(strength),
            percent(_top1(one, "dense")),
            percent(_top1(one, "pruned")),
            points(
                None if (drop := drops[kind, strength]) is None else -drop,
                None if drop is None else max(drop, 0) / largest,
            ),
        )
        for (kind, strength), one in found.items()
    ]
    columns = (column("corruption"), Column("strength"), Column("dense"), Column("pruned"), Column("difference"))
    yield Table("Corrupted images", columns, rows, note="Shaded by what pruning costs on them.")


def _classes(sets: dict[str, dict[str, Any]]) -> Iterator[Item]:
    for name, found in sets.items():
        classes = [
            {**one, "drop": one["dense"] - one["pruned"]}
            for one in found["classes"]
            if one["dense"] is not None and one["pruned"] is not None
        ]
        if not classes:
            continue
        classes.sort(key=lambda one: -one["drop"])
        worst = classes[:WORST]
        of = f"the worst {WORST} of {len(classes)} classes" if len(classes) > WORST else f"{len(classes)} classes"
        yield Figure(
            f"Points lost by class, {name}",
            f"Class {worst[0]['name']} loses most: {worst[0]['drop']:.2f} points.",
            figures.bars(
                [{"label": str(one["name"]), "value": one["drop"], "text": f"{one['drop']:+.2f}"} for one in worst],
                "points lost",
            ),
            note=f"{of[0].upper()}{of[1:]}; a bar to the left is a class that gained.",
        )
        yield Table(
            f"Classes, {name}",
            (column("class"), Column("samples"), Column("dense"), Column("pruned"), Column("difference")),
            [
                (
                    text(one["name"]),
                    number(one["samples"]),
                    percent(one["dense"]),
                    percent(one["pruned"]),
                    points(-one["drop"]),
                )
                for one in worst
            ],
        )
