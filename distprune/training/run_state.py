"""All that a run must know to go on: what goes into a checkpoint, and how it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from distprune.config import Config
from distprune.errors import ConfigError
from distprune.pruning import Pruner
from distprune.training.checkpoint import Checkpoint, CheckpointError, Checkpoints
from distprune.training.evaluation import sync_buffers

# What may change between the starts of one run. All else decides what comes out of it.
FREE = (
    "run.dir", "run.device", "run.compile", "run.log_every", "run.max_minutes", "checkpoint", "tracking", "eval",
    "train.accumulate", "data.path", "data.storage", "data.cache_dir", "data.workers", "model.channels_last",
)  # fmt: skip


class RunState:
    """Saves and restores model, optimizer, masks and loss scale, beside what the caller adds.

    Args:
        config: the run's configuration.
        accelerator: ranks, and the gradient scaler of fp16.
        model: the bare model.
        optimizer: its torch optimizer.
        pruner: the masks and the place in the schedule.
        checkpoints: where to write.
        max_failures: how many saves may fail in a row.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        pruner: Pruner,
        checkpoints: Checkpoints,
        max_failures: int,
    ) -> None:
        self._config = config
        self._scaler = accelerator.scaler
        self._model = model
        self._optimizer = optimizer
        self._pruner = pruner
        self._checkpoints = checkpoints
        self._max_failures = max_failures
        self._failures = 0
        self._spared: list[int] = []

    def save(self, step: int, progress: dict[str, Any], final: bool) -> str | None:
        """Write a checkpoint of `step` with `progress` (JSON values) in it; what went wrong, if it did.

        The first at the final sparsity (`final`) is kept for good.

        Raises:
            CheckpointError: as many saves in a row as are allowed have failed.
            MaskMismatchError: ranks hold different masks; nothing is written.
        """
        if final and not self._spared:
            self._spared.append(step)
        self._pruner.verify()
        sync_buffers(self._model)
        masks = self._pruner.state_dict()
        state = {
            "step": step,
            "progress": progress,
            "pruner": {name: value for name, value in masks.items() if name != "masks"},
            "mask_digest": self._pruner.mask_digest,
            "zeros": self._pruner.zeros,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "config": self._config.model_dump(),
            "optimized": [name for name, p in self._model.named_parameters() if self._optimizer.state.get(p)],
            "spared": self._spared,
        }
        try:
            self._checkpoints.save(step, self._tensors(masks["masks"]), state, self._spared)
        except CheckpointError as error:
            self._failures += 1
            if self._failures >= self._max_failures:
                raise CheckpointError(f"{self._failures} checkpoints in a row have failed; {error}") from None
            return str(error)
        self._failures = 0
        return None

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint.

        Raises:
            ConfigError: it is of another job; the message lists the settings that differ.
        """
        checkpoint = self._checkpoints.newest()
        if checkpoint is not None:
            refuse_another_job(checkpoint.state["config"], self._config)
        return checkpoint

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Bring everything back to `checkpoint` and return its `progress`.

        Raises:
            CheckpointError: the masks that come back are not those that were saved.
        """
        masks = self._pruner.state_dict()["masks"]
        self._materialize_optimizer_state(set(checkpoint.state["optimized"]))
        self._checkpoints.load(checkpoint, self._tensors(masks))
        state = checkpoint.state
        self._pruner.load_state_dict({**state["pruner"], "masks": masks})
        if (self._pruner.mask_digest, self._pruner.zeros) != (state["mask_digest"], state["zeros"]):
            raise CheckpointError(f"the masks in {checkpoint.path} are not those that were saved")
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])
        self._spared = state["spared"]
        progress: dict[str, Any] = state["progress"]
        return progress

    def _tensors(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of the run by name; those of model and optimizer are the very ones in use."""
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        for name, parameter in self._model.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        return tensors | {f"mask.{name}": value for name, value in masks.items()}

    def _materialize_optimizer_state(self, names: set[str]) -> None:
        """Let the optimizer make its state for the parameters `names`, by a step that moves nothing."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        for name, parameter in self._model.named_parameters():
            if name in names:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def refuse_another_job(began_with: dict[str, Any], config: Config) -> None:
    """Refuse a configuration that would give another result than that which a run folder's run began with.

    Raises:
        ConfigError: lists the settings that differ.
    """
    before, now = dict(_leaves(began_with)), dict(_leaves(config.model_dump()))
    faults = [
        f"{key}: was {before.get(key)!r} when the run in {config.run.dir} began, now {now.get(key)!r}; go on with the "
        "same value, or choose another run.dir"
        for key in before | now
        if before.get(key) != now.get(key) and not key.startswith(FREE)
    ]
    if faults:
        raise ConfigError(*faults)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
