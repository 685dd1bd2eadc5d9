"""The state of a Pruner as whole tensors, whatever the ranks hold, so that any number of ranks can go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distprune.pruning import Prunable, Pruner
from distprune.pruning import masks as mask_ops
from distprune.pruning.collectives import Ranks


def whole_state(pruner: Pruner) -> dict[str, Any]:
    """`pruner.state_dict()` with whole tensors on the CPU in place of shards. Called on all ranks."""
    masks = {t.name: mask_ops.pack(_whole_mask(pruner.masks[t.name], t)).cpu() for t in pruner.tensors}
    state = pruner.state_dict()
    observed = {
        name: seen.full_tensor() if isinstance(seen, DTensor) else seen for name, seen in state["observed"].items()
    }
    return {**state, "masks": masks, "observed": {name: seen.cpu().contiguous() for name, seen in observed.items()}}


def load_whole_state(pruner: Pruner, state: Mapping[str, Any]) -> None:
    """Take masks and step from `whole_state()`, each rank its part. Called on all ranks, weights being loaded already.

    Raises:
        ValueError: the state is of other tensors, or of other weights: some that it prunes are not 0.
        MaskMismatchError: see `Pruner.verify`.
    """
    tensors = {t.name: t for t in pruner.tensors}
    masks = {
        name: _part_of_mask(bits, tensors[name]) if name in tensors else bits for name, bits in state["masks"].items()
    }
    observed = {
        name: seen[_place(tensors[name])] if name in tensors else seen for name, seen in state["observed"].items()
    }
    alive = _alive(pruner)
    pruner.load_state_dict({**state, "masks": masks, "observed": observed})
    if alive != _alive(pruner):
        raise ValueError("the masks are of other weights: some of those that they prune are not 0")


def _whole_mask(mask: Tensor, tensor: Prunable) -> Tensor:
    weight = tensor.weight
    if not isinstance(weight, DTensor):
        return mask
    shape, stride = weight.shape, weight.stride()
    part = DTensor.from_local(
        mask.view(torch.uint8), weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    )
    return part.full_tensor().bool()


def _part_of_mask(packed: Tensor, tensor: Prunable) -> Tensor:
    whole = torch.empty(tensor.part.whole, dtype=torch.bool)
    mask_ops.check_packed(packed, whole, tensor.name)
    mask_ops.unpack(packed, whole)
    return mask_ops.pack(whole[_place(tensor)])


def _place(tensor: Prunable) -> tuple[slice, ...]:
    """Where the part on this rank lies in the whole."""
    part = tensor.part
    return tuple(slice(start, start + length) for start, length in zip(part.start, part.shape, strict=True))


def _alive(pruner: Pruner) -> int:
    """Weights that are not 0, added up over ranks, each counting what it holds."""
    return int(Ranks().sum(torch.stack([torch.count_nonzero(t.local) for t in pruner.tensors]).sum()))
