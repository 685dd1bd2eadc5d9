"""What a device looks at at once: stretches of tensors, in rows.

A CPU looks at one stretch after the other where it lies, small enough for what is made of it to stay in the cache. To a
GPU a call costs as much as a look at some hundred thousand elements: it gets many stretches, copied one behind the
other. As each begins a row, what is counted by row can be told apart by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch
from torch import Tensor

ROW = 1024
"""Elements. What a stretch leaves of its last row is filled up with zeros."""
BATCHES = 12
"""So many batches at least on a GPU, so that a copy is a small part of all,"""
LEAST_ROWS, MOST_ROWS = 1 << 10, 1 << 13
"""but of no fewer rows than these, whose calls would cost more, and of no more, whose copies would take memory."""

Stretch = tuple[int, int, int]
"""The number of a tensor, and from where to where it is, of its elements in memory order."""


def takes_many(device: torch.device) -> bool:
    """Whether stretches are copied to be looked at together."""
    return device.type != "cpu"


def rows_of(elements: int) -> int:
    """How many rows so many elements take."""
    return -(-elements // ROW)


class Tensors(Protocol):
    """Tensors by number, each 1-D."""

    def __getitem__(self, number: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Some stretches, and the number of the first's first row."""

    first: int
    stretches: list[Stretch]

    @property
    def rows(self) -> int:
        return sum(rows_of(end - begin) for _, begin, end in self.stretches)

    def of(self, tensors: Tensors) -> Tensor:
        """Whole rows of these stretches: a view of a single stretch that fills its rows, else a copy."""
        found = []
        for number, begin, end in self.stretches:
            found.append(tensors[number][begin:end])
            if rest := (begin - end) % ROW:
                found.append(_zeros(found[-1].dtype, found[-1].device)[:rest])
        return found[0] if len(found) == 1 else torch.cat(found)


class Rows:
    """Stretches in batches.

    Args:
        stretches: what there is to look at.
        device: where the tensors are.
        on_cpu: how many elements a CPU looks at at once, a multiple of ROW.
    """

    def __init__(self, stretches: Sequence[Stretch], device: torch.device, on_cpu: int) -> None:
        self._device = device
        together = takes_many(device)
        total = sum(rows_of(end - begin) for _, begin, end in stretches)
        most = min(max(-(-total // BATCHES), LEAST_ROWS), MOST_ROWS) if together else on_cpu // ROW
        self.batches = list(_batched(stretches, most, together))
        """Of all stretches, which may be cut between rows."""

    @cached_property
    def stretches(self) -> list[Stretch]:
        """As the batches hold them, one after the other."""
        return [stretch for batch in self.batches for stretch in batch.stretches]

    @property
    def total(self) -> int:
        """The number of rows."""
        return self.batches[-1].first + self.batches[-1].rows if self.batches else 0

    @property
    def longest(self) -> int:
        """The number of elements of the largest batch, in whole rows."""
        return ROW * max((batch.rows for batch in self.batches), default=0)

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.tensor([rows_of(end - begin) for _, begin, end in self.stretches], dtype=torch.int64)

    @cached_property
    def starts(self) -> Tensor:
        """The place of each stretch's first element in all rows, laid end to end (int64)."""
        return ((self._lengths.cumsum(0) - self._lengths) * ROW).to(self._device)

    def each(self, values: Sequence[int]) -> Tensor:
        """Of each row the value of its stretch (int64, on a CPU)."""
        return torch.tensor(values, dtype=torch.int64).repeat_interleave(self._lengths)

    @cached_property
    def numbers(self) -> list[int]:
        """Of each stretch the number of its tensor."""
        return [number for number, _, _ in self.stretches]

    def add_up(self, by_row: Tensor, tensors: int) -> Tensor:
        """Sums over the rows of each of so many tensors; `by_row` is int64 of shape (..., rows)."""
        number = self.each(self.numbers).to(self._device)
        return by_row.new_zeros(*by_row.shape[:-1], tensors).index_add_(-1, number, by_row)


def sum_words(marks: Tensor) -> Tensor:
    """Of whole rows of bools the sums of their words of eight (int64): in each byte how many of a column are True."""
    return marks.view(torch.int64).view(-1, ROW // 8).sum(1)


def count(words: Tensor) -> Tensor:
    """How many elements of each row are True, given `sum_words` (int64)."""
    return words.view(torch.uint8).view(-1, 8).sum(1)


def _batched(stretches: Sequence[Stretch], most: int, together: bool) -> Iterator[Batch]:
    """Batches of at most so many rows: of a single stretch each, or filled with many."""
    first, held = 0, list[Stretch]()
    room = most
    for number, start, stop in stretches:
        begin = start
        while begin < stop:
            end = min(stop, begin + room * ROW)
            held.append((number, begin, end))
            room -= rows_of(end - begin)
            begin = end
            if not together or not room:
                yield Batch(first, held)
                first, held, room = first + most - room, [], most
    if held:
        yield Batch(first, held)


@cache
def _zeros(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(ROW, dtype=dtype, device=device)
