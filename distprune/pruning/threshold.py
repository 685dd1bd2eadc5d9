"""The exact k-th smallest score over all ranks, found from counts alone.

A radix select: every rank counts how many of its keys fall under each value of the highest digit, the counts
are summed over the ranks, and the digit of the k-th smallest key is read off; then the next digit, among the
keys that share the first. No rank ever sees another's weights, and what travels does not grow with the model.
Keys that tie at the threshold are told apart by their global index, selected in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.pruning.agreement import Copies
from distprune.pruning.collectives import Ranks
from distprune.pruning.prunable import Prunable
from distprune.pruning.scores import KeyFormat
from distprune.pruning.shards import chunks, flat

INDEX_PASSES = 3

Chunks = Callable[[], Iterator[Tensor]]


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


@dataclass(frozen=True)
class Kth:
    """The k-th smallest key: `rank` is its place (from 1) among the `equal` keys that no digit tells apart.

    Where `rank == equal` all of them are among the k smallest, and `key` may be any value that parts these from the
    rest.
    """

    key: int
    rank: int
    equal: int


def share(tensors: Sequence[Prunable]) -> list[tuple[Prunable, int, int]]:
    """This rank's part of the counting: pieces (tensor, start, stop) of what it holds, in memory order.

    Ranks that hold the same parts split the work: each takes one stretch of all those parts laid end to end.
    """
    pieces: list[tuple[Prunable, int, int]] = []
    for layout in dict.fromkeys(t.part.layout for t in tensors):
        alike = [t for t in tensors if t.part.layout == layout]
        sizes = [t.local.numel() for t in alike]
        low = sum(sizes) * alike[0].part.copy // alike[0].part.copies
        high = sum(sizes) * (alike[0].part.copy + 1) // alike[0].part.copies
        begin = 0
        for tensor, size in zip(alike, sizes, strict=True):
            pieces.append((tensor, max(low - begin, 0), min(high - begin, size)))
            begin += size
    return [(tensor, start, stop) for tensor, start, stop in pieces if start < stop]


def find_threshold(
    tensors: Sequence[Prunable], masks: Sequence[Tensor], pruned: int, k: int, keys: KeyFormat, ranks: Ranks
) -> Threshold:
    """Where to cut so that exactly `k` weights are pruned, those pruned already among them.

    Args:
        tensors: the prunable tensors, in the same order on every rank; pruned weights are 0.
        masks: their masks (bool, True keeps), of the shape and memory format of this rank's parts.
        pruned: how many weights the masks prune, fewer than `k`.
        k: how many weights the new threshold is to prune, at most all.
        keys: how scores are compared.
        ranks: who shares the counting.

    Raises:
        NonFiniteError: a score is NaN or infinite; the message counts them per tensor.
    """
    pieces = share(tensors)
    counts_dtype = torch.int32 if sum(t.numel for t in tensors) < 2**31 else torch.int64
    mask_of = {t.name: flat(m) for t, m in zip(tensors, masks, strict=True)}

    def score_keys() -> Iterator[Tensor]:
        for tensor, start, stop in pieces:
            weight = flat(tensor.local)
            for begin, end in chunks(start, stop):
                yield keys.keys(weight[begin:end])

    def refuse_nonfinite(histogram: Tensor) -> None:
        if histogram[keys.infinite >> sum(keys.digits[1:]) :].any():
            raise NonFiniteError(_count_nonfinite(tensors, ranks))

    device = tensors[0].weight.device
    kth = kth_smallest(score_keys, k, keys.digits, ranks, device, counts_dtype, check=refuse_nonfinite)
    if kth.rank == kth.equal:
        return Threshold(kth.key, 0)

    last = tensors[-1].end - 1
    # Pruned weights score 0: among zeros only those that are still kept are candidates.
    ties = kth.rank - pruned if kth.key == 0 else kth.rank

    def tied_from_the_end() -> Iterator[Tensor]:
        for tensor, start, stop in pieces:
            weight, mask = flat(tensor.local), mask_of[tensor.name]
            for begin, end in chunks(start, stop):
                tied = keys.keys(weight[begin:end]) == kth.key
                tied &= mask[begin:end]
                yield last - tensor.indices(begin, end)[tied]

    width = -(-last.bit_length() // INDEX_PASSES)
    digits = (width,) * INDEX_PASSES
    place = kth_smallest(tied_from_the_end, ties, digits, ranks, device, counts_dtype)
    return Threshold(kth.key, last - place.key)


def kth_smallest(
    parts: Chunks,
    k: int,
    digits: Sequence[int],
    ranks: Ranks,
    device: torch.device,
    counts_dtype: torch.dtype = torch.int64,
    check: Callable[[Tensor], None] = lambda histogram: None,
) -> Kth:
    """Radix-select the `k`-th smallest (from 1) of the integer keys that `parts()` yields over all ranks.

    Stops early once the k smallest are parted from the rest. One collective per digit looked at.

    Args:
        parts: yields 1-D integer tensors, anew at each call; keys lie in [0, 2^sum(digits)).
        k: between 1 and the number of keys on all ranks.
        digits: widths in bits, the highest digit first.
        ranks: who counts.
        device: where the histograms live.
        counts_dtype: int64, or int32 where no count can reach 2^31.
        check: sees the first digit's summed histogram, and may raise.
    """
    prefix, below, shift = 0, 0, sum(digits)
    for level, width in enumerate(digits):
        above, shift = shift, shift - width
        histogram = torch.zeros(1 << width, dtype=counts_dtype, device=device)
        for part in parts():
            if level > 0:
                part = part[(part >> above) == prefix] & ((1 << above) - 1)
            histogram += torch.bincount(part >> shift, minlength=1 << width)
        ranks.sum(histogram)
        if level == 0:
            check(histogram)
        cumulative = histogram.cumsum(0, dtype=torch.int64)
        digit = int(torch.searchsorted(cumulative, k - below))
        equal = int(histogram[digit])
        below += int(cumulative[digit]) - equal
        prefix = prefix << width | digit
        if k - below == equal:
            return Kth((prefix + 1 << shift) - 1, equal, equal)
    return Kth(prefix, k - below, equal)


def _count_nonfinite(tensors: Sequence[Prunable], ranks: Ranks) -> str:
    """The tensors at fault, with how many of their weights, and on which ranks where not on all; a gather."""
    mine = torch.stack([_nonfinite(tensor.local) for tensor in tensors])
    copies = Copies([t.name for t in tensors], [t.part for t in tensors], ranks)
    totals, _, differs = copies.add_up(mine)
    by_tensor = zip(*ranks.gather(mine).tolist(), strict=True)
    found = []
    for tensor, total, differ, counts in zip(tensors, totals.tolist(), differs, by_tensor, strict=True):
        holders = [str(rank) for rank, count in enumerate(counts) if count]
        if holders:
            where = "" if len(holders) == ranks.world_size else f" on rank {', '.join(holders)}"
            found.append(f"{tensor.name}: {max(counts) if differ else total} of {tensor.numel}{where}")
    return "; ".join(found)


def _nonfinite(weight: Tensor) -> Tensor:
    memory = flat(weight)
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for begin, end in chunks(0, len(memory)):
        count += (~torch.isfinite(memory[begin:end])).sum()
    return count
