"""What a run's model costs: bytes, time, exports."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from distprune.report import figures
from distprune.report.cells import column, number, percent, text
from distprune.report.gather import Run
from distprune.report.parts import Cell, Column, Figure, Item, Table, Words
from distprune.units import in_bytes


def sizes_of(run: Run) -> dict[str, float]:
    """Bytes of the weights on disk, by form."""
    measured = (run.analysis or {}).get("sizes") or {}
    exported = {f"export {name}": count for name, (count, _) in run.exports.items()}
    return {name: count for name, count in {**run.bytes_on_disk, **measured, **exported}.items() if count}


def cost(run: Run) -> Iterator[Item]:
    """What it comes to in words, sizes, latencies where they were measured, and exports."""
    for sentence in (run.analysis or {}).get("words") or ():
        yield Words(sentence)
    sizes = sizes_of(run)
    if sizes:
        told = ", ".join(f"{name} {in_bytes(count)}" for name, count in sizes.items())
        yield Figure(
            "Size on disk",
            f"Size on disk: {told}.",
            figures.bars(
                [{"label": name, "value": count / 1000, "text": in_bytes(count)} for name, count in sizes.items()], "kB"
            ),
        )
    if run.analysis is None:
        command = shlex.join(["distprune", "analyze", str(run.path)])
        yield Words("Latency and compressed sizes are measured by", command)
    else:
        yield from _latency(run.analysis)
        timed = {row["form"] for row in run.analysis["latency"]}
        if later := [name for name in run.exports if name.startswith(("onnx", "torch-export")) and name not in timed]:
            command = shlex.join(["distprune", "analyze", str(run.path)])
            yield Words(f"Not timed yet, since it was exported after that: {', '.join(later)};", command)
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
        where = (
            machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
        )
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
    dense = sizes_of(run).get("dense")
    for name, (count, told) in run.exports.items():
        share = number(count / dense if dense else None, ".1%")
        yield text(name), Cell(in_bytes(count), count), share, percent(told.get("top1"))
