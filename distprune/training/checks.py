"""Whether data, model and teacher fit together, found out before a run begins."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distprune.data import ImageData
from distprune.errors import ConfigError


def check_labels(train: ImageData, held_out: ImageData, name: str) -> None:
    """Refuse labels of the held-out split `name` that training knows nothing of.

    Raises:
        ConfigError: names the first.
    """
    beyond = (held_out.labels >= len(train.classes)).nonzero()
    if len(beyond):
        sample = int(beyond[0])
        raise ConfigError(
            f"data.eval_split: sample {sample} of {name} has label {int(held_out.labels[sample])}, but "
            f"data.train_split has only {len(train.classes)} classes"
        )


def check_teacher(teacher: nn.Module, student: nn.Module, images: Tensor, classes: int, ranks: Accelerator) -> None:
    """Run two images through the teacher and the student.

    Raises:
        ConfigError: images do not fit the teacher, or its outputs are not as many as the student's.
    """
    check_fit(teacher, images, classes, ranks, "distill.teacher")
    with torch.no_grad(), ranks.autocast():
        theirs, ours = (net.eval()(images[:2]).shape[1] for net in (teacher, student))
    if theirs != ours:
        raise ConfigError(f"distill.teacher: has {theirs} outputs, but the student has {ours}; they must be as many")


def check_fit(
    model: nn.Module, images: Tensor, classes: int, accelerator: Accelerator, key: str = "model", train: bool = False
) -> None:
    """Run two images through the model, or through a copy of it in training mode.

    Raises:
        ConfigError: images do not fit the model, or it has fewer outputs than there are classes.
    """
    shape, name = tuple(images.shape[1:]), type(model).__name__
    model = copy.deepcopy(model).train() if train else model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            logits = model(images[:2])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {name} does not take images of {shape}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        mode = " in training mode" if train else ""
        raise ConfigError(f"{key}: {name} does not return logits of shape (batch, classes){mode}")
    if logits.shape[1] < classes:
        raise ConfigError(
            f"{key}: {name} has {logits.shape[1]} outputs, but data has {classes} classes; set "
            f"{key}.args.num_classes={classes}"
        )
