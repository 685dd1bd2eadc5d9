"""What models of Hugging Face's transformers call their parts, for whoever trains them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from distprune.pruning.prunable import prunable_by_default


def head_names(model: nn.Module) -> list[str]:
    """Names of the parameters of output heads: what a model adds to its base model, and its output embeddings.

    Empty where no part of `model` is a PreTrainedModel. Weights tied to an embedding are not among them.
    """
    heads: set[int] = set()
    for part in _pretrained(model):
        heads |= _ids(part) - _ids(part.base_model) | _ids(part.get_output_embeddings())
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in heads - tables]


def further_weights(model: nn.Module) -> list[str]:
    """Names of the weights of linear maps that are no `nn.Linear`: Conv1D of GPT-2 and its kin, and those of all
    experts of a layer in one tensor of three dimensions."""
    if next(_pretrained(model), None) is None:
        return []
    from transformers.pytorch_utils import Conv1D

    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, Conv1D):
            found.add(id(module.weight))
        elif type(module).__name__.endswith("Experts"):
            found |= {id(parameter) for parameter in module.parameters(recurse=False) if parameter.dim() == 3}
    return [name for name, parameter in model.named_parameters() if id(parameter) in found]


def chosen(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str],
    embeddings: bool,
    *,
    head: bool = False,
    pattern: bool = False,
) -> tuple[list[str], list[str]]:
    """What to include and to exclude, see `find_prunable`, where heads are spared and linear maps of all kinds pruned.

    Args:
        model: bare.
        include, exclude, embeddings: as asked for. If `include` is given, it says also whether heads are pruned.
        head: prune output heads too.
        pattern: whether weights are pruned in a pattern, which follows dimension 1; the inputs of linear maps that are
            no `nn.Linear` lie along another, so these stay dense.
    """
    include, exclude, further = list(include), list(exclude), further_weights(model)
    if not include:
        exclude += [] if head else head_names(model)
        if further:
            include = [*prunable_by_default(model, embeddings)[0], *further]
    return include, exclude + (further if pattern else [])


def _pretrained(model: nn.Module) -> Iterator[Any]:
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        yield from (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _ids(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(parameter) for parameter in module.parameters()}
