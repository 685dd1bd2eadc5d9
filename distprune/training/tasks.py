"""What is learnt: a task turns a batch into a loss and its parts. The loop never sees a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.data import PADDING, Inputs
from distprune.training.features import FeatureLoss
from distprune.training.logits import logits_of
from distprune.training.ramps import Ramp

Autocast = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class TaskOutput:
    """The loss of one batch, to be differentiated, and detached figures, all scalars and means over samples, or tokens.

    `figures` holds loss, loss_ce, top1 (a fraction) and, with a teacher, loss_kd; loss_feature where features are
    matched; kd_alpha and kd_temperature where these change.
    """

    loss: Tensor
    figures: dict[str, Tensor]


class Task(Protocol):
    """Runs the model on a batch."""

    def __call__(self, inputs: Inputs, labels: Tensor, step: int) -> TaskOutput:
        """Inputs are as the model takes them; labels are int64, N (of samples) or N x T (of tokens), `PADDING` where
        there is nothing to learn; `step` counts the optimizer steps done before."""
        ...


class Classification:
    """Cross-entropy on labels of samples or tokens.

    Args:
        model: the student.
        autocast: makes the context that it runs in.
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, model: Callable[..., Any], autocast: Autocast, label_smoothing: float = 0.0) -> None:
        self._model = model
        self._autocast = autocast
        self._label_smoothing = label_smoothing

    def __call__(self, inputs: Inputs, labels: Tensor, step: int) -> TaskOutput:
        """Cross-entropy, mean over what has a label."""
        with self._autocast():
            logits = logits_of(self._model, inputs)
        logits, labels = rows(logits, labels)
        loss = cross_entropy(logits, labels, self._label_smoothing)
        return TaskOutput(loss, {"loss": loss.detach(), "loss_ce": loss.detach(), "top1": _accuracy(logits, labels)})


class Distillation:
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE, batch mean (Hinton et al. 2015, arXiv:1503.02531).

    Of tokens it is the mean over those that have a label.
    Of several teachers the arithmetic mean of their softened probabilities is learnt (same paper, ensembles).
    The loss of features, where there is one, is added as it is.

    Args:
        model: the student.
        teachers: are frozen and put in eval mode; they are neither wrapped in DDP nor saved, but may be sharded.
        alpha: weight of the teachers, in [0, 1].
        temperature: divides the logits of all.
        autocast: makes the context that all run in.
        label_smoothing: of the cross-entropy.
        features: what is matched beside logits.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        teachers: Sequence[nn.Module],
        alpha: float | Ramp,
        temperature: float | Ramp,
        autocast: Autocast,
        label_smoothing: float = 0.0,
        features: FeatureLoss | None = None,
    ) -> None:
        self._model = model
        self._teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        self._alpha = alpha
        self._temperature = temperature
        self._autocast = autocast
        self._label_smoothing = label_smoothing
        self._features = features

    def __call__(self, inputs: Inputs, labels: Tensor, step: int) -> TaskOutput:
        """The distillation loss; figures hold its parts without alpha, loss_kd with T^2, loss_feature as weighted."""
        alpha, temperature = _at(self._alpha, step), _at(self._temperature, step)
        watching = nullcontext() if self._features is None else self._features.watching()
        with self._autocast(), watching:
            with torch.no_grad():
                taught = [rows(logits_of(teacher, inputs), labels)[0] for teacher in self._teachers]
            logits = logits_of(self._model, inputs)
        target = _mean_log_softmax([theirs / temperature for theirs in taught])
        logits, labels = rows(logits, labels)
        own = F.log_softmax(logits / temperature, dim=1)
        loss_kd = _divergence(own, target, labels) * temperature**2
        loss_ce = cross_entropy(logits, labels, self._label_smoothing)
        loss = alpha * loss_kd + (1 - alpha) * loss_ce
        parts = {"loss_ce": loss_ce, "loss_kd": loss_kd}
        if self._features is not None:
            with self._autocast():
                parts["loss_feature"] = self._features.loss()
            loss = loss + parts["loss_feature"]
        figures = {name: part.detach() for name, part in {"loss": loss, **parts}.items()}
        for name, value in (("kd_alpha", self._alpha), ("kd_temperature", self._temperature)):
            if isinstance(value, Ramp):
                # float32, of which a meter's sums are exact.
                figures[name] = torch.full((), value.at(step), dtype=torch.float32, device=loss.device)
        return TaskOutput(loss, {**figures, "top1": _accuracy(logits, labels)})


def rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float32 (N x classes) and labels (N), of tokens one row each."""
    return logits.flatten(0, -2).float(), labels.flatten()


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over rows that have a label."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_index=PADDING)


def _divergence(own: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """KL(target || own) of logarithms of probabilities (N x classes), mean over rows that have a label."""
    # No class is likely, so nothing is added up; choosing rows would wait for the device to count them.
    target = target.masked_fill_((labels == PADDING)[:, None], torch.finfo(target.dtype).min)
    return F.kl_div(own, target, reduction="sum", log_target=True) / (labels != PADDING).sum()


def _at(value: float | Ramp, step: int) -> float:
    return value.at(step) if isinstance(value, Ramp) else value


def _mean_log_softmax(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the arithmetic mean of several softmaxes (N x classes)."""
    each = torch.stack([F.log_softmax(scaled, dim=1) for scaled in logits])
    return each.logsumexp(0) - math.log(len(logits))


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).sum() / (labels != PADDING).sum()
