"""Whether data, model and teacher fit together, found out before a run begins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distprune.data import ImageData
from distprune.errors import ConfigError, reason
from distprune.pruning.prunable import reshard, unwrap
from distprune.training.buffers import copy_buffers, set_back_buffers
from distprune.training.features import Taps
from distprune.training.liveness import is_lost_rank

MISFITS = (RuntimeError, ValueError, TypeError, AssertionError)


def check_labels(train: ImageData, held_out: ImageData, key: str, split: str) -> None:
    """Refuse labels of the held-out `split`, which the setting `key` names, that training knows nothing of.

    Raises:
        ConfigError: names the first.
    """
    beyond = (held_out.labels >= len(train.classes)).nonzero()
    if len(beyond):
        sample = int(beyond[0])
        raise ConfigError(
            f"{key}: sample {sample} of {split} has label {int(held_out.labels[sample])}, but "
            f"data.train_split has only {len(train.classes)} classes"
        )


def check_fit(model: nn.Module, images: Tensor, classes: int, accelerator: Accelerator, key: str = "model") -> int:
    """Run images through the model, in eval mode.

    Returns:
        The number of its outputs.

    Raises:
        ConfigError: images do not fit the model, or it has fewer outputs than there are classes.
    """
    model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            logits = model(images.to(_device(model)))
    except MISFITS as error:
        raise ConfigError(f"{key}: {_name(model)} does not take images of {_shape(images)}: {reason(error)}") from error
    finally:
        reshard(model)
    return _outputs(logits, classes, model, key)


def check_teacher(
    teacher: nn.Module, taps: Taps, images: Tensor, outputs: int, classes: int, accelerator: Accelerator, key: str
) -> dict[str, Tensor]:
    """Run images through the teacher of a student with so many outputs.

    Args:
        teacher: as it will teach.
        taps: of the modules of it that are matched.
        images: some.
        outputs: of the student.
        classes: of the data.
        accelerator: for autocast.
        key: the setting that names the teacher.

    Returns:
        What its modules gave.

    Raises:
        ConfigError: images do not fit the teacher, its outputs are not as many as the student's, or see `Taps.take`.
    """
    with taps:
        theirs = check_fit(teacher, images, classes, accelerator, key)
    if theirs != outputs:
        raise ConfigError(f"{key}: has {theirs} outputs, but the student has {outputs}; they must be as many")
    return taps.take()


def rehearse(model: nn.Module, images: Tensor, labels: Tensor, classes: int, accelerator: Accelerator) -> None:
    """Run images forward and backward through the model as wrapped for training, and leave no trace in it.

    After this DDP has laid out its buckets for good. Without, the gradients of a run's first step were added up in
    another order than those of the others, and a run that goes on would not end with the same bytes.

    Raises:
        ConfigError: the model cannot be trained on them, or not by DDP.
    """
    buffers = copy_buffers(model)
    model.train()
    try:
        with accelerator.autocast():
            logits = model(images)
        _outputs(logits, classes, model, "model", " in training mode")
        accelerator.backward(F.cross_entropy(logits.float(), labels))
    except MISFITS as error:
        if isinstance(error, ConfigError) or is_lost_rank(error):
            raise
        raise ConfigError(
            f"model: {_name(model)} cannot be trained on images of {_shape(images)}: {reason(error)}"
        ) from error
    idle = [name for name, p in unwrap(model).named_parameters() if p.requires_grad and p.grad is None]
    if idle and isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"model: {', '.join(idle[:3])}{' and others' if len(idle) > 3 else ''} of {_name(model)} get no gradient, "
            "for which DDP waits in vain; set requires_grad to False, or take them out"
        )
    model.zero_grad(set_to_none=True)
    set_back_buffers(model, buffers)


def _outputs(logits: object, classes: int, model: nn.Module, key: str, mode: str = "") -> int:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError(f"{key}: {_name(model)} does not return logits of shape (batch, classes){mode}")
    if logits.shape[1] < classes:
        raise ConfigError(
            f"{key}: {_name(model)} has {logits.shape[1]} outputs, but data has {classes} classes; set "
            f"{key}.args.num_classes={classes}"
        )
    return logits.shape[1]


def _device(model: nn.Module) -> torch.device:
    """Where a model runs; under FSDP it may still wait on the CPU."""
    return next(model.parameters()).device


def _name(model: nn.Module) -> str:
    return type(unwrap(model)).__name__.removeprefix("FSDP")


def _shape(images: Tensor) -> tuple[int, ...]:
    return tuple(images.shape[1:])
