"""Which weights go: the exact k-th smallest score over all ranks, of all tensors together or of each by itself.

Keys that tie at a threshold are told apart by their global index, selected in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.pruning import masks as mask_ops
from distprune.pruning.agreement import Copies
from distprune.pruning.collectives import Ranks
from distprune.pruning.limits import Limits
from distprune.pruning.prunable import Prunable
from distprune.pruning.radix import Kth, digit_widths, kth_smallest
from distprune.pruning.scorer import Scorer
from distprune.pruning.shards import at_once, chunks, flat

INDEX_PASSES = 3


class NonFiniteError(RuntimeError):
    """Scores are NaN or infinite. Raised alike on every rank, before anything has changed."""


@dataclass(frozen=True)
class Threshold:
    """Which weights go: those with a key below `key`, and those with `key` itself from global index `index` on."""

    key: int
    index: int

    def keeps(self, tensor: Prunable, keys: Tensor, start: int) -> Tensor:
        """Whether elements stay (bool, 1-D), given their `keys` at memory positions from `start` on."""
        if tensor.end <= self.index:
            return keys >= self.key
        keep = keys > self.key
        if tensor.offset < self.index:
            keep |= (keys == self.key) & (tensor.indices(start, start + len(keys)) < self.index)
        return keep


NOTHING = Threshold(0, 1 << 62)
"""Prunes nothing that is not pruned."""


def share(tensors: Sequence[Prunable]) -> list[tuple[int, int, int]]:
    """This rank's part of the counting: pieces (number of the tensor, start, stop) of what it holds, in memory order.

    Ranks that hold the same parts split the work: each takes one stretch of all those parts laid end to end.
    """
    pieces: list[tuple[int, int, int]] = []
    for layout in dict.fromkeys(t.part.layout for t in tensors):
        alike = [(number, t) for number, t in enumerate(tensors) if t.part.layout == layout]
        sizes = [t.held for _, t in alike]
        part = alike[0][1].part
        low = sum(sizes) * part.copy // part.copies
        high = sum(sizes) * (part.copy + 1) // part.copies
        begin = 0
        for (number, _), size in zip(alike, sizes, strict=True):
            pieces.append((number, max(low - begin, 0), min(high - begin, size)))
            begin += size
    return [(number, start, stop) for number, start, stop in pieces if start < stop]


class Search:
    """Looks for thresholds among the weights as they are, together with the other ranks.

    Where an element stands for several weights that go at once (`Prunable.unit`), so many elements go as fit into the
    number of weights that is asked for, up to the first that does not.

    Args:
        tensors: the prunable tensors, in the same order on every rank; pruned weights are 0.
        masks: their masks (bool, True keeps), of the shape and memory format of this rank's parts.
        pruned: how many weights the masks prune of each.
        scorer: what weights are worth.
        ranks: who shares the counting.
    """

    def __init__(
        self,
        tensors: Sequence[Prunable],
        masks: Sequence[Tensor],
        pruned: Sequence[int],
        scorer: Scorer,
        ranks: Ranks,
    ) -> None:
        self.tensors = tensors
        self.pruned = pruned
        self.format = scorer.format
        self.ranks = ranks
        self.device = tensors[0].weight.device
        self._masks = [flat(mask) for mask in masks]
        self._scorer = scorer
        self._pieces = share(tensors)
        self._counts_dtype = torch.int32 if sum(t.numel for t in tensors) < 2**31 else torch.int64

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """This rank's share of the keys: (number of the tensor, place in memory order, keys), in small pieces."""
        for number, start, stop in self._pieces:
            for begin, end in chunks(start, stop, at_once(self.device)):
                yield number, begin, self.keys(number, begin, end)

    def keys(self, number: int, begin: int, end: int) -> Tensor:
        """Keys of a tensor's elements from `begin` to `end` of this rank's part, in memory order."""
        return self._scorer.keys(self.tensors[number], self._masks[number], begin, end)

    def scores(self, number: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Scores of the same (float64, 0 where pruned), and where they are kept (bool)."""
        mask = self._masks[number][begin:end]
        return torch.where(mask, self.format.values(self.keys(number, begin, end)), 0.0), mask

    def largest(self) -> Tensor:
        """The largest score of each tensor, of either sign (float64, 1-D); inf where one is NaN or infinite. One
        collective."""
        largest = torch.zeros(len(self.tensors), dtype=torch.float64, device=self.device)
        for number, start, stop in self._pieces:
            for begin, end in chunks(start, stop, at_once(self.device)):
                scores = self.scores(number, begin, end)[0].abs_().nan_to_num_(torch.inf, torch.inf)
                largest[number] = largest[number].maximum(scores.max())
        return self.ranks.max(largest)

    def keeps(self, threshold: Threshold, number: int) -> Iterator[tuple[int, int, Tensor]]:
        """What a threshold leaves of this rank's part of a tensor: (begin, end, whether weights stay), in small pieces.

        A piece is looked at when it is asked for, so that what came before may be masked by then.
        """
        for begin, end in chunks(0, len(self._masks[number]), at_once(self.device)):
            yield begin, end, threshold.keeps(self.tensors[number], self.keys(number, begin, end), begin)

    def cut(self, threshold: Threshold, number: int, mask: Tensor, weight: Tensor) -> None:
        """Prune this rank's part of a tensor: shrink its mask, and zero its weights where it prunes, both flat."""
        for begin, end, keep in self.keeps(threshold, number):
            mask[begin:end] &= keep
            del keep  # an update's memory is counted
            mask_ops.apply(mask[begin:end], weight[begin:end])

    def together(self, k: int) -> Threshold:
        """The threshold of all tensors that prunes exactly `k` weights, those pruned already among them.

        Args:
            k: more than are pruned, at most all.

        Raises:
            NonFiniteError: a score is NaN or infinite; the message counts them per tensor.
        """
        (threshold,) = self._select([k], [0] * len(self.tensors), [sum(self.pruned)])
        return threshold

    def each(self, counts: Sequence[int]) -> list[Threshold]:
        """A threshold for each tensor, of which exactly so many weights are pruned then.

        Args:
            counts: for each tensor at least as many as are pruned, at most all.

        Raises:
            NonFiniteError: see `together`.
        """
        moving = [number for number, count in enumerate(counts) if count > self.pruned[number]]
        if not moving:
            return [NOTHING] * len(counts)
        # The others are one more group, of which all is taken, so that what is not finite in them is found too.
        others = sum(t.numel for number, t in enumerate(self.tensors) if number not in moving)
        groups = [moving.index(number) if number in moving else len(moving) for number in range(len(counts))]
        ks, pruned = [counts[n] for n in moving], [self.pruned[n] for n in moving]
        found = self._select([*ks, *[others] * (others > 0)], groups, [*pruned, *[0] * (others > 0)])
        return [found[group] if number in moving else NOTHING for number, group in enumerate(groups)]

    def obeys(self, threshold: Threshold, limits: Limits) -> bool:
        """Whether a threshold of all tensors leaves as many weights of each pruned as limits allow. One collective at
        most, an integer for each tensor."""
        counts = torch.zeros(len(self.tensors), dtype=torch.int64, device=self.device)
        for number, begin, keys in self.pieces():
            counts[number] += self._count_pruned(threshold, number, begin, keys) * self.tensors[number].unit
        found = [int(count) for count in self.ranks.sum(counts).tolist()]
        return found == limits.clamp(found)

    def _count_pruned(self, threshold: Threshold, number: int, begin: int, keys: Tensor) -> Tensor:
        keep = threshold.keeps(self.tensors[number], keys, begin)
        keep &= self._masks[number][begin : begin + len(keys)]
        return len(keys) - keep.count_nonzero()

    def _select(self, ks: Sequence[int], groups: Sequence[int], pruned: Sequence[int]) -> list[Threshold]:
        """The threshold of each group of tensors that prunes so many of it.

        Args:
            ks: how many of each group, more than are pruned of it.
            groups: to which group a tensor belongs.
            pruned: how many are pruned of each group.
        """

        def grouped() -> Iterator[tuple[int, Tensor, int]]:
            for number, _, keys in self.pieces():
                yield groups[number], keys, self.tensors[number].unit

        digits = digit_widths(self.format.bits, len(ks))

        def refuse_nonfinite(histogram: Tensor) -> None:
            # The digit may be that of large finite keys too; then all are looked at.
            if histogram[:, self.format.infinite >> sum(digits[1:]) :].any():
                self.refuse_nonfinite()

        found = kth_smallest(grouped, ks, digits, self.ranks, self.device, self._counts_dtype, check=refuse_nonfinite)
        # Pruned weights have key 0: among those with it only what is still kept is a candidate.
        ties = [kth.rank - before if kth.key == 0 else kth.rank for kth, before in zip(found, pruned, strict=True)]
        return self._split_ties(found, ties, groups)

    def _split_ties(self, found: Sequence[Kth], ties: Sequence[int], groups: Sequence[int]) -> list[Threshold]:
        def tied() -> Iterator[tuple[int, Tensor, int]]:
            for number, begin, keys in self.pieces():
                kth = found[group := groups[number]]
                if kth.rank < kth.equal:
                    end = begin + len(keys)
                    equal = keys == kth.key
                    del keys  # an update's memory is counted
                    equal &= self._masks[number][begin:end]
                    yield group, self.tensors[number].indices(begin, end)[equal], self.tensors[number].unit

        firsts = self._first_of_ties(found, ties, tied)
        return [Threshold(kth.key, first) for kth, first in zip(found, firsts, strict=True)]

    def _first_of_ties(
        self, found: Sequence[Kth], ties: Sequence[int], tied: Callable[[], Iterator[tuple[int, Tensor, int]]]
    ) -> list[int]:
        """The global index from which on those go that tie at the threshold of a group; 0 where all do.

        Args:
            found: the threshold of each group.
            ties: how many of those that tie go.
            tied: yields (group, global indices of kept elements that tie, weights for which each stands), anew at each
                call; of groups of which only a part goes.
        """
        split = [group for group, kth in enumerate(found) if kth.rank < kth.equal]
        if not split:
            return [0] * len(found)
        last = self.tensors[-1].end - 1

        def from_the_end() -> Iterator[tuple[int, Tensor, int]]:
            for group, indices, unit in tied():
                yield split.index(group), last - indices, unit

        digits = digit_widths(last.bit_length(), len(split), at_least=INDEX_PASSES)
        found_places = kth_smallest(
            from_the_end, [ties[group] for group in split], digits, self.ranks, self.device, self._counts_dtype
        )
        # An element of which only a part would go stays.
        firsts = (last - place.key + (place.rank < place.equal) for place in found_places)
        index = dict(zip(split, firsts, strict=True))
        return [index.get(group, 0) for group in range(len(found))]

    def refuse_nonfinite(self) -> None:
        """Look at all scores; called on all ranks, which gather.

        Raises:
            NonFiniteError: some are NaN or infinite; names tensors, with how many, and on which ranks where not on all.
        """
        mine = torch.stack([self._count_nonfinite(number) for number in range(len(self.tensors))])
        copies = Copies([t.name for t in self.tensors], [t.part for t in self.tensors], self.ranks)
        totals, _, differs = copies.add_up(mine)
        by_tensor = zip(*self.ranks.gather(mine).tolist(), strict=True)
        found = []
        for tensor, total, differ, counts in zip(self.tensors, totals.tolist(), differs, by_tensor, strict=True):
            holders = [str(rank) for rank, count in enumerate(counts) if count]
            if holders:
                where = "" if len(holders) == self.ranks.world_size else f" on rank {', '.join(holders)}"
                found.append(f"{tensor.name}: {max(counts) if differ else total} of {tensor.numel}{where}")
        if found:
            raise NonFiniteError("; ".join(found))

    def _count_nonfinite(self, number: int) -> Tensor:
        tensor, mask = self.tensors[number], self._masks[number]
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for begin, end in chunks(0, len(mask), at_once(self.device)):
            count += (self._scorer.keys(tensor, mask, begin, end) >= self.format.infinite).sum()
        return count
