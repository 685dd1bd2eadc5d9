"""Running a model on example inputs, whatever it takes and gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run(model: nn.Module, example: Any) -> Any:
    """The outputs of a model, of a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def tensors(values: Any) -> Iterable[Tensor]:
    """All tensors, whatever holds them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)


def moved(example: Any, dtype: torch.dtype) -> Any:
    """The same on the CPU, floats as `dtype`."""
    if isinstance(example, Tensor):
        return example.detach().to("cpu", dtype) if example.is_floating_point() else example.detach().cpu()
    if isinstance(example, Mapping):
        return {name: moved(value, dtype) for name, value in example.items()}
    return tuple(moved(value, dtype) for value in example) if isinstance(example, (tuple, list)) else example
