"""How a model is called, whatever it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distprune.data import Inputs


def logits_of(model: Callable[..., Any], inputs: Inputs) -> Any:
    """What the model returns for images, or for texts as keyword arguments; its `logits` where it returns more."""
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(outputs, "logits", outputs)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def count_samples(inputs: Inputs) -> int:
    """How many samples there are."""
    return len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))


def repeated(inputs: Inputs, count: int) -> Inputs:
    """As many samples as asked for: the first ones, again and again."""
    if isinstance(inputs, Tensor):
        return inputs[torch.arange(count, device=inputs.device) % len(inputs)]
    return {name: value[torch.arange(count, device=value.device) % len(value)] for name, value in inputs.items()}
