"""Masks: which weights are left. A mask is a bool tensor of the weight's shape; True keeps.

Packed, a mask is uint8 of shape (rows, bytes), a row being all elements of one index of the first dimension: element i
of a row is bit i % 8, least significant first, of byte i // 8; it is set where the weight is kept, and bits behind the
last element are 0. Whole rows of a mask are whole rows packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distprune.pruning.rows import takes_many
from distprune.pruning.shards import CHUNK, INT_OF_SIZE, chunks, flat

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


def apply_all(masks: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """The same of each tensor by its mask; where they are not on a CPU one call sees to all."""
    if tensors and takes_many(tensors[0].device):
        torch._foreach_mul_([t.detach().view(INT_OF_SIZE[t.element_size()]) for t in tensors], list(masks))
        return
    for mask, tensor in zip(masks, tensors, strict=True):
        apply(mask, tensor)


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


def in_order(bools: Tensor) -> Tensor:
    """Bools of shape (rows, elements) in the order of packed bits, each row filled up to whole bytes (1-D)."""
    if fill := -bools.shape[1] % 8:
        bools = F.pad(bools, (0, fill))
    bools = bools.reshape(-1)
    # Words must begin where a word of memory begins, which a view into a mask need not do.
    return bools.clone() if bools.storage_offset() % 8 else bools


def signed_bytes(bools: Tensor) -> Tensor:
    """Packed bits of bools in the order of bits, as signed numbers (int64, 1-D, on memory of their own)."""
    return (bools.view(torch.int64) * _GATHER_BYTES_TO_BITS).bitwise_right_shift_(56)


def _pieces(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cut a packed mask into pieces of few bytes: as many whole rows as fit, or stretches of one long row."""
    rows, row_bytes = shape
    most = CHUNK // 8
    if row_bytes > most:
        for row in range(rows):
            for begin, end in chunks(0, row_bytes, most):
                yield slice(row, row + 1), slice(begin, end)
    elif row_bytes:
        for begin, end in chunks(0, rows, most // row_bytes):
            yield slice(begin, end), slice(0, row_bytes)


def _pack_piece(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    """The bytes of one piece of `mask`, uint8, 2-D."""
    mask = mask[None] if mask.dim() == 0 else mask
    piece = mask[rows]
    bools = piece.reshape(len(piece), -1)[:, columns.start * 8 : columns.stop * 8]
    return signed_bytes(in_order(bools)).to(torch.uint8).view(len(bools), -1)
