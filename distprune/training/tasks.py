"""What is learnt: a task turns a batch into a loss and its parts. The loop never sees a teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Autocast = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class TaskOutput:
    """The loss of one batch, to be differentiated, and detached figures, all scalars and means over the batch.

    `figures` holds loss, loss_ce, top1 (a fraction) and, with a teacher, loss_kd.
    """

    loss: Tensor
    figures: dict[str, Tensor]


class Task(Protocol):
    """Runs the model on a batch."""

    def __call__(self, images: Tensor, labels: Tensor) -> TaskOutput:
        """Images are normalised, N x C x H x W; labels are int64, N."""
        ...


class Classification:
    """Cross-entropy on class labels.

    Args:
        model: as wrapped for training.
        autocast: makes the context that it runs in.
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, model: nn.Module, autocast: Autocast, label_smoothing: float = 0.0) -> None:
        self._model = model
        self._autocast = autocast
        self._label_smoothing = label_smoothing

    def __call__(self, images: Tensor, labels: Tensor) -> TaskOutput:
        """Cross-entropy, batch mean."""
        with self._autocast():
            logits = self._model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        return TaskOutput(loss, {"loss": loss.detach(), "loss_ce": loss.detach(), "top1": _accuracy(logits, labels)})


class Distillation:
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE, batch mean (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        model: the student, as wrapped for training.
        teacher: is frozen and put in eval mode; it is neither wrapped in DDP nor saved, but may be sharded.
        alpha: weight of the teacher, in [0, 1].
        temperature: divides the logits of both.
        autocast: makes the context that both run in.
        label_smoothing: of the cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        alpha: float,
        temperature: float,
        autocast: Autocast,
        label_smoothing: float = 0.0,
    ) -> None:
        self._model = model
        self._teacher = teacher.eval().requires_grad_(False)
        self._alpha = alpha
        self._temperature = temperature
        self._autocast = autocast
        self._label_smoothing = label_smoothing

    def __call__(self, images: Tensor, labels: Tensor) -> TaskOutput:
        """The distillation loss; figures hold its two parts unweighted, loss_kd with the factor T^2."""
        with self._autocast():
            with torch.no_grad():
                taught = self._teacher(images)
            logits = self._model(images)
        target = F.log_softmax(taught.float() / self._temperature, dim=1)
        logits = logits.float()
        own = F.log_softmax(logits / self._temperature, dim=1)
        loss_kd = F.kl_div(own, target, reduction="batchmean", log_target=True) * self._temperature**2
        loss_ce = F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        loss = self._alpha * loss_kd + (1 - self._alpha) * loss_ce
        parts = {"loss": loss, "loss_ce": loss_ce, "loss_kd": loss_kd}
        figures = {name: part.detach() for name, part in parts.items()}
        return TaskOutput(loss, {**figures, "top1": _accuracy(logits, labels)})


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).float().mean()
