"""What the layers of a model cost: weights, zeros, and multiply-accumulates, dense and effective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distprune.data import Inputs
from distprune.structured.attention import ThinAttention
from distprune.training.logits import count_samples, logits_of

BY_WEIGHT = ("convolution", "_convolution", "addmm", "mm", "linear")
"""Operations whose work is in proportion to the weights that are not 0."""


@dataclass(frozen=True)
class LayerCost:
    """One layer, or the rest of the model.

    Attributes:
        shape: of its largest weight.
        weights: parameters of two and more dimensions that are its own.
        zeros: how many of these are 0.
        macs: multiply-accumulates for one sample, half of what torch's FLOP counter counts.
        effective_macs: without those by weights that are 0.
    """

    shape: tuple[int, ...]
    weights: int
    zeros: int
    macs: int
    effective_macs: int


def layer_costs(model: nn.Module, inputs: Inputs) -> dict[str, LayerCost]:
    """The cost of every layer that does work, and of embeddings, by name, in the order of the model.

    Args:
        model: bare; run once, in evaluation mode.
        inputs: some samples on its device, over which work is divided.
    """
    samples = count_samples(inputs)
    flops = _flops_by_module(model, inputs)
    costs = {}
    for name, module in model.named_modules():
        own = flops.get(name, {})
        weights = _weights(module)
        if not own and not isinstance(module, nn.Embedding):
            continue
        total, zeros = sum(w.numel() for w in weights), sum(w.numel() - int(w.count_nonzero()) for w in weights)
        density = 1 - zeros / total if total else 1.0
        by_weight = sum(amount for kind, amount in own.items() if kind in BY_WEIGHT)
        every = sum(own.values())
        costs[name] = LayerCost(
            tuple(max(weights, key=Tensor.numel).shape) if weights else (),
            total,
            zeros,
            every // (2 * samples),
            round((every - by_weight + by_weight * density) / (2 * samples)),
        )
    return costs


def parameters(model: nn.Module) -> tuple[int, int]:
    """How many there are, and how many are not 0."""
    return sum(p.numel() for p in model.parameters()), sum(int(p.count_nonzero()) for p in model.parameters())


def _weights(module: nn.Module) -> list[Tensor]:
    """Those that a module multiplies by itself."""
    own: list[Tensor] = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    if isinstance(module, (nn.MultiheadAttention, ThinAttention)):
        own.append(module.out_proj.weight)  # which is not called as a module
    return own


def _flops_by_module(model: nn.Module, inputs: Inputs) -> dict[str, dict[str, int]]:
    """FLOPs of one run by module and operation, without those of modules within."""
    counter = FlopCounterMode(display=False)
    was_training = model.training
    model.eval()
    # Attention has a fast path without gradients, and kernels on CPUs, which the counter does not know.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        logits_of(model, inputs)
    model.train(was_training)
    root = type(model).__name__
    whole: dict[str, dict[str, int]] = {}
    for key, counts in counter.get_flop_counts().items():
        if key == root or key.startswith(f"{root}."):
            name = key.removeprefix(root).removeprefix(".")
            whole[name] = {_kind(operation): int(amount) for operation, amount in counts.items()}
    own: dict[str, dict[str, int]] = {}
    for name, counts in whole.items():
        within = [other for other in whole if _is_child(other, name, whole)]
        rest = {kind: amount - sum(whole[w].get(kind, 0) for w in within) for kind, amount in counts.items()}
        if any(rest.values()):
            own[name] = {kind: amount for kind, amount in rest.items() if amount}
    return own


def _is_child(name: str, parent: str, whole: dict[str, Any]) -> bool:
    """Whether a counted module lies in another with no counted one between."""
    above = name
    while above:
        above = above.rpartition(".")[0]
        if above in whole:
            return above == parent
    return False


def _kind(operation: Any) -> str:
    return str(operation).rpartition(".")[2]
