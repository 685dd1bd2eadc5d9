"""Accuracy counted: sums over samples and ranks, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distprune.data import PADDING, Batch
from distprune.pruning.collectives import Ranks
from distprune.pruning.prunable import reshard
from distprune.training.buffers import sync_buffers
from distprune.training.logits import logits_of
from distprune.training.tasks import rows

LARGEST = 700.0
"""Of losses whose exponential is a float."""


@dataclass(frozen=True)
class EvalResult:
    """Top-1 accuracy in percent and mean cross-entropy over `samples` samples, or tokens, each counted once."""

    top1: float
    loss: float
    samples: int
    sets: dict[str, EvalResult] = field(default_factory=dict)
    """The same of more sets, by name."""
    of_tokens: bool = False
    """Whether tokens were foretold, of which there is a perplexity."""

    @classmethod
    def restored(cls, values: dict[str, Any]) -> EvalResult:
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**values, "sets": {name: cls.restored(inner) for name, inner in values["sets"].items()}})

    @property
    def correct(self) -> int:
        """Samples whose class was found."""
        return round(self.top1 * self.samples / 100)

    def figures(self) -> dict[str, float]:
        """Under the names that trackers know."""
        named = {"": self} | {f"{name}/": result for name, result in self.sets.items()}
        return {f"eval/{name}{key}": value for name, result in named.items() for key, value in result._own().items()}

    def _own(self) -> dict[str, float]:
        own = {"top1": self.top1, "loss": self.loss}
        if self.of_tokens:
            own["perplexity"] = math.exp(self.loss) if self.loss < LARGEST else math.inf
        return own


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    autocast: Callable[[], AbstractContextManager[None]],
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
    alone: bool = False,
) -> EvalResult:
    """Evaluate `model` on every rank's batches of inputs and labels, as many on each rank.

    The model must not be wrapped in DDP, whose forward broadcasts buffers. It is left in the mode, train or eval, that
    it came in.

    Args:
        model: the bare model; it may be sharded.
        batches: samples and tokens of label `PADDING` are not counted.
        autocast: makes the context that the model runs in.
        device: of the batches.
        after_batch: called after each batch on all ranks; what it raises ends the evaluation.
        alone: count what this rank has and nothing else; other ranks know nothing of it.
    """
    if not alone:
        sync_buffers(model)
    was_training, of_tokens = model.training, False
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    try:
        with torch.no_grad(), autocast():
            for inputs, labels in batches:
                of_tokens = labels.dim() > 1
                logits, labels = rows(logits_of(model, inputs), labels)
                sums[0] += (logits.argmax(1) == labels).sum()
                sums[1] += F.cross_entropy(logits, labels, reduction="sum", ignore_index=PADDING)
                sums[2] += (labels != PADDING).sum()
                after_batch()
    finally:
        model.train(was_training)
        reshard(model)
    correct, loss, samples = (sums if alone else Ranks().sum(sums)).tolist()
    return EvalResult(100 * correct / samples, loss / samples, int(samples), of_tokens=of_tokens)
