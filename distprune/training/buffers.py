"""Buffers of a model, such as the running statistics of batch norm: alike on all ranks, and set back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sync_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, as DDP does before it trains on: batch norm counts on each rank alone."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def copy_buffers(model: nn.Module) -> list[Tensor]:
    """Copies of the buffers as they are."""
    return [buffer.clone() for buffer in model.buffers()]


def set_back_buffers(model: nn.Module, copies: list[Tensor]) -> None:
    """Make the buffers what they were when `copies` were taken by `copy_buffers`."""
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), copies, strict=True):
            buffer.copy_(before)
