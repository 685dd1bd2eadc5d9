"""Figures as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Print what a person wants to know at the end of a run: accuracy, sparsity by layer, what to do next."""
    console = Console(highlight=False, soft_wrap=False)
    layers = Table(title="Pruned layers", title_justify="left")
    for column, justify in (
        ("layer", "left"),
        ("shape", "left"),
        ("zeros", "right"),
        ("weights", "right"),
        ("sparsity", "right"),
    ):
        layers.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name, layer in summary["prune/layers"].items():
        weights = math.prod(layer["shape"])
        layers.add_row(name, _shape(layer["shape"]), f"{layer['zeros']:,}", f"{weights:,}", f"{layer['sparsity']:.4f}")
    console.print(layers)
    figures = Table.grid(padding=(0, 2))
    sets = (
        (f"accuracy on {name}", _accuracy(summary[f"eval/{name}/top1"], summary[key]))
        for key in summary
        if key.startswith("dense/") and (name := key.removeprefix("dense/").removesuffix("/top1")) != "top1"
    )
    for label, value in (
        ("dense accuracy", f"{summary['dense/top1']:.2f} %"),
        ("final accuracy", _accuracy(summary["eval/top1"], summary["dense/top1"])),
        *sets,
        *_rounds(summary),
        (
            "sparsity",
            f"{summary['prune/sparsity']:.6f}  ({summary['prune/zeros']:,} of {summary['prune/weights']:,} are zero)",
        ),
        ("parameters left", f"{summary['params/nonzero']:,} of {summary['params/total']:,}"),
        ("took", f"{summary['steps']:,} steps in {summary['wall_s']:.0f} s on {_ranks(summary['world_size'])}"),
        ("run folder", str(folder)),
    ):
        figures.add_row(label, value)
    console.print(figures)
    console.print("\nNext:", highlight=False)
    console.print(f"  distprune evaluate {folder}", soft_wrap=True, markup=False)
    console.print(f"  the weights, zeros in place, are {folder / 'model.safetensors'}", soft_wrap=True, markup=False)


def _accuracy(now: float, dense: float) -> str:
    return f"{now:.2f} %  ({now - dense:+.2f} points)"


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
