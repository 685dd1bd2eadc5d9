"""What is shown of one run, section by section. A section without anything to show is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distprune.report.cells import SMALL_DROP, accuracy, many, plain
from distprune.report.cost import cost, sizes_of
from distprune.report.course import channels, rounds, training
from distprune.report.gather import Run
from distprune.report.layers import layers
from distprune.report.parts import RunPage, Section, Tile
from distprune.report.sets import evaluation_sets
from distprune.units import in_bytes


def run_page(run: Run) -> RunPage:
    """All of one run."""
    sections = [
        Section("Training", list(training(run))),
        Section("Rounds", list(rounds(run))),
        Section("Channels", list(channels(run))),
        Section("Layers", list(layers(run))),
        Section("Size and speed", list(cost(run))),
        Section("Evaluation sets", list(evaluation_sets(run))),
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
        how = "is without" if removed else "would be, if channels that are zero were taken out, without"
        what = (
            f"The model {how} {gone:.1%} of its multiply-accumulates and {_params_gone(summary):.1%} of its parameters"
        )
    else:
        what = f"{summary['prune/sparsity']:.2%} of the {summary['prune/weights']:,} prunable weights are zero"
    is_plain = run.config["prune"]["pattern"] is None
    hint = " Zeros alone do not make dense kernels faster." if is_plain else ""
    return f"{what}, and {cost}.{hint}"


def _params_gone(summary: dict[str, Any]) -> float:
    left = summary["params/total"] if summary["params/total"] < summary["params/dense"] else summary["params/nonzero"]
    return 1 - float(left) / float(summary["params/dense"])


def _tiles(run: Run) -> Iterator[Tile]:
    summary = run.summary
    drop, dense = summary.get("eval/top1_drop"), summary.get("dense/top1")
    told = "" if drop is None else f"dense {accuracy(dense, None)}, {plain(-drop):+.2f} points"
    yield Tile("Top-1", accuracy(summary.get("eval/top1"), None), told)
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
    sizes = sizes_of(run)
    if "dense" in sizes:
        form = min(sizes, key=lambda name: sizes[name])
        smaller = sizes[form] < sizes["dense"]
        now = f"{in_bytes(sizes['dense'])} → {in_bytes(sizes[form])}" if smaller else in_bytes(sizes["dense"])
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
