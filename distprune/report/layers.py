"""The layers of a run: their sparsity, and their weights before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator

from distprune.report import figures
from distprune.report.cells import column, number, text
from distprune.report.course import last
from distprune.report.gather import Run
from distprune.report.parts import Column, Figure, Item, Kernels, Table, Words
from distprune.report.weights import SHOWN_FILTERS, Histogram

LAYER = "prune/layer/"


def layers(run: Run) -> Iterator[Item]:
    """A heat map, a table, histograms and kernels."""
    yield from _heat_map(run)
    yield from _table(run)
    yield from _histograms(run)
    yield from _kernels(run)


def _heat_map(run: Run) -> Iterator[Item]:
    layers = {name.removeprefix(LAYER): run.points(name) for name in run.figures(LAYER)}
    if not layers:
        return
    ends = {name: last(found) for name, found in layers.items()}
    most, least = max(ends, key=lambda name: ends[name]), min(ends, key=lambda name: ends[name])
    yield Figure(
        "Sparsity of each layer over time",
        f"At the end {most} is the sparsest layer with {ends[most]:.2%}, {least} the densest with {ends[least]:.2%}.",
        figures.heat_map(layers),
        scale=("dense", "all zero"),
        wide=True,
    )


def _table(run: Run) -> Iterator[Item]:
    layers, counted = run.summary["prune/layers"], (run.analysis or {}).get("layers") or {}
    counted = {name: counted.get(name) or counted.get(name.removesuffix(".weight")) or {} for name in layers}
    has_macs = any(counted.values())
    zeros, weights = ("gone", "channels") if run.has_channels else ("zeros", "weights")
    columns = [column("layer"), column("shape"), Column(weights), Column(zeros), Column("sparsity")]
    columns += [Column("MACs"), Column("effective MACs")] if has_macs else []
    rows = []
    for name, layer in layers.items():
        cells = [
            text(name),
            text("\u00a0x\u00a0".join(map(str, layer["shape"]))),
            number(math.prod(layer["shape"])),
            number(layer["zeros"]),
            number(layer["sparsity"], ".2%", share=layer["sparsity"]),
        ]
        if has_macs:
            cells += [number(counted[name].get(key)) for key in ("macs", "effective_macs")]
        rows.append(tuple(cells))
    yield Table("Layers at the end", tuple(columns), rows)


def _histograms(run: Run) -> Iterator[Item]:
    if not run.histograms:
        if run.bytes_on_disk.get("dense") is None:
            yield Words("No histograms: the dense model was not kept in this folder.")
        return
    total = len(run.summary["prune/layers"])
    shown = f"{len(run.histograms)} of {total} layers. " if len(run.histograms) < total else ""
    told = (
        f"{shown}Weights that are not zero, before the first was pruned and at the end; counts on a square-root scale."
    )
    yield Words(told, keys=figures.keys(["before", "after"]))
    for name, found in run.histograms.items():
        yield Figure(
            name,
            f"Weights of {name}: {_nonzero(found, 'before')} are not zero before, {_nonzero(found, 'after')} after.",
            figures.histogram(found),
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
