"""Figures as tables on the terminal."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: Mapping[str, Any], folder: Path, report: Path | None = None) -> None:
    """Print what a person wants to know at the end of a run: accuracy, sparsity by layer, what to do next.

    Args:
        summary: of the run.
        folder: of the run.
        report: its page, if it was written.
    """
    console = Console(highlight=False, soft_wrap=False, markup=False)
    layers = Table(title="Pruned layers", title_justify="left")
    channels = "prune/budget" in summary
    for column, justify in (
        ("layer", "left"),
        *(() if channels else (("shape", "left"),)),
        ("gone" if channels else "zeros", "right"),
        ("channels" if channels else "weights", "right"),
        ("sparsity", "right"),
    ):
        layers.add_column(column, justify=justify, overflow="fold")
    for name, layer in summary["prune/layers"].items():
        weights = math.prod(layer["shape"])
        shape = () if channels else (_shape(layer["shape"]),)
        layers.add_row(name, *shape, f"{layer['zeros']:,}", f"{weights:,}", f"{layer['sparsity']:.4f}")
    console.print(layers)
    sets = (
        (f"accuracy on {name}", _accuracy(summary[f"eval/{name}/top1"], summary[key]))
        for key in summary
        if key.startswith("dense/") and (name := key.removeprefix("dense/").removesuffix("/top1")) != "top1"
    )
    figures = (
        ("dense accuracy", f"{summary['dense/top1']:.2f} %"),
        ("final accuracy", _accuracy(summary["eval/top1"], summary["dense/top1"])),
        *sets,
        *_rounds(summary),
        *(_channels(summary) if channels else _weights(summary)),
        ("took", f"{summary['steps']:,} steps in {summary['wall_s']:.0f} s on {_ranks(summary['world_size'])}"),
        ("run folder", str(folder)),
        *(() if report is None else (("report", str(report)),)),
    )
    width = max(len(label) for label, _ in figures)
    for label, value in figures:
        console.print(f"{label:<{width}}  {value}", soft_wrap=True)
    console.print("\nNext:", highlight=False)
    shown, removed = shlex.quote(str(folder)), summary.get("params/dense", 0) > summary["params/total"]
    form = "onnx" if removed else "shrunk" if "macs/left" in summary else "packed"
    for command in (f"analyze {shown}", f"export {shown} --format {form}", f"report {shown} OTHER_RUN_DIR"):
        console.print(f"  distprune {command}", soft_wrap=True, markup=False)
    what = "the weights" if removed else "the weights, zeros in place,"
    console.print(f"  {what} are {folder / 'model.safetensors'}", soft_wrap=True, markup=False)


def _accuracy(now: float, dense: float) -> str:
    return f"{now:.2f} %  ({now - dense:+.2f} points)"


def _weights(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "sparsity",
        f"{summary['prune/sparsity']:.6f}  ({summary['prune/zeros']:,} of {summary['prune/weights']:,} are zero)",
    )
    yield "parameters left", f"{summary['params/nonzero']:,} of {summary['params/total']:,}"


def _channels(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "sparsity", f"{summary['prune/sparsity']:.6f} of the {summary['prune/budget']}"
    for label, left, dense in (("parameters", "params/total", "params/dense"), ("MACs", "macs/left", "macs/dense")):
        share = summary[left] / summary[dense]
        yield f"{label} left", f"{summary[left]:,} of {summary[dense]:,}  ({100 * share:.1f} %)"


def _rounds(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rounds = summary.get("prune/rounds")
    if rounds is None:
        return
    accepted = sum(outcome["accepted"] for outcome in rounds)
    guard = summary.get("prune/guard")
    if guard is None:
        yield "rounds", f"{accepted}"
    else:
        yield (
            "rounds",
            f"{accepted} within {guard['max_drop']:g} points on {guard['set'] or 'the evaluation split'}, "
            f"{len(rounds) - accepted} rolled back",
        )


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _ranks(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
