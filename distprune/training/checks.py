"""Whether data, model and teacher fit together, found out before a run begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distprune.config.schema import TextClassification, Texts
from distprune.data import Inputs
from distprune.errors import ConfigError, reason
from distprune.pruning.prunable import reshard, unwrap
from distprune.training.buffers import copy_buffers, set_back_buffers
from distprune.training.features import Taps
from distprune.training.liveness import is_lost_rank
from distprune.training.logits import logits_of, to_device
from distprune.training.splits import Split
from distprune.training.tasks import cross_entropy, rows

MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def check_labels(train: Split, held_out: Split, key: str, split: str) -> None:
    """Refuse labels of the held-out `split`, which the setting `key` names, that training knows nothing of.

    Raises:
        ConfigError: names the first.
    """
    if held_out.labels is None:
        return
    beyond = (held_out.labels >= train.outputs).nonzero()
    if len(beyond):
        sample = int(beyond[0])
        raise ConfigError(
            f"{key}: sample {sample} of {split} has label {int(held_out.labels[sample])}, but "
            f"data.train_split has only {train.outputs} classes"
        )


def fit_to_texts(model: nn.Module, tokenizer: Any, data: Texts, key: str) -> None:
    """Let a model of transformers know with what texts are padded, and see that it takes their tokens.

    Raises:
        ConfigError: it takes shorter texts than data.max_length, or does not know all tokens.
    """
    config: Any = getattr(model, "config", None)
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    if config is None or embeddings is None:
        return
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and data.max_length > most:
        raise ConfigError(f"data.max_length: is {data.max_length}, but {_name(model)} ({key}) takes {most}; lower it")
    known = len(embeddings().weight)
    if known < len(tokenizer):
        raise ConfigError(
            f"{key}: {_name(model)} knows {known} tokens, but the tokenizer has {len(tokenizer)}; set "
            "data.tokenizer to that of the model"
        )
    if isinstance(data, TextClassification):
        config.pad_token_id = tokenizer.pad_token_id  # some look for the last token before it


def check_fit(model: nn.Module, inputs: Inputs, classes: int, accelerator: Accelerator, key: str = "model") -> int:
    """Run some inputs through the model, in eval mode.

    Returns:
        The number of its outputs.

    Raises:
        ConfigError: they do not fit the model, or it has fewer outputs than there are classes.
    """
    model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            inputs = to_device(inputs, _device(model))
            logits = logits_of(model, inputs)
            if isinstance(logits, Tensor) and isinstance(inputs, Mapping) and logits.dim() == 3:
                _refuse_to_look_ahead(model, inputs, logits, key)
    except ConfigError:
        raise
    except MISFITS as error:
        raise ConfigError(f"{key}: {_name(model)} does not take {_told(inputs)}: {reason(error)}") from error
    finally:
        reshard(model)
    return _outputs(logits, inputs, classes, model, key)


def check_teacher(
    teacher: nn.Module, taps: Taps, inputs: Inputs, outputs: int, classes: int, accelerator: Accelerator, key: str
) -> dict[str, Tensor]:
    """Run some inputs through the teacher of a student with so many outputs.

    Args:
        teacher: as it will teach.
        taps: of the modules of it that are matched.
        inputs: some.
        outputs: of the student.
        classes: of the data.
        accelerator: for autocast.
        key: the setting that names the teacher.

    Returns:
        What its modules gave.

    Raises:
        ConfigError: they do not fit the teacher, its outputs are not as many as the student's, or see `Taps.take`.
    """
    with taps:
        theirs = check_fit(teacher, inputs, classes, accelerator, key)
    if theirs != outputs:
        raise ConfigError(f"{key}: has {theirs} outputs, but the student has {outputs}; they must be as many")
    return taps.take()


def rehearse(model: nn.Module, inputs: Inputs, labels: Tensor, classes: int, accelerator: Accelerator) -> None:
    """Run some inputs forward and backward through the model as wrapped for training, and leave no trace in it.

    After this DDP has laid out its buckets for good. Without, the gradients of a run's first step were added up in
    another order than those of the others, and a run that goes on would not end with the same bytes.

    Raises:
        ConfigError: the model cannot be trained on them, or not by DDP.
    """
    buffers = copy_buffers(model)
    model.train()
    try:
        with accelerator.autocast():
            logits = logits_of(model, inputs)
        _outputs(logits, inputs, classes, model, "model", " in training mode")
        accelerator.backward(cross_entropy(*rows(logits, labels)))
    except MISFITS as error:
        if isinstance(error, ConfigError) or is_lost_rank(error):
            raise
        raise ConfigError(f"model: {_name(model)} cannot be trained on {_told(inputs)}: {reason(error)}") from error
    idle = [name for name, p in unwrap(model).named_parameters() if p.requires_grad and p.grad is None]
    if idle and isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"model: {', '.join(idle[:3])}{' and others' if len(idle) > 3 else ''} of {_name(model)} get no gradient, "
            "for which DDP waits in vain; set requires_grad to False, or take them out"
        )
    model.zero_grad(set_to_none=True)
    set_back_buffers(model, buffers)


def _refuse_to_look_ahead(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor, key: str) -> None:
    """Refuse language models that see the token which they are to foretell."""
    changed = inputs["input_ids"].clone()
    changed[:, 1:] = (changed[:, 1:] + 1) % logits.shape[-1]
    before, after = (x[:, 0].float() for x in (logits, logits_of(model, {**inputs, "input_ids": changed})))
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ConfigError(
            f"{key}: {_name(model)} sees the tokens that it is to foretell; take a causal language model, or set "
            f"{key}.args.is_decoder=true"
        )


def _outputs(logits: object, inputs: Inputs, classes: int, model: nn.Module, key: str, mode: str = "") -> int:
    texts = isinstance(inputs, Mapping)
    if not isinstance(logits, Tensor) or logits.dim() not in ((2, 3) if texts else (2,)):
        raise ConfigError(f"{key}: {_name(model)} does not return logits of shape (batch, classes){mode}")
    outputs = logits.shape[-1]
    if outputs >= classes:
        return outputs
    if logits.dim() == 3:
        raise ConfigError(
            f"{key}: {_name(model)} has {outputs} tokens, but the tokenizer has {classes}; set data.tokenizer to that "
            "of the model"
        )
    raise ConfigError(
        f"{key}: {_name(model)} has {outputs} outputs, but data has {classes} classes; set "
        f"{key}.args.{'num_labels' if texts else 'num_classes'}={classes}"
    )


def _device(model: nn.Module) -> torch.device:
    """Where a model runs; under FSDP it may still wait on the CPU."""
    return next(model.parameters()).device


def _name(model: nn.Module) -> str:
    return type(unwrap(model)).__name__.removeprefix("FSDP")


def _told(inputs: Inputs) -> str:
    if isinstance(inputs, Tensor):
        return f"images of {tuple(inputs.shape[1:])}"
    return f"{', '.join(inputs)} of {inputs['input_ids'].shape[1]} tokens"
