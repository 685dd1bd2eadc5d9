"""Weights before and after pruning: histograms, and kernels as small images."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distprune.structured.shrink import kept_of_layout

BINS = 64
SHOWN_LAYERS = 24
SHOWN_FILTERS = 8
SHOWN_CHANNELS = 3
NEGATIVE, NEUTRAL, POSITIVE = ((33, 102, 172), (247, 247, 247), (178, 24, 43))


@dataclass(frozen=True)
class Counts:
    """Of one layer: `zeros`, and the other weights counted in equal bins over [-limit, limit]."""

    limit: float
    counts: list[int]
    zeros: int


@dataclass(frozen=True)
class Histogram:
    """Of one layer, before the first weight was pruned and at the end."""

    before: Counts
    after: Counts


@dataclass(frozen=True)
class Kernel:
    """One filter of a convolution, before and after.

    Attributes:
        layer: whose filter it is.
        index: of the filter in the dense model.
        before, after: a PNG image for each input channel as a data URI, transparent where a weight is zero.
        weights: in these images.
        zeros: in those after.
        removed: whether the filter is gone from the model.
    """

    layer: str
    index: int
    before: list[str]
    after: list[str]
    weights: int
    zeros: int
    removed: bool


def logged_histograms(path: Path) -> dict[str, Histogram]:
    """From histograms.jsonl, its first line and its last; nothing where there is none."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        return {}
    first, last = (json.loads(lines[place])["layers"] for place in (0, -1))
    names = _some([name for name in first if name in last], SHOWN_LAYERS)
    return {name: Histogram(Counts(**first[name]), Counts(**last[name])) for name in names}


def counted_histograms(dense: Path, pruned: Path, layers: Sequence[str]) -> dict[str, Histogram]:
    """Counted in two files of weights, for parameters or modules named `layers`; for some where they are many."""
    found = {}
    with safe_open(dense, "pt") as before, safe_open(pruned, "pt") as after:
        names = set(before.keys()) & set(after.keys())
        tensors = {layer: name for layer in layers for name in (layer, f"{layer}.weight") if name in names}
        for layer in _some(list(tensors), SHOWN_LAYERS):
            old, new = (file.get_tensor(tensors[layer]).double() for file in (before, after))
            limit = float(old.abs().max())
            if limit > 0:
                gone = old.numel() - new.numel()
                found[layer] = Histogram(_counted(old, limit, 0), _counted(new, limit, gone))
    return found


def first_kernels(dense: Path, pruned: Path, layers: Sequence[str], input_channels: int) -> list[Kernel]:
    """Some filters of the first convolution in two files of weights.

    Args:
        dense, pruned: safetensors files.
        layers: that are pruned, in the order of the model where they are parameters.
        input_channels: of the model; the first convolution is one that takes as many, where there is any.
    """
    with safe_open(dense, "pt") as before, safe_open(pruned, "pt") as after:
        convolutions = {
            name: shape[1]
            for name in before.keys()  # noqa: SIM118, it is no mapping
            if len(shape := before.get_slice(name).get_shape()) == 4 and shape[2] * shape[3] > 1
        }
        ordered = sorted(convolutions, key=lambda name: (_place(name, layers), _natural(name)))
        first = next((name for name in ordered if convolutions[name] == input_channels), next(iter(ordered), None))
        if first is None or first not in after.keys():  # noqa: SIM118
            return []
        old, now = before.get_tensor(first).float(), after.get_tensor(first).float()
        about = (after.metadata() or {}).get("channels")
    filters = torch.arange(len(old))
    new = now
    if about is not None:
        kept = kept_of_layout(json.loads(about)).get(first, {})
        filters = kept.get(0, filters)
        place = torch.cartesian_prod(filters, kept.get(1, torch.arange(old.shape[1]))).T
        new = torch.zeros_like(old)
        new[place[0], place[1]] = now.flatten(0, 1)
    shown = old[:, :SHOWN_CHANNELS], new[:, :SHOWN_CHANNELS]
    scale, left = float(torch.stack(shown).abs().max()) or 1.0, set(filters.tolist())
    return [
        Kernel(
            layer=first,
            index=index,
            before=[_png(channel, scale) for channel in shown[0][index]],
            after=[_png(channel, scale) for channel in shown[1][index]],
            weights=shown[1][index].numel(),
            zeros=int((shown[1][index] == 0).sum()),
            removed=index not in left,
        )
        for index in _some(range(len(old)), SHOWN_FILTERS)
    ]


def _counted(weights: Tensor, limit: float, gone: int) -> Counts:
    nonzero = weights[weights != 0].clamp(-limit, limit)
    counts = torch.histc(nonzero, BINS, -limit, limit).long().tolist()
    return Counts(limit, counts, weights.numel() - nonzero.numel() + gone)


def _some(items: Sequence[Any], most: int) -> list[Any]:
    """All, or so many of them at equal distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _place(name: str, layers: Sequence[str]) -> int:
    with suppress(ValueError):
        return layers.index(name)
    return len(layers)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer2 before layer10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name) if part]


def _png(kernel: Tensor, scale: float) -> str:
    """A pixel for each weight: blue below zero, red above, transparent at zero."""
    from PIL import Image

    share = (kernel / scale).clamp(-1, 1).unsqueeze(-1)
    ends = torch.where(share < 0, torch.tensor(NEGATIVE), torch.tensor(POSITIVE))
    colours = torch.tensor(NEUTRAL) + share.abs() * (ends - torch.tensor(NEUTRAL))
    pixels = torch.cat([colours, 255.0 * (kernel != 0).unsqueeze(-1)], dim=-1).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
