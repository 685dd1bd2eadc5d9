"""The cut where weights of one model compete by magnitude, found in about one pass over them.

A small sample says between which two magnitudes the threshold must lie. One pass counts the weights below, and picks
out those in between, which are few; the exact threshold is then looked for among these alone. Where the sample was
wrong all weights are looked at, as in any other search; the outcome is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from distprune.pruning import masks as mask_ops
from distprune.pruning.limits import Limits
from distprune.pruning.radix import Kth, digit_widths, kth_smallest
from distprune.pruning.rows import ROW, Rows, count, sum_words, takes_many
from distprune.pruning.scores import SINGLE
from distprune.pruning.shards import chunks, flat
from distprune.pruning.threshold import Search, Threshold

SMALL = 1 << 20
"""Of fewer weights all are looked at."""
ON_CPU = 1 << 19
"""Weights that a CPU looks at at once: a look is two dozen calls, which cost more than a cache that is further away."""
RUN = 16
"""So many weights, the first of each row, are in the sample: whole lines of a cache, spread evenly."""
SAMPLE_BITS = digit_widths(SINGLE.bits)[0]
SHIFT = SINGLE.bits - SAMPLE_BITS
FEW = 32
"""Eight weights are looked at at once where less than one such look in four finds one, one in so many weights."""
MOST_INSIDE = 32
"""Where more than one in so many weights lies in the bracket, as where many are equal, it is no help."""
SIGMAS = 10
"""How far from the sample's quantile the threshold is looked for, in standard deviations of as many independent draws:
neighbours in memory are alike, so that a sample of runs is worth a part of its size."""


@dataclass(frozen=True)
class _Inside:
    """What lies in the bracket.

    Attributes:
        keys: int32, 1-D.
        places: of the same in all rows, laid end to end; ascending.
    """

    keys: Tensor
    places: Tensor


class MagnitudeSearch(Search):
    """A search among float32 weights by magnitude, for one threshold of all tensors. See `Search`; weights that are
    pruned may be anything here."""

    _found: Threshold | None = None

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self._pieces, self.device, ON_CPU)

    @cached_property
    def _weights(self) -> list[Tensor]:
        return [flat(tensor.local) for tensor in self.tensors]

    def keys(self, number: int, begin: int, end: int) -> Tensor:
        return super().keys(number, begin, end) * self._masks[number][begin:end]

    def together(self, k: int) -> Threshold:
        if sum(t.numel for t in self.tensors) >= SMALL:
            self._found = self._between(k, *self._bracket(k))
        return super().together(k) if self._found is None else self._found

    def obeys(self, threshold: Threshold, limits: Limits) -> bool:
        if threshold is self._found and all(
            low <= least and most <= high
            for least, most, low, high in zip(self._least, self._most, limits.lowest, limits.highest, strict=True)
        ):
            return True
        return super().obeys(threshold, limits)

    def cut(self, threshold: Threshold, number: int, mask: Tensor, weight: Tensor) -> None:
        tensor = self.tensors[number]
        if not threshold.key or tensor.offset < threshold.index < tensor.end:
            super().cut(threshold, number, mask, weight)
            return
        # What has the key of the threshold itself stays whole or goes whole.
        most = _value(threshold.key - (tensor.end <= threshold.index))
        if takes_many(self.device):
            torch.ops.aten.hardshrink.out(weight, most, out=weight)
            mask_ops.apply(mask.logical_and_(weight), weight)
            return
        for begin, end in chunks(0, len(weight), ON_CPU):
            torch.ops.aten.hardshrink.out(weight[begin:end], most, out=weight[begin:end])
            keep, kept = weight[begin:end].bool(), mask[begin:end]
            kept &= keep
            if not _equal(kept, keep):  # a pruned weight was not 0
                mask_ops.apply(kept, weight[begin:end])

    def _bracket(self, k: int) -> tuple[int, int]:
        """Keys between which the key of the k-th smallest very likely lies: from the first to below the second. One
        collective."""
        weights, masks = (
            _sample([memory[0][:0], *(memory[number][start:stop] for number, start, stop in self._pieces)])
            for memory in (self._weights, self._masks)
        )
        keys = SINGLE.keys(weights.abs_()) * masks
        histogram = torch.bincount(keys >> SHIFT, minlength=1 << SAMPLE_BITS).to(self._counts_dtype)
        self.ranks.sum(histogram)
        histogram[0] = 0  # how many are pruned is known
        cumulative = histogram.cumsum(0, dtype=torch.int64)
        sampled, pruned = int(cumulative[-1]), sum(self.pruned)
        share = (k - pruned) / max(1, sum(t.numel for t in self.tensors) - pruned)
        middle, margin = share * sampled, SIGMAS * math.sqrt(share * (1 - share) * sampled) + SIGMAS
        ends = torch.tensor([middle - margin, middle + margin], dtype=torch.float64, device=self.device)
        low, high = (int(place) for place in torch.searchsorted(cumulative.double(), ends))
        return low << SHIFT, min(high + 1 << SHIFT, SINGLE.infinite)

    def _between(self, k: int, low: int, high: int) -> Threshold | None:
        """The threshold, if it lies in the bracket. Two collectives at most, and those that part what ties."""
        inside, counts, useless = self._look(low, high)
        # Bins as they are in a search of all keys, so that all ways to a threshold give the same.
        first, bins = low >> SHIFT, (high - 1 >> SHIFT) - (low >> SHIFT) + 1
        histogram = torch.bincount((inside.keys >> SHIFT) - first, minlength=bins)
        flags = torch.tensor([useless], dtype=torch.int64, device=self.device)
        summed = self.ranks.sum(torch.cat([flags, counts.flatten(), histogram]))
        gives_up, *known = summed[: 1 + counts.numel()].tolist()
        self._least = known[: len(self.tensors)]
        self._most = [least + more for least, more in zip(self._least, known[len(self.tensors) :], strict=True)]
        lower = sum(self._least)
        if gives_up or not lower < k <= sum(self._most):
            return None
        cumulative = summed[1 + counts.numel() :].cumsum(0)
        place = int(torch.searchsorted(cumulative, k - lower))
        before = int(cumulative[place - 1]) if place else 0
        rank, equal = k - lower - before, int(cumulative[place]) - before
        start = first + place << SHIFT

        def in_bin() -> Iterator[tuple[int, Tensor, int]]:
            yield 0, inside.keys[inside.keys >> SHIFT == first + place] - start, 1

        if rank == equal:
            kth = Kth((1 << SHIFT) - 1, rank, equal)
        else:
            (kth,) = kth_smallest(in_bin, [rank], (SHIFT,), self.ranks, self.device, self._counts_dtype)

        def tied() -> Iterator[tuple[int, Tensor, int]]:
            for indices in self._equal(inside, start + kth.key):
                yield 0, indices, 1

        return Threshold(start + kth.key, self._first_of_ties([kth], [kth.rank], tied)[0])

    def _look(self, low: int, high: int) -> tuple[_Inside, Tensor, bool]:
        """Look at this rank's share once: what lies in the bracket; how many of each tensor lie below it, and in it
        (int64, 2 x tensors); and whether that is of no use, since a weight is not finite or too many lie there."""
        rows = self._rows
        words, totals = list[Tensor](), list[Tensor]()
        nothing = torch.zeros(0, dtype=torch.int32, device=self.device)
        keys, places = [nothing], [nothing]
        bools = torch.empty(2, rows.longest, dtype=torch.bool, device=self.device)
        floats = torch.empty(rows.longest, device=self.device)
        least, most = _value(max(low - 1, 0)), _value(high - 1)
        room = sum(t.numel for t in self.tensors) // MOST_INSIDE
        fits = ROW * rows.total < 2**31
        for batch in rows.batches:
            weight, kept = batch.of(self._weights), batch.of(self._masks)
            left = torch.abs(weight, out=floats[: len(weight)])
            reaches, marks = bools[:, : len(weight)]
            reaches.copy_(torch.threshold_(left, least, 0.0) if low else kept).bitwise_and_(kept)
            words.append(sum_words(reaches))
            torch.threshold_(left, most, 0.0)
            totals.append(left.sum())
            found = _places(marks.copy_(left).bitwise_and_(kept).bitwise_xor_(reaches))
            keys.append(SINGLE.keys(weight[found].abs_()))
            places.append(found.add_(ROW * batch.first).to(torch.int32 if fits else torch.int64))
            if (room := room - len(found)) < 0:
                counts = torch.zeros(2, len(self.tensors), dtype=torch.int64, device=self.device)
                return _Inside(nothing, nothing), counts, True
            del weight, kept, found  # before the next are made
        inside = _Inside(_joined(keys), _joined(places))
        finite = all(torch.stack(totals).isfinite().tolist()) if totals else True
        return inside, self._counts(words, inside), not finite

    def _counts(self, words: list[Tensor], inside: _Inside) -> Tensor:
        """How many of each tensor lie below the bracket, and in it, of this rank's share.

        Args:
            words: sums of the words of whether a weight is not below, of each batch.
            inside: what lies in the bracket.
        """
        sizes = [0] * len(self.tensors)
        for number, start, stop in self._pieces:
            sizes[number] = stop - start
        below = torch.tensor(sizes, device=self.device)
        found = torch.zeros_like(below)
        if words:
            below -= self._rows.add_up(count(torch.cat(words)), len(sizes))
            # How many places are before each stretch; then behind it.
            before = torch.searchsorted(inside.places, self._rows.starts.to(inside.places.dtype))
            of_each = before.diff(append=before.new_tensor([len(inside.places)]))
            found.index_add_(0, torch.tensor(self._rows.numbers, device=self.device), of_each)
        return torch.stack([below, found])

    def _equal(self, inside: _Inside, key: int) -> Iterator[Tensor]:
        """The global indices of the weights in this rank's share that have this key."""
        places = inside.places[inside.keys == key].long()
        bounds = pairwise([*torch.searchsorted(places, self._rows.starts).tolist(), len(places)])
        starts = self._rows.starts.tolist()
        for (number, first, _), start, (begin, end) in zip(self._rows.stretches, starts, bounds, strict=True):
            if begin < end:
                yield self.tensors[number].indices_at(places[begin:end].sub_(start - first))


def _sample(stretches: Sequence[Tensor]) -> Tensor:
    """One in 64 of their elements: the first of each row, and so many of what is left of the last."""
    whole, rest = list[Tensor](), list[Tensor]()
    for stretch in stretches:
        end = len(stretch) // ROW * ROW
        whole.append(stretch[:end].view(-1, ROW)[:, :RUN])
        rest.append(stretch[end : end + (len(stretch) - end) * RUN // ROW])
    return torch.cat([torch.cat(whole).flatten(), *rest])


def _joined(pieces: list[Tensor]) -> Tensor:
    """Pieces one after the other, taken from their list, since an update's memory is counted."""
    joined = torch.cat(pieces)
    pieces.clear()
    return joined


def _value(key: int) -> float:
    """The magnitude that has this key."""
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two bool tensors are, each as `flat` gives it; eight elements are compared at once."""
    whole = len(a) // 8 * 8
    words = (marks[:whole].view(torch.int64) for marks in (a, b))
    return torch.equal(*words) and torch.equal(a[whole:], b[whole:])


def _places(marks: Tensor) -> Tensor:
    """Where a 1-D bool tensor with its own memory is True (int64). On a CPU eight are looked at at once where few
    are."""
    whole = len(marks) // 8 * 8
    words = marks[:whole].view(torch.int64).nonzero()[:, 0] if marks.device.type == "cpu" else marks
    if len(words) >= len(marks) // FEW:
        return marks.nonzero()[:, 0]
    row, column = marks[:whole].view(-1, 8)[words].nonzero(as_tuple=True)
    rest = marks[whole:].nonzero()[:, 0] + whole
    return torch.cat([words[row] * 8 + column, rest])
