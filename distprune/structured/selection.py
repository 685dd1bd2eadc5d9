"""What units are worth, and which go: alike on every rank, to the bit, whatever ranks hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from distprune.pruning.collectives import Ranks
from distprune.pruning.exact import factors
from distprune.pruning.prunable import Prunable
from distprune.pruning.scorer import Scorer
from distprune.pruning.shards import flat
from distprune.pruning.threshold import NonFiniteError
from distprune.structured.channels import Channels

Norm = Literal["l1", "l2"]


def unit_scores(
    scorer: Scorer, parts: Sequence[tuple[Prunable, int, Tensor]], units: int, norm: Norm, ranks: Ranks
) -> list[int]:
    """The summed scores of all that says what a unit is worth, as multiples of one number (ints, one for each).

    Sums of floats depend on their order, and so on how tensors are cut. These are sums of integers: of the scores as
    multiples of a power of two, chosen so that no sum overflows. Each part of a tensor is counted by one of the ranks
    that hold it.

    Args:
        scorer: of the model. Magnitudes count as they are (l1) or squared (l2).
        parts: tensors, dimensions, and the unit of each index on this rank; see `ChannelPruner.scored_parts`.
        units: how many there are.
        norm: of magnitudes.
        ranks: who prunes together.

    Raises:
        NonFiniteError: a score is NaN or infinite, on any rank.
    """
    tensors = {tensor.name: tensor for tensor, _, _ in parts}
    device = next(iter(tensors.values())).local.device
    mine = {
        name for place, (name, tensor) in enumerate(tensors.items()) if tensor.part.copy == place % tensor.part.copies
    }
    extremes = torch.zeros(len(tensors) + 1, dtype=torch.float64, device=device)  # the last is the largest score
    for place, (name, tensor) in enumerate(tensors.items()):
        if name in mine and tensor.local.numel():
            values = _values(scorer, tensor, norm)
            extremes[place] = (~values.isfinite()).any()
            extremes[-1] = torch.maximum(extremes[-1], values.abs().nan_to_num().max())
    *bad, _ = ranks.max(extremes).tolist()
    if names := [name for name, flag in zip(tensors, bad, strict=True) if flag]:
        raise NonFiniteError(f"in {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    (scale,) = factors(extremes[-1:], [sum(tensor.numel for tensor, _, _ in parts)])
    sums = torch.zeros(units + 1, dtype=torch.int64, device=device)  # the last is of what belongs to no unit
    for tensor, dim, owner in parts:
        if tensor.name in mine:
            counts = (_values(scorer, tensor, norm) * scale).round_().long()
            sums.index_add_(0, owner % len(sums), along(counts, dim))
    return ranks.sum(sums)[:-1].tolist()


def along(values: Tensor, dim: int) -> Tensor:
    """The sum of `values` over all dimensions but one (1-D)."""
    return values.movedim(dim, 0).flatten(1).sum(1) if values.dim() > 1 else values


def _values(scorer: Scorer, tensor: Prunable, norm: Norm) -> Tensor:
    """What each weight of this rank's part adds to the worth of its units (float64, shaped as it)."""
    local = tensor.local
    values = torch.empty_like(local, dtype=torch.float64)
    scores = scorer.scores(tensor, 0, local.numel()).double()
    flat(values).copy_(scores.square() if scorer.is_magnitude and norm == "l2" else scores)
    return values


def rank_units(
    channels: Channels, scores: Sequence[int], kept: Tensor, compare: Literal["global", "uniform"]
) -> Tensor:
    """The kept units in the order in which they go (int64, 1-D).

    Args:
        channels: of the model.
        scores: of all units.
        kept: which have not gone yet.
        compare: global divides scores by the mean size of those of their group that are left, and sorts all; uniform
            takes the same share of every group.
    """
    keys: list[tuple[float, int]] = []
    for group in channels.groups:
        left = [unit for unit in range(group.begin, group.begin + group.size) if kept[unit]]
        if compare == "global":
            mean = mean_size(scores, left)
            keys += [(scores[unit] / mean, -unit) for unit in left]
        else:
            # Of equal ones the later goes first, as everywhere.
            order = sorted(left, key=lambda unit: (scores[unit], -unit))
            gone = group.size - len(left)
            keys += [((gone + place + 0.5) / group.size, -unit) for place, unit in enumerate(order)]
    return torch.tensor([-unit for _, unit in sorted(keys)], dtype=torch.int64)


def mean_size(scores: Sequence[int], units: Sequence[int]) -> float:
    """The mean of absolute scores, of those that may be negative too; 1.0 where all are 0."""
    return sum(abs(scores[unit]) for unit in units) / len(units) or 1.0


class Limits:
    """How few units each group may be left with, and by which steps.

    Args:
        channels: of the model.
        least: channels that stay in every group that has more.
        multiple: what is left is a multiple of so many channels, or all of the group.
        most: by group, the largest share of units that may go.
    """

    def __init__(self, channels: Channels, least: int, multiple: int, most: Mapping[str, float]) -> None:
        self._channels = channels
        self._steps: list[int] = []
        self._least: list[int] = []
        for group in channels.groups:
            step = multiple // math.gcd(multiple, group.width)
            wanted = max(
                1, math.ceil(least / group.width), math.ceil(round(group.size * (1 - most.get(group.name, 1.0)), 9))
            )
            self._steps.append(step)
            self._least.append(min(group.size, math.ceil(wanted / step) * step))

    def apply(self, order: Tensor, count: int, kept: Tensor) -> Tensor:
        """What is left (bool) once the first `count` of `order` go of `kept`, as far as limits allow."""
        left = kept.clone()
        going = torch.zeros_like(kept)
        going[order[:count]] = True
        for group, step, least in zip(self._channels.groups, self._steps, self._least, strict=True):
            here = int(kept[group.units].sum())
            asked = here - int(going[group.units].sum())
            # Not more than there is: a group whose size is no multiple keeps all until it loses enough.
            leave = min(here, max(least, math.ceil(asked / step) * step))
            mine = order[(order >= group.begin) & (order < group.begin + group.size)]
            left[mine[: here - leave]] = False
        return left

    def held(self, kept: Tensor) -> tuple[str, ...]:
        """The groups that are down to the least."""
        return tuple(
            group.name
            for group, least in zip(self._channels.groups, self._least, strict=True)
            if int(kept[group.units].sum()) <= least < group.size
        )


def choose(
    order: Tensor, kept: Tensor, limits: Limits, cost: Callable[[Tensor], int], budget: float
) -> tuple[Tensor, int]:
    """Let units go in `order` until what is left costs `budget`, as closely as whole units allow.

    Args:
        order: see `rank_units`.
        kept: which units have not gone yet.
        limits: see `Limits`.
        cost: of what is left; it does not rise where more goes.
        budget: what is left is to cost.

    Returns:
        What is left, and how many of `order` that took.
    """
    low, high = 0, len(order)  # the cost of the first is above the budget or it is the answer
    if cost(limits.apply(order, 0, kept)) <= budget:
        return kept.clone(), 0
    while high - low > 1:
        middle = (low + high) // 2
        if cost(limits.apply(order, middle, kept)) > budget:
            low = middle
        else:
            high = middle
    few, many = limits.apply(order, low, kept), limits.apply(order, high, kept)
    # Of two that are as close the one that keeps more.
    return (few, low) if cost(few) - budget <= abs(budget - cost(many)) else (many, high)
