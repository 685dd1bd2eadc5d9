"""The last word of a run: weights, masks and a summary of counted figures."""

from __future__ import annotations

import copy
import json
import platform
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distprune import __version__
from distprune.pruning import MaskHolder, MaskMismatchError
from distprune.structured import ChannelPruner
from distprune.tracking.logs import logger
from distprune.training.checkpoint import CheckpointError
from distprune.training.evaluation import EvalResult
from distprune.training.run_folder import RunFolder
from distprune.training.run_state import RunState
from distprune.training.shrinking import Shrinking
from distprune.training.whole import count_zeros, to_rank_0

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "wandb")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a result."""
    found = {"distprune": __version__, "python": platform.python_version(), "platform": sys.platform}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_tensors(folder: RunFolder, pruner: MaskHolder, shrinking: Shrinking) -> None:
    """Write model.safetensors (zeros in place, keys of the plain model) and masks.safetensors (packed bits).

    Called on all ranks; the first writes.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    masks = to_rank_0(pruner.state_dict()["masks"], rank)
    weights, about = shrinking.saved()
    if rank == 0:
        if isinstance(pruner, ChannelPruner):
            shapes = {group.name: [group.size] for group in pruner.channels.groups}
        else:
            shapes = {tensor.name: list(tensor.weight.shape) for tensor in pruner.tensors}
        # One entry, since the order of several is not always the same.
        folder.write_tensors(folder.masks.name, masks, {"shapes": json.dumps(shapes)})
        folder.write_tensors(folder.model.name, weights, about)


def write_best(folder: RunFolder, run_state: RunState, shrinking: Shrinking, step: int) -> None:
    """Write best.safetensors, where another step than the last, `step`, was the best at the final sparsity.

    The model and all else is that of the best step afterwards. Called on all ranks; the first writes.
    """
    best = run_state.best_step
    if best is None or best == step:
        return
    try:
        run_state.go_to_best()
    except (CheckpointError, MaskMismatchError, ValueError) as error:
        logger.warning(f"{folder.best.name} is not written: {error}")
        return
    shrinking.at_end(best, 0.0)
    weights, about = shrinking.saved()
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.write_tensors(folder.best.name, weights, about)


def write_transformer(folder: RunFolder, model: nn.Module, tokenizer: Any) -> None:
    """Write config.json and the tokenizer, with which `from_pretrained` of transformers takes the folder for a model.

    Nothing is written beside other models.

    Args:
        folder: of the run.
        model: bare.
        tokenizer: of its texts; None of images.
    """
    config: Any = getattr(model, "config", None)
    if tokenizer is None or not hasattr(config, "to_json_string"):
        return
    told = copy.deepcopy(config)
    told.use_cache = True
    told.architectures = [type(model).__name__.removeprefix("FSDP")]
    folder.write_text("config.json", told.to_json_string())
    with TemporaryDirectory(dir=folder.path) as partial:
        for file in tokenizer.save_pretrained(partial):
            if Path(file).is_file():
                Path(file).replace(folder.path / Path(file).name)


def summarize(
    model: nn.Module,
    pruner: MaskHolder,
    shrinking: Shrinking,
    dense: EvalResult,
    final: EvalResult,
    context: dict[str, Any],
) -> dict[str, Any]:
    """The summary of a run, zeros counted in the weights themselves. Called on all ranks.

    Args:
        model: the pruned model, bare.
        pruner: holds its masks.
        shrinking: knows what was removed.
        dense, final: evaluations before pruning and at the end.
        context: steps, world_size, wall_s, train_samples_per_s, seed, and what came of rounds.
    """
    total = sum(p.numel() for p in model.parameters())
    nonzero = total - sum(count_zeros(p) for p in model.parameters())
    pruned = (
        _pruned_channels(pruner, shrinking, total)
        if isinstance(pruner, ChannelPruner)
        else {**_pruned_weights(pruner), "params/total": total}
    )
    return {
        "dense/top1": dense.top1,
        **final.figures(),
        "eval/top1_drop": dense.top1 - final.top1,
        **{f"dense/{name}/top1": result.top1 for name, result in dense.sets.items()},
        "prune/target_sparsity": pruner.schedule.sparsity(pruner.steps_done),
        **pruned,
        "params/nonzero": nonzero,
        "mask_digest": pruner.mask_digest,
        **context,
        "versions": versions(),
    }


def _pruned_weights(pruner: MaskHolder) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = {}
    for tensor in pruner.tensors:
        zeros = count_zeros(tensor.weight)
        sparsity = zeros / tensor.numel if tensor.numel else 0.0
        layers[tensor.name] = {"shape": list(tensor.weight.shape), "zeros": zeros, "sparsity": sparsity}
    zeros = sum(layer["zeros"] for layer in layers.values())
    return {
        "prune/sparsity": zeros / pruner.weights,
        "prune/zeros": zeros,
        "prune/weights": pruner.weights,
        "prune/layers": layers,
    }


def _pruned_channels(pruner: ChannelPruner, shrinking: Shrinking, total: int) -> dict[str, Any]:
    """Of the layers, zeros are channels that are gone; in all, weights of channels that are gone or 0."""
    channels, kept = pruner.channels, pruner.kept
    every = torch.ones_like(kept)
    return {
        "prune/sparsity": pruner.sparsity,
        "prune/budget": pruner.budget,
        "prune/zeros": pruner.zeros,
        "prune/weights": pruner.weights,
        "prune/layers": {
            name: {"shape": list(layer.shape), "zeros": layer.zeros, "sparsity": layer.sparsity}
            for name, layer in pruner.layers().items()
        },
        "prune/shrinks": [asdict(shrunk) for shrunk in shrinking.done],
        "params/dense": channels.count_parameters(every),
        "params/total": channels.count_parameters(kept) if shrinking.removes else total,
        "macs/dense": channels.count_macs(every),
        "macs/left": channels.count_macs(kept),
    }
