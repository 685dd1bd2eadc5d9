"""Channels reordered before N:M pruning, so that it keeps more, without changing what the model computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distprune.pruning.chains import Chain, find_chains
from distprune.pruning.patterns import NM
from distprune.pruning.permutation import ESCAPES, find_permutation, kept
from distprune.pruning.prunable import find_prunable

TOLERANCE = 1e-5
"""How much outputs may change, a fraction of the largest."""


@dataclass(frozen=True)
class Permutations:
    """Orders of channels that keep more, and what they are good for.

    Attributes:
        found: chains of channels, each with its new order.
        before, after: what the pattern keeps of the magnitudes of all weights that fit it, fractions.
        left_out: weights that fit the pattern and whose input channels stay in their order (name -> reason).
    """

    found: tuple[tuple[Chain, tuple[int, ...]], ...]
    before: float
    after: float
    left_out: dict[str, str]

    def apply(self, model: nn.Module) -> None:
        """Reorder the channels of `model`, the one they were found for or another with the same weights."""
        for chain, order in self.found:
            chain.reorder(model, order)


def permute_channels(
    model: nn.Module,
    pattern: NM,
    inputs: Sequence[Any],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    escapes: int = ESCAPES,
) -> Permutations:
    """Reorder channels so that N:M keeps more magnitude, after Pool and Yu 2021 ("Channel Permutations for N:M
    Sparsity", NeurIPS); the model computes what it computed before.

    The layers that make some channels, carry them on and take them are reordered alike; see `distprune.pruning.chains`
    for what is understood. Channels that run into anything else, the model's inputs and outputs stay as they are. Call
    it before the optimizer is made, and before wrapping and sharding.

    Args:
        model: the bare model; changed in place.
        pattern: which it will be pruned by.
        inputs: one batch for `model(*inputs)`, on its device, to trace and check it with.
        include, exclude: what will be pruned, see `find_prunable`.
        escapes: see `find_permutation`.

    Raises:
        ValueError: see `find_permutations`.
    """
    permutations = find_permutations(model, pattern, inputs, include=include, exclude=exclude, escapes=escapes)
    permutations.apply(model)
    return permutations


@torch.no_grad()
def find_permutations(
    model: nn.Module,
    pattern: NM,
    inputs: Sequence[Any],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    escapes: int = ESCAPES,
    device: torch.device | None = None,
) -> Permutations:
    """What `permute_channels` does to a model, not yet done.

    A copy of the model is run in float64 before and after each, with what has one dimension (biases, norms) drawn anew,
    since that of a new model is alike for all channels. What changes its outputs is left out.

    Args:
        model, pattern, inputs, include, exclude, escapes: see `permute_channels`.
        device: where to search; None takes that of the weights.

    Raises:
        ValueError: the model cannot be traced or has weights that it does not reach; or see `find_prunable`.
    """
    weights = {t.name: t.weight for t in find_prunable(model, include, exclude, unfit=pattern.unfit).tensors}
    twin = _twin(model)
    inputs = [_doubled(value) for value in inputs]
    expected = _outputs(twin, inputs)
    found: list[tuple[Chain, tuple[int, ...]]] = []
    left_out = dict.fromkeys(weights, "its input channels are made by no layer that was followed")
    total = sum(float(w.abs().sum(dtype=torch.float64)) for w in weights.values())
    gain = 0.0
    before = sum(kept(_by_channel(w), pattern) for w in weights.values())
    for chain in find_chains(twin, inputs):
        takers = [use for use in chain.uses if use.takes and use.name in weights]
        moved = [_by_channel(weights[use.name]) for use in takers if use.times == 1]
        why = chain.fixed
        if why is None and any(use.times > 1 and use.times % pattern.m for use in takers):
            why = f"channels are flattened before it, to more inputs than groups of {pattern.m} divide"
        elif why is None and not moved:
            why = "channels are flattened before it, and groups lie within one"
        if why is None:
            magnitudes = torch.cat(moved).to(device)
            order = find_permutation(magnitudes, pattern, escapes)
            chain.reorder(twin, order.tolist())
            if _agree(_outputs(twin, inputs), expected):
                found.append((chain, tuple(order.tolist())))
                gain += kept(magnitudes[:, order], pattern) - kept(magnitudes, pattern)
            else:
                chain.reorder(twin, order.argsort().tolist())
                why = "the outputs change with the order of its input channels"
        for use in takers:
            if why is None:
                del left_out[use.name]
            else:
                left_out[use.name] = why
    return Permutations(tuple(found), before / total, (before + gain) / total, left_out)


def _by_channel(weight: Tensor) -> Tensor:
    """Magnitudes of a weight, float32, of shape (all else, input channels)."""
    by_input = weight.detach().abs().float().movedim(1, -1)
    return by_input.reshape(-1, by_input.shape[-1])


def _twin(model: nn.Module) -> nn.Module:
    """A copy for checks: float64, in evaluation mode, one-dimensional tensors drawn between 0.5 and 1.5."""
    twin = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in twin.state_dict().values():
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.copy_(torch.rand(len(tensor), generator=generator, dtype=torch.float64) + 0.5)
    return twin


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _outputs(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(model(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _agree(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(
        bool((one - other).abs().max() <= TOLERANCE * other.abs().max())
        for one, other in zip(outputs, expected, strict=True)
    )
