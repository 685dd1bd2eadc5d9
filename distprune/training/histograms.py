"""Histograms of the weights of each pruned layer, before the first update of the masks and as these change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from distprune.pruning import MaskHolder, Prunable
from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import at_once, chunks, flat
from distprune.pruning.threshold import share
from distprune.structured import ChannelPruner
from distprune.tracking import BINS, Histogram, Trackers

TINY = 1e-30
"""A layer whose weights are all smaller is counted as one of zeros."""


class Histograms:
    """Counts weights over all ranks and hands the counts to trackers. Every method runs on all ranks.

    Lines that are there already say where the bins of each layer end and what was counted last, so that a run that goes
    on counts as one that was never stopped.

    Args:
        pruner: holds the masks, and so the weights.
        trackers: take the counts.
        every: optimizer steps that lie between two updates of which there are histograms, at least; None for none.
        there: what was counted by earlier starts, on rank 0: (step, layers), in order.
    """

    def __init__(
        self,
        pruner: MaskHolder,
        trackers: Trackers,
        every: int | None,
        there: Callable[[], Sequence[tuple[int, Mapping[str, Histogram]]]],
    ) -> None:
        self._pruner = pruner
        self._trackers = trackers
        self._every = every
        self._there = there
        self._ranks = Ranks()
        self._limits: dict[str, float] = {}
        self._steps: list[int] | None = None

    def before(self, step: int) -> None:
        """Count the dense model, where that was not done, before its first weight is pruned."""
        if self._every is not None and not self._known():
            self._take(step)

    def after(self, step: int, newly_pruned: int) -> None:
        """Count after an update of the masks, if it is time."""
        if self._every is None or not (steps := self._known()):
            return
        first = len(steps) == 1
        if newly_pruned > 0 if first and step == steps[0] else first or step - steps[-1] >= self._every:
            self._take(step)

    def at_end(self, step: int, changed: bool) -> None:
        """Count the final model; one of which there is a histogram already only if it has `changed` at this step."""
        if self._every is not None and (steps := self._known()) and (changed or step != steps[-1]):
            self._take(step)

    def _known(self) -> list[int]:
        """The steps of the histograms that are there; every rank learns of those of earlier starts from rank 0."""
        if self._steps is None:
            there = self._there() if self._ranks.rank == 0 else []
            limits = {name: layer.limit for _, layers in there[:1] for name, layer in layers.items()}
            self._limits, self._steps = broadcast_object_list([limits, [step for step, _ in there]])
        return self._steps

    def _take(self, step: int) -> None:
        tensors = self._pruner.tensors
        if isinstance(self._pruner, ChannelPruner):  # whose channels have biases and norms too
            tensors = tuple(tensor for tensor in tensors if tensor.weight.dim() > 1)
        if not self._limits:
            limits = largest(tensors, self._ranks)
            if limits.isinf().any():
                return  # the update that follows refuses them, and says which
            self._limits = {t.name: limit for t, limit in zip(tensors, limits.tolist(), strict=True)}
        self._known().append(step)
        self._trackers.log_histograms(step, count(tensors, self._limits, self._ranks))


@torch.no_grad()
def count(tensors: Sequence[Prunable], limits: Mapping[str, float], ranks: Ranks) -> dict[str, Histogram]:
    """Count the weights of each tensor over all ranks, each once; one collective of 65 integers a tensor.

    A weight w falls into bin floor((w / limit + 1) * 32), rounded as its type is (float32 at least), and what lies
    outside into the outermost bins.

    Args:
        tensors: in the same order on every rank.
        limits: by name, where the bins of a tensor end.
        ranks: who counts.
    """
    device = tensors[0].weight.device
    table = torch.zeros(len(tensors), BINS + 1, dtype=torch.int64, device=device)
    for number, start, stop in share(tensors):
        scale = BINS / 2 / max(limits[tensors[number].name], TINY)
        weights = flat(tensors[number].local)
        for begin, end in chunks(start, stop, at_once(device)):
            piece = weights[begin:end]
            places = piece.to(torch.promote_types(piece.dtype, torch.float32)) * scale
            places = places.add_(BINS / 2).clamp_(0, BINS - 1).nan_to_num_(0)
            table[number, :BINS] += torch.bincount(places.int(), minlength=BINS)
            table[number, BINS] += len(piece) - torch.count_nonzero(piece)
    table[:, BINS // 2] -= table[:, BINS]
    rows = ranks.sum(table).tolist()
    return {t.name: Histogram(limits[t.name], row[:BINS], row[BINS]) for t, row in zip(tensors, rows, strict=True)}


@torch.no_grad()
def largest(tensors: Sequence[Prunable], ranks: Ranks) -> Tensor:
    """The largest magnitude of each tensor (float64, 1-D), inf where one is NaN or infinite; one collective."""
    found = torch.zeros(len(tensors), dtype=torch.float64, device=tensors[0].weight.device)
    for number, start, stop in share(tensors):
        low, high = flat(tensors[number].local)[start:stop].aminmax()
        found[number] = torch.maximum(-low, high).nan_to_num(torch.inf, torch.inf)
    return ranks.max(found)
