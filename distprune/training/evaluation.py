"""Accuracy counted: sums over samples and ranks, divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.pruning.collectives import Ranks


@dataclass(frozen=True)
class EvalResult:
    """Top-1 accuracy in percent and mean cross-entropy over `samples` samples, each counted once."""

    top1: float
    loss: float
    samples: int


def sync_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, as DDP does before it trains on: batch norm counts on each rank alone."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[None]],
    device: torch.device,
) -> EvalResult:
    """Evaluate `model` on every rank's batches of normalised images and labels.

    The model must not be wrapped in DDP, whose forward waits for other ranks: parts may differ in length. It is left
    in the mode, train or eval, that it came in.
    """
    sync_buffers(model)
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.inference_mode(), autocast():
        for images, labels in batches:
            logits = model(images).float()
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
            sums[2] += len(labels)
    model.train(was_training)
    correct, loss, samples = Ranks().sum(sums).tolist()
    return EvalResult(100 * correct / samples, loss / samples, int(samples))
