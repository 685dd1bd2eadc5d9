"""The last word of a run: weights, masks and a summary of counted figures."""

from __future__ import annotations

import json
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch.distributed as dist
from torch import nn

from distprune import __version__
from distprune.pruning import Pruner
from distprune.training.evaluation import EvalResult
from distprune.training.run_folder import RunFolder
from distprune.training.whole import count_zeros, plain_state, to_rank_0

PACKAGES = ("torch", "torchvision", "accelerate", "datasets", "wandb")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a result."""
    found = {"distprune": __version__, "python": platform.python_version(), "platform": sys.platform}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_tensors(folder: RunFolder, model: nn.Module, pruner: Pruner) -> None:
    """Write model.safetensors (zeros in place, keys of the plain model) and masks.safetensors (packed bits).

    Called on all ranks; the first writes.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    masks, weights = to_rank_0(pruner.state_dict()["masks"], rank), plain_state(model, rank)
    if rank == 0:
        shapes = {tensor.name: list(tensor.weight.shape) for tensor in pruner.tensors}
        # One entry, since the order of several is not always the same.
        folder.write_tensors(folder.masks.name, masks, {"shapes": json.dumps(shapes)})
        folder.write_tensors(folder.model.name, weights, {"format": "pt"})


def summarize(
    model: nn.Module, pruner: Pruner, dense: EvalResult, final: EvalResult, context: dict[str, Any]
) -> dict[str, Any]:
    """The summary of a run, zeros counted in the weights themselves. Called on all ranks.

    Args:
        model: the pruned model.
        pruner: holds its masks.
        dense, final: evaluations before pruning and at the end.
        context: steps, world_size, wall_s, train_samples_per_s, seed, and what came of rounds.
    """
    layers: dict[str, dict[str, Any]] = {}
    for tensor in pruner.tensors:
        zeros = count_zeros(tensor.weight)
        sparsity = zeros / tensor.numel if tensor.numel else 0.0
        layers[tensor.name] = {"shape": list(tensor.weight.shape), "zeros": zeros, "sparsity": sparsity}
    zeros = sum(layer["zeros"] for layer in layers.values())
    total = sum(p.numel() for p in model.parameters())
    return {
        "dense/top1": dense.top1,
        **final.figures(),
        "eval/top1_drop": dense.top1 - final.top1,
        **{f"dense/{name}/top1": result.top1 for name, result in dense.sets.items()},
        "prune/target_sparsity": pruner.schedule.sparsity(pruner.steps_done),
        "prune/sparsity": zeros / pruner.weights,
        "prune/zeros": zeros,
        "prune/weights": pruner.weights,
        "prune/layers": layers,
        "params/total": total,
        "params/nonzero": total - sum(count_zeros(p) for p in model.parameters()),
        "mask_digest": pruner.mask_digest,
        **context,
        "versions": versions(),
    }
