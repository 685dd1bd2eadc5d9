"""The k-th smallest of integers that lie on many ranks, found from counts alone; of many groups of them at once.

Every rank counts how many of its keys fall under each value of the highest digit, the counts are summed over the ranks,
and the digit of the k-th smallest key is read off; then the next digit, among the keys that share the first. No rank
ever sees another's keys, and what travels does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.pruning.collectives import Ranks

BINS_BITS = 16
"""Of the counts that travel at once, over all groups: 2^16."""

Keys = Callable[[], Iterator[tuple[int, Tensor, int]]]
"""Yields (group, keys, times), keys 1-D integers >= 0, each of which counts so many times; anew at each call."""


@dataclass(frozen=True)
class Kth:
    """The k-th smallest key: `rank` is its place (from 1) among the `equal` keys that no digit tells apart.

    Where `rank == equal` all of them are among the k smallest, and `key` may be any value that parts these from the
    rest.
    """

    key: int
    rank: int
    equal: int


def digit_widths(bits: int, groups: int = 1, at_least: int = 1) -> tuple[int, ...]:
    """Widths of the digits of keys of so many bits, the highest first, so that the counts of all groups stay few."""
    widest = max(1, BINS_BITS - (groups - 1).bit_length())
    count = max(at_least, -(-bits // widest))
    return tuple(bits // count + (place < bits % count) for place in range(count))


def kth_smallest(
    keys: Keys,
    ks: Sequence[int],
    digits: Sequence[int],
    ranks: Ranks,
    device: torch.device,
    counts_dtype: torch.dtype = torch.int64,
    check: Callable[[Tensor], None] = lambda histogram: None,
) -> list[Kth]:
    """Radix-select, in each group, the k-th smallest (from 1) of the keys on all ranks.

    Stops early once the k smallest of every group are parted from the rest. One collective per digit looked at.

    Args:
        keys: of all groups; they lie in [0, 2^sum(digits)).
        ks: for each group, between 1 and the number of its keys on all ranks.
        digits: widths in bits, the highest digit first; see `digit_widths`.
        ranks: who counts.
        device: where the histograms live.
        counts_dtype: int64, or int32 where no count can reach 2^31.
        check: sees the first digit's summed histogram, of shape (groups, values), and may raise.
    """
    wanted = torch.tensor(ks, device=device)
    prefixes = [0] * len(ks)
    shift = sum(digits)
    for level, width in enumerate(digits):
        above, shift = shift, shift - width
        histogram = torch.zeros(len(ks), 1 << width, dtype=counts_dtype, device=device)
        for group, part, times in keys():
            if level > 0:
                part = part[(part >> above) == prefixes[group]] & ((1 << above) - 1)
            histogram[group] += torch.bincount(part >> shift, minlength=1 << width) * times
        ranks.sum(histogram)
        if level == 0:
            check(histogram)
        cumulative = histogram.cumsum(1, dtype=torch.int64)
        digit = torch.searchsorted(cumulative, wanted[:, None])
        equal = histogram.gather(1, digit).long()
        wanted = wanted - (cumulative.gather(1, digit) - equal)[:, 0]
        prefixes = [prefix << width | value for prefix, value in zip(prefixes, digit[:, 0].tolist(), strict=True)]
        if torch.equal(wanted, equal[:, 0]):
            break
    return [
        Kth((prefix + 1 << shift) - 1 if rank == same else prefix << shift, rank, same)
        for prefix, rank, same in zip(prefixes, wanted.tolist(), equal[:, 0].tolist(), strict=True)
    ]
