"""How much of each tensor goes where the weights of all tensors compete, within limits; found from counts alone.

The level of a weight says when it goes: the weights of the lowest levels are pruned, as many as the budget asks for.
Within a tensor levels rise with keys, so what is looked for is one cut in the keys of each tensor. Each lies in an
interval of keys, which is divided into bins; the weights in them are counted over all ranks; the levels of their first
and last keys say which bins a cut may lie in; and so on, until every interval is a single key.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from distprune.pruning.exact import factors
from distprune.pruning.limits import Limits
from distprune.pruning.scores import KeyFormat
from distprune.pruning.threshold import Search

BINS_BITS = 14
"""Of the bins of all tensors together: 2^14, each with two int64."""


class Level(Protocol):
    """When a weight goes: an int64 or float64 that does not fall where the keys of a tensor rise.

    Attributes:
        needs_mass: whether it looks at `mass`.
    """

    needs_mass: bool

    def __call__(self, keys: Tensor, mass: Tensor) -> Tensor:
        """The levels of weights.

        Args:
            keys: int64, shape (tensors, n).
            mass: float64, of the same shape: the sum of squares of all weights of the tensor with such a key or higher.
        """
        ...


class ByScore:
    """The lowest scores of all tensors go first."""

    needs_mass = False

    def __call__(self, keys: Tensor, mass: Tensor) -> Tensor:
        return keys


class ByLamp:
    """w^2 over the sum of squares of those weights of its tensor that are not smaller (LAMP, Lee et al. 2021,
    arXiv:2010.07611). Equal weights of a tensor have equal levels."""

    needs_mass = True

    def __init__(self, keys: KeyFormat) -> None:
        self._keys = keys

    def __call__(self, keys: Tensor, mass: Tensor) -> Tensor:
        squares = self._keys.values(keys) ** 2
        return torch.where(squares > 0, squares / mass, 0.0).nan_to_num(torch.inf, torch.inf)


def share_jointly(search: Search, k: int, limits: Limits, level: Level) -> list[int]:
    """How many weights of each tensor are pruned when the `k` of the lowest levels go, as far as limits allow.

    A tensor that is held at a limit leaves its place to the next lowest of the others. Of equal levels those of later
    tensors go first. One collective for each division, and one for the largest key where masses are needed.

    Args:
        search: the weights and the ranks.
        k: weights to prune, those pruned already among them; between the sums of the limits.
        limits: of the counts.
        level: when a weight goes.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    lowest, highest = torch.tensor(limits.lowest), torch.tensor(limits.highest)
    bins = _Bins(search, level.needs_mass)

    def within(counts: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(counts, lowest), highest)

    while True:
        edges, before, mass = bins.count()
        first_level = level(edges[:, :-1], mass[:, :-1]).contiguous()
        last_key = torch.maximum(edges[:, 1:] - 1, edges[:, :-1])
        # The last key has at least its own mass beside that of the next bins; the first key's level is exact.
        last_level = level(last_key, mass[:, 1:] + search.format.values(last_key) ** 2)
        last_level = torch.where(last_key > edges[:, :-1], torch.maximum(last_level, first_level), first_level)
        filled = before[:, 1:] > before[:, :-1]
        candidates = sorted({*first_level[filled].tolist(), *last_level[filled].tolist()})

        def suffices(levels: Tensor, limit: float, before: Tensor = before) -> bool:
            return int(within(before.gather(1, _reached(levels, limit))[:, 0]).sum()) >= k

        enough = bisect_left(candidates, True, key=partial(suffices, last_level))
        too_few = bisect_left(candidates, True, key=partial(suffices, first_level)) - 1
        first = _reached(last_level, candidates[too_few]) if too_few >= 0 else torch.zeros_like(before[:, :1])
        last = torch.maximum(_reached(first_level, candidates[enough]), first)
        intervals = torch.stack([bins.low, bins.high])
        bins.narrow(edges, before, first, last)
        certain, possible = within(bins.below), within(bins.below + bins.inside)
        if not ((possible > certain) & (bins.high - bins.low > 1)).any():
            break
        if torch.equal(intervals, torch.stack([bins.low, bins.high])):
            break  # squares so small that they are 0: the levels that are left are equal

    levels = first_level.gather(1, bins.place.clamp(max=first_level.shape[1] - 1))[:, 0].tolist()
    counts, room = certain.tolist(), (possible - certain).tolist()
    missing = k - sum(counts)
    for number in sorted(range(len(counts)), key=lambda number: (levels[number], -number)):
        taken = min(room[number], missing) if room[number] else 0
        counts[number] += taken
        missing -= taken
    assert missing == 0, "k lies between the sums of the limits"
    return counts


def _reached(levels: Tensor, limit: float) -> Tensor:
    """In each tensor, how many bins lie at `limit` or below, shape (tensors, 1)."""
    return torch.searchsorted(levels, torch.full_like(levels[:, :1], limit), right=True)


class _Bins:
    """For each tensor the interval of keys in which its cut lies, and what is known of it; on the CPU.

    Attributes:
        low, high: keys (int64): the interval is from `low` to below `high`.
        below: how many weights have lower keys.
        inside: how many have keys in the interval.
        place: in which of the bins last counted `low` lies, shape (tensors, 1).
    """

    def __init__(self, search: Search, with_mass: bool) -> None:
        self._search = search
        tensors = len(search.tensors)
        self._number = 1 << max(1, BINS_BITS - (tensors - 1).bit_length())
        self._factors = _factors(search) if with_mass else None
        self.low, self.below = torch.zeros(2, tensors, dtype=torch.int64)
        self.high = torch.full_like(self.low, search.format.infinite)
        self.inside = torch.tensor([t.numel for t in search.tensors])
        self.place = torch.zeros(tensors, 1, dtype=torch.int64)
        self._above = torch.zeros_like(self.low)

    def count(self) -> tuple[Tensor, Tensor, Tensor]:
        """Divide the intervals into bins and count what lies in them; called on all ranks.

        Returns:
            The edges of bins (int64 keys), how many weights have keys below them (int64), and the mass of those that
            have not (float64, 0 where masses are not needed), all of shape (tensors, bins + 1).
        """
        search, widths = self._search, self.high - self.low
        shifts = [max(0, (width - 1).bit_length() - self._number.bit_length() + 1) for width in widths.tolist()]
        counts, masses = torch.zeros(2, len(widths), self._number, dtype=torch.int64, device=search.device)
        lows, highs = self.low.tolist(), self.high.tolist()
        for number, _, keys in search.pieces():
            keys = keys[(keys >= lows[number]) & (keys < highs[number])].long()
            place = keys - lows[number] >> shifts[number]
            counts[number] += torch.bincount(place, minlength=self._number) * search.tensors[number].unit
            if self._factors is not None:
                squares = search.format.values(keys) ** 2 * self._factors[number]
                masses[number].index_add_(0, place, squares.round().long())
        if self._factors is None:
            search.ranks.sum(counts)
        else:
            counts, masses = search.ranks.sum(torch.stack([counts, masses]))
        counts, masses = counts.cpu(), masses.cpu()
        if not torch.equal(counts.sum(1), self.inside):
            search.refuse_nonfinite()
        offsets = torch.arange(self._number)[None] << torch.tensor(shifts)[:, None]
        edges = self.low[:, None] + torch.minimum(offsets, widths[:, None])
        none = torch.zeros_like(self.place)
        before = self.below[:, None] + torch.cat([none, counts.cumsum(1)], 1)
        sums = self._above[:, None] + torch.cat([masses.flip(1).cumsum(1).flip(1), none], 1)
        self._sums = sums
        return torch.cat([edges, self.high[:, None]], 1), before, self._unscaled(sums)

    def narrow(self, edges: Tensor, before: Tensor, first: Tensor, last: Tensor) -> None:
        """Let the intervals be those from bin `first` to before bin `last`, without empty bins at their ends.

        Args:
            edges, before: as counted.
            first, last: shape (tensors, 1).
        """
        begin, end = before.gather(1, first), before.gather(1, last)
        last = (before < end).sum(1, keepdim=True).maximum(first)
        first = torch.where(end > begin, (before <= begin).sum(1, keepdim=True) - 1, last)
        self.low, self.high = edges.gather(1, first)[:, 0], edges.gather(1, last)[:, 0]
        self.below, self.inside = begin[:, 0], (end - begin)[:, 0]
        self._above = self._sums.gather(1, last)[:, 0]
        self.place = first

    def _unscaled(self, sums: Tensor) -> Tensor:
        if self._factors is None:
            return sums.double()
        return sums.double() / torch.tensor(self._factors, dtype=torch.float64)[:, None]


def _factors(search: Search) -> list[float]:
    """For each tensor a power of two by which its squares are multiplied, and then rounded to integers.

    Sums of integers do not depend on the order in which ranks add them up. That over a tensor stays below 2^62. Called
    on all ranks; one collective.
    """
    squares = search.largest() ** 2
    if beyond := [t.name for t, square in zip(search.tensors, squares.tolist(), strict=True) if square == math.inf]:
        search.refuse_nonfinite()
        raise ValueError(f"allocation: lamp squares weights, and those of {', '.join(beyond)} are too large for that")
    return factors(squares, [tensor.numel for tensor in search.tensors])
