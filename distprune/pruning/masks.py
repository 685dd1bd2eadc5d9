"""Masks: which weights are left. A mask is a bool tensor of the weight's shape; True keeps.

Packed, a mask is 1-D uint8: element i of the row-major order is bit i % 8 (least significant first) of byte i // 8,
set where the weight is kept; bits behind the last element are 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from distprune.pruning.threshold import chunks

_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GATHER_BYTES_TO_BITS = 0x0102_0408_1020_4080


def apply(mask: Tensor, tensor: Tensor) -> None:
    """Set `tensor` (2, 4 or 8 bytes an element) to +0 in place where `mask` is False; NaN and inf become +0 too."""
    tensor.detach().view(_INT_OF_SIZE[tensor.element_size()]).mul_(mask)


def pack(mask: Tensor) -> Tensor:
    """`mask` as packed bits, uint8 of length ceil(numel / 8), on the same device."""
    bools = mask.reshape(-1)
    whole = len(bools) // 8 * 8
    packed = torch.zeros(-(-len(bools) // 8), dtype=torch.uint8, device=mask.device)
    for begin, end in chunks(0, whole):
        words = bools[begin:end].view(torch.int64)
        packed[begin // 8 : end // 8] = (words * _GATHER_BYTES_TO_BITS) >> 56
    for bit, kept in enumerate(bools[whole:].tolist()):
        packed[-1] |= kept << bit
    return packed


def unpack(packed: Tensor, into: Tensor) -> None:
    """Fill the mask `into` from packed bits.

    Raises:
        ValueError: `packed` is not uint8 of the length that fits.
    """
    if packed.dtype != torch.uint8 or packed.shape != (-(-into.numel() // 8),):
        raise ValueError(
            f"packed mask of {packed.dtype} {tuple(packed.shape)} does not fit a tensor of {tuple(into.shape)}"
        )
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bools = torch.cat([(part[:, None] >> bits & 1).bool().view(-1) for part in torch.split(packed, 1 << 15)])
    into.copy_(bools[: into.numel()].view(into.shape))


def digest(mask: Tensor) -> Tensor:
    """A 64-bit fingerprint (int64 scalar): the sum over packed bytes of byte * mix(position), modulo 2^64.

    A sum, so that pieces of one mask can be fingerprinted apart and added.
    """
    packed = pack(mask)
    total = torch.zeros((), dtype=torch.int64, device=mask.device)
    for begin, end in chunks(0, len(packed)):
        positions = torch.arange(begin, end, device=mask.device)
        total += (_mix(positions) * packed[begin:end]).sum()
    return total


def combine(digests: Mapping[str, int]) -> str:
    """One fingerprint (16 hex digits) of several masks by name, whatever their order."""
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 counters (finaliser of SplitMix64, Steele et al. 2014, with arithmetic shifts); odd results."""
    x = (x + 1) * -0x61C8_8646_80B5_83EB
    x = (x ^ (x >> 30)) * -0x40A7_B892_E31B_1A47
    x = (x ^ (x >> 27)) * -0x6B2F_B644_ECCE_EE15
    return (x ^ (x >> 31)) | 1
