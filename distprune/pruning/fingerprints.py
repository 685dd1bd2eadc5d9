"""Counts and fingerprints of masks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from distprune.pruning.hashing import scramble
from distprune.pruning.masks import in_order, packed_shape, signed_bytes
from distprune.pruning.rows import ROW, Rows, count, sum_words
from distprune.pruning.shards import CHUNK, Part, at_once, chunks, flat

ROW_BYTES = ROW // 8
FACTORS = CHUNK // ROW
"""Rows of factors, after which they repeat."""


def tally(masks: Sequence[Tensor]) -> Tensor:
    """How many elements each mask keeps, and a number that changes with any one bit of it (int64, shape [2, masks]).
    One pass at the speed of memory."""
    memory = [flat(mask) for mask in masks]
    rows = Rows([(number, 0, len(mask)) for number, mask in enumerate(memory)], masks[0].device, CHUNK)
    words = torch.cat([_nothing(masks[0].device), *(sum_words(batch.of(memory)) for batch in rows.batches)])
    return rows.add_up(torch.stack([count(words), words]), len(masks))


def digest(masks: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """A 64-bit fingerprint of each part of a mask (int64, shape [masks]).

    It is the sum over the bytes (signed) of the packed mask of byte * factor(position), modulo 2^64, so fingerprints of
    the parts of one mask add up to that of the whole, however it is cut. Factors are odd, so that no bit of what they
    multiply is lost: products of two, by the low and the high bits of the position, so that few must be scrambled.
    """
    device = masks[0].device
    pieces = [piece for number, mask in enumerate(masks) for piece in _pieces(number, mask, parts[number])]
    rows = Rows([(place, 0, piece.length) for place, piece in enumerate(pieces)], device, CHUNK)
    begins = [pieces[place].first // ROW_BYTES + begin // ROW for place, begin, _ in rows.stretches]
    starts = rows.each([begin - start // ROW for begin, start in zip(begins, rows.starts.tolist(), strict=True)])
    places = (starts + torch.arange(rows.total)).to(device)
    memory, lower, sums, done = _Memory(pieces), _lower(device), [_nothing(device)], 0
    for batch in rows.batches:
        values = signed_bytes(batch.of(memory)).view(-1, ROW_BYTES)
        if len(batch.stretches) == 1 and len(values) <= FACTORS:
            first = begins[done] % FACTORS
            factors = lower[first : first + len(values)]
        else:
            factors = lower[places[batch.first : batch.first + len(values)] % FACTORS]
        sums.append(values.mul_(factors).sum(1))
        del values, factors  # before the next are made
        done += len(batch.stretches)
    by_piece = rows.add_up(torch.cat(sums) * _higher(places // FACTORS), len(pieces))
    prints = torch.zeros(len(masks), dtype=torch.int64, device=device)
    prints.index_add_(0, torch.tensor([piece.number for piece in pieces], dtype=torch.int64, device=device), by_piece)
    for number, (mask, part) in enumerate(zip(masks, parts, strict=True)):
        if not part.is_rows:
            prints[number] = _digest_of_columns(mask, part)
    return prints


def combine(digests: Mapping[str, int]) -> str:
    """One fingerprint (16 hex digits) of several masks by name, whatever their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Piece:
    """Some rows of a mask.

    Attributes:
        number: of the mask.
        mask: 2-D or more, of these rows.
        first: where they begin in the whole when packed, a byte.
    """

    number: int
    mask: Tensor
    first: int

    @property
    def length(self) -> int:
        """Of `memory`."""
        return 8 * (self.first % ROW_BYTES + math.prod(packed_shape(self.mask.shape)))

    def memory(self) -> Tensor:
        """The elements in the order of packed bits; before the first are zeros, so that they begin where a row of
        factors does. A view where the mask is so laid out."""
        bools = in_order(self.mask.reshape(len(self.mask), self.mask.shape[1:].numel()))
        before = 8 * (self.first % ROW_BYTES)
        return F.pad(bools, (before, 0)) if before else bools


class _Memory:
    """Pieces in the order of packed bits, made when asked for, since an update's memory is counted."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._pieces = pieces
        self._last: tuple[int, Tensor] | None = None

    def __getitem__(self, place: int) -> Tensor:
        if self._last is None or self._last[0] != place:
            self._last = None
            self._last = place, self._pieces[place].memory()
        return self._last[1]


def _pieces(number: int, mask: Tensor, part: Part) -> Iterator[_Piece]:
    """The rows of a mask: together where they lie in the order of packed bits, else so many that a copy is small."""
    if not part.is_rows:
        return
    mask = mask[None] if mask.dim() == 0 else mask
    row_bytes = packed_shape(torch.Size(part.whole))[1]
    first = part.start[0] * row_bytes if part.start else 0
    length = mask.shape[1:].numel()
    laid_out = mask.is_contiguous() and length % 8 == 0 and first % ROW_BYTES == 0
    most = len(mask) if laid_out else at_once(mask.device) // max(length, 1)
    for begin, end in chunks(0, len(mask), max(most, 1)):
        yield _Piece(number, mask[begin:end], first + begin * row_bytes)


def _digest_of_columns(mask: Tensor, part: Part) -> Tensor:
    """The fingerprint of a part that is not whole rows (int64 scalar)."""
    total = torch.zeros((), dtype=torch.int64, device=mask.device)
    lower = _lower(mask.device).view(-1)
    bools, (_, row_bytes) = flat(mask), packed_shape(torch.Size(part.whole))
    row_length = torch.Size(part.whole[1:]).numel()
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128], device=mask.device)
    for begin, end in chunks(0, len(bools), at_once(mask.device) // 8):
        index = part.indices(mask, begin, end)
        row, element = index // row_length, index % row_length
        position = row * row_bytes + element // 8
        factors = lower[position % (FACTORS * ROW_BYTES)] * _higher(position // (FACTORS * ROW_BYTES))
        total += (factors * (bits[element % 8] * bools[begin:end])).sum()
    return total


def _nothing(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)


@cache
def _lower(device: torch.device) -> Tensor:
    """Twice all rows of factors, one behind the other, so that a stretch of them may begin at any."""
    factors = (scramble(torch.arange(FACTORS * ROW_BYTES, device=device)) | 1).view(FACTORS, ROW_BYTES)
    return torch.cat([factors, factors])


def _higher(block: Tensor) -> Tensor:
    return scramble(~block) | 1
