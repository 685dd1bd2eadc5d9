"""Whole tensors out of shards, where a file of them is written."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distprune.structured import layout
from distprune.structured.shrink import Kept


def to_rank_0(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Whole tensors on the CPU, each on memory of its own, on rank 0; nothing on the others. Called on all ranks.

    One tensor at a time is gathered, so that no device holds more than the largest.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
        if rank == 0:
            whole[name] = torch.empty_like(full, device="cpu", memory_format=torch.contiguous_format).copy_(full)
    return whole


def count_zeros(tensor: Tensor) -> int:
    """Zeros in a tensor, over all its shards. Called on all ranks."""
    zeros = (tensor.detach() == 0).sum()
    return int(zeros.full_tensor() if isinstance(zeros, DTensor) else zeros)


def metadata(kept: Kept) -> dict[str, str]:
    """Of a file of a plain state: which channels are left, where some were removed."""
    # One entry, since the order of several is not always the same.
    return {"channels": json.dumps(layout(kept))} if kept else {"format": "pt"}


def plain_state(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """The state_dict of the bare model, whole, on rank 0; tied tensors are repeated. Called on all ranks."""
    return to_rank_0(model.state_dict(), rank)
