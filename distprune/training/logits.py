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
