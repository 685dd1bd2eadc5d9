"""Masks: which weights are left. A mask is a bool tensor of the weight's shape; True keeps.

Packed, a mask is uint8 of shape (rows, bytes), a row being all elements of one index of the first dimension: element i
of a row is bit i % 8, least significant first, of byte i // 8; it is set where the weight is kept, and bits behind the
last element are 0. Whole rows of a mask are whole rows packed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from distprune.pruning.hashing import scramble
from distprune.pruning.shards import CHUNK, INT_OF_SIZE, Part, at_once, chunks, flat

FACTORS = 1 << 15
WORDS = 128
"""Of eight bools each: so few that a byte holds the sum of each column of them."""
_GATHER_BYTES_TO_BITS = 0x0102_0408_1020_4080


def apply(mask: Tensor, tensor: Tensor) -> None:
    """Set `tensor` (2, 4 or 8 bytes an element) to +0 in place where `mask` is False; NaN and inf become +0 too."""
    bits = tensor.detach().view(INT_OF_SIZE[tensor.element_size()])
    if bits.device.type != "cpu" or bits.stride() != mask.stride():
        bits.mul_(mask)
        return
    # On a CPU the product of two types makes a copy of one: in pieces it is small, and stays in the cache.
    bits, mask = flat(bits), flat(mask)
    for begin, end in chunks(0, len(bits)):
        bits[begin:end].mul_(mask[begin:end])


def pack(mask: Tensor) -> Tensor:
    """`mask` as packed bits, uint8, on the same device."""
    packed = torch.empty(packed_shape(mask.shape), dtype=torch.uint8, device=mask.device)
    for rows, columns in _pieces(packed.shape):
        packed[rows, columns] = _pack_piece(mask, rows, columns)
    return packed


def check_packed(packed: Tensor, mask: Tensor, name: str) -> None:
    """Refuse packed bits that do not fit `mask`.

    Raises:
        ValueError: `packed` is not uint8 of the shape that fits; the message says `name`.
    """
    shape = packed_shape(mask.shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != shape:
        raise ValueError(f"the packed mask of {name} is {packed.dtype} {tuple(packed.shape)}, not torch.uint8 {shape}")


def unpack(packed: Tensor, into: Tensor) -> None:
    """Fill the mask `into` from packed bits that fit it (see `check_packed`)."""
    into = into[None] if into.dim() == 0 else into
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for rows, columns in _pieces(packed.shape):
        bools = (packed[rows, columns, None] >> bits & 1).bool().flatten(1)
        # Whole rows have the shape that the tensor wants; a piece of a long row is cut from its flat view.
        if columns.stop - columns.start == packed.shape[1]:
            length = into.shape[1:].numel()
            into[rows] = bools[:, :length].view(into[rows].shape)
        else:
            row = into[rows.start].view(-1)
            target = row[columns.start * 8 : columns.stop * 8]
            target.copy_(bools[0, : len(target)])


def packed_shape(shape: torch.Size) -> tuple[int, int]:
    """The shape of a mask of `shape` when packed."""
    rows = shape[0] if shape else 1
    return rows, -(-shape[1:].numel() // 8)


def digest(mask: Tensor, part: Part) -> Tensor:
    """A 64-bit fingerprint (int64 scalar) of the part `mask` of a mask.

    It is the sum over the bytes (signed) of the packed mask of byte * factor(position), modulo 2^64, so fingerprints of
    the parts of one mask add up to that of the whole, however it is cut. Factors are odd, so that no bit of what they
    multiply is lost: products of two, by the low and the high bits of the position, so that few must be scrambled.
    """
    row_bytes = packed_shape(torch.Size(part.whole))[1]
    lower = _lower(mask.device)
    sums, blocks = list[Tensor](), list[int]()
    if part.is_rows:
        first = (part.start[0] if part.start else 0) * row_bytes
        for rows, columns in _pieces(packed_shape(mask.shape), at_once(mask.device) // 2):
            values = _signed_bytes(mask, rows, columns).view(-1)
            position = first + rows.start * row_bytes + columns.start
            while len(values):
                block, place = divmod(position, FACTORS)
                here = values[: FACTORS - place]
                sums.append(here.mul_(lower[place : place + len(here)]).sum())
                blocks.append(block)
                values, position = values[len(here) :], position + len(here)
    else:
        bools, row_length = flat(mask), torch.Size(part.whole[1:]).numel()
        bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128], device=mask.device)
        for begin, end in chunks(0, len(bools), CHUNK // 8):
            index = part.indices(mask, begin, end)
            row, element = index // row_length, index % row_length
            position = row * row_bytes + element // 8
            factors = lower[position % FACTORS] * _higher(position // FACTORS)
            sums.append((factors * (bits[element % 8] * bools[begin:end])).sum())
            blocks.append(-1)
    if not sums:
        return torch.zeros((), dtype=torch.int64, device=mask.device)
    block = torch.tensor(blocks)
    return (torch.stack(sums) * torch.where(block < 0, 1, _higher(block)).to(mask.device)).sum()


def count(mask: Tensor) -> Tensor:
    """How many elements a mask, on memory of its own, keeps (int64 scalar)."""
    sums, rest = _added_up(mask)
    return sums.view(torch.uint8).sum() + rest


def tally(mask: Tensor) -> Tensor:
    """The same, and a number that changes with any one bit of the mask (int64, shape [2]). One pass at the speed of
    memory."""
    sums, rest = _added_up(mask)
    return torch.stack([sums.view(torch.uint8).sum(), sums.sum()]) + rest


def combine(digests: Mapping[str, int]) -> str:
    """One fingerprint (16 hex digits) of several masks by name, whatever their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def _pieces(shape: Sequence[int], most: int = CHUNK // 8) -> Iterator[tuple[slice, slice]]:
    """Cut a packed mask into pieces of few bytes: as many whole rows as fit, or stretches of one long row."""
    rows, row_bytes = shape
    if row_bytes > most:
        for row in range(rows):
            for begin, end in chunks(0, row_bytes, most):
                yield slice(row, row + 1), slice(begin, end)
    elif row_bytes:
        for begin, end in chunks(0, rows, most // row_bytes):
            yield slice(begin, end), slice(0, row_bytes)


def _added_up(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of some of a mask's words, each of eight elements, and of the elements behind them."""
    memory = flat(mask)
    rows = len(memory) // (8 * WORDS)
    words = memory[: rows * 8 * WORDS].view(torch.int64)
    return words.view(rows, WORDS).sum(1), memory[rows * 8 * WORDS :].sum()


def _pack_piece(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    """The bytes of one piece of `mask`, uint8, 2-D."""
    return _signed_bytes(mask, rows, columns).to(torch.uint8)


def _signed_bytes(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    """The same as signed numbers, int64, on memory of their own."""
    mask = mask[None] if mask.dim() == 0 else mask
    piece = mask[rows]
    bools = piece.reshape(len(piece), -1)[:, columns.start * 8 : columns.stop * 8]
    width = (columns.stop - columns.start) * 8
    if bools.shape[1] < width:
        bools = F.pad(bools, (0, width - bools.shape[1]))
    # The words must begin where a word of memory begins, which a view into a mask need not do.
    in_order = bools.reshape(-1)
    in_order = in_order.clone() if in_order.storage_offset() % 8 else in_order
    return (in_order.view(torch.int64) * _GATHER_BYTES_TO_BITS).bitwise_right_shift_(56).view(len(bools), -1)


@cache
def _lower(device: torch.device) -> Tensor:
    return scramble(torch.arange(FACTORS, device=device)) | 1


def _higher(block: Tensor) -> Tensor:
    return scramble(~block) | 1
