"""What `distprune analyze` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from distprune.units import in_bytes

WIDE_ONLY = ["10-90 %", "samples/s"]
WIDE = 100
"""Columns of a terminal; on a narrower one tables show less, and the JSON has it all."""


def print_analysis_tables(found: Mapping[str, Any], folder: Path) -> None:
    """Print layers, totals, sizes, latency, and what they come to in words.

    Args:
        found: see `distprune.analysis.analyze.analyze`.
        folder: of the run.
    """
    console = Console(highlight=False)
    wide = console.width >= WIDE
    for table in (_layers(found, wide), _totals(found), _latency(found, wide)):
        console.print(table)
        console.print()
    for sentence in found["words"]:
        console.print(sentence, markup=False)
    console.print(f"\nFigures: {folder / 'analysis.json'}", soft_wrap=True, markup=False)


def _layers(found: Mapping[str, Any], wide: bool) -> Table:
    table = _table("Layers", "layer", *["shape"] * wide, "weights", "zeros", "MACs", *["effective"] * wide)
    for name, layer in found["layers"].items():
        share = layer["zeros"] / layer["weights"] if layer["weights"] else 0.0
        table.add_row(
            name or "(the model)",
            *[" x ".join(map(str, layer["shape"]))] * wide,
            f"{layer['weights']:,}",
            f"{100 * share:.1f} %",
            f"{layer['macs']:,}",
            *[f"{layer['effective_macs']:,}"] * wide,
        )
    return table


def _totals(found: Mapping[str, Any]) -> Table:
    table = _table("In all", "", "dense", "pruned", "left")
    dense, pruned = found["totals"]["dense"], found["totals"]["pruned"]
    for label, key in (
        ("parameters", "parameters"),
        ("not zero", "nonzero"),
        ("MACs", "macs"),
        ("effective MACs", "effective_macs"),
    ):
        table.add_row(label, f"{dense[key]:,}", f"{pruned[key]:,}", f"{100 * pruned[key] / max(1, dense[key]):.1f} %")
    sizes = found["sizes"]
    for label, key in (("file, bytes", "pruned"), ("zipped", "pruned zipped"), ("packed", "packed")):
        share = f"{100 * sizes[key] / sizes['dense']:.1f} %" if "dense" in sizes else ""
        table.add_row(label, f"{sizes['dense']:,}" if "dense" in sizes else "", f"{sizes[key]:,}", share)
    return table


def _latency(found: Mapping[str, Any], wide: bool) -> Table:
    threads = found["machine"]["threads"]
    where = f"{found['machine']['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    if found["machine"]["gpu"] is not None:
        where += f"; {found['machine']['gpu']}"
    table = _table(f"Latency ({where})", "form", "ms", *WIDE_ONLY * wide, "dense/this", "same way", *["memory"] * wide)
    for device, batch in dict.fromkeys((timing["device"], timing["batch"]) for timing in found["latency"]):
        table.add_section()
        table.add_row(f"[bold]{device}, batch {batch}")
        for timing in found["latency"]:
            if (timing["device"], timing["batch"]) == (device, batch):
                peak = timing["peak_bytes"]
                table.add_row(
                    timing["form"],
                    f"{timing['median_ms']:.2f}",
                    *[f"{timing['low_ms']:.2f}-{timing['high_ms']:.2f}", f"{timing['samples_per_s']:,.0f}"] * wide,
                    *(_ratio(timing, key, wide) for key in ("speedup", "gain")),
                    *["" if peak is None else in_bytes(peak)] * wide,
                )
    return table


def _ratio(timing: Mapping[str, Any], key: str, wide: bool) -> str:
    if timing[key] is None:
        return ""
    return f"{timing[key]:.2f}" + f" ({timing[f'{key}_low']:.2f}-{timing[f'{key}_high']:.2f})" * wide


def _table(title: str, *columns: str) -> Table:
    texts = {"", "layer", "shape", "form"}
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(
            column, justify="left" if column in texts else "right", overflow="fold", no_wrap=column == "form"
        )
    return table
