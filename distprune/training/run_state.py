"""All that a run must know to go on: what goes into a checkpoint, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from distprune.config import Config
from distprune.errors import ConfigError
from distprune.pruning import MaskHolder, MaskMismatchError
from distprune.tracking.logs import logger
from distprune.training.buffers import sync_buffers
from distprune.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, Writing
from distprune.training.nonfinite import refuse_nonfinite
from distprune.training.shrinking import Shrinking

# What may change between the starts of one run. All else decides what comes out of it.
FREE = (
    "run.dir", "run.device", "run.compile", "run.log_every", "run.max_minutes", "checkpoint", "integrity", "tracking",
    "eval.every", "eval.batch_size", "eval.corruptions", "train.accumulate", "train.on_nonfinite", "data.path",
    "data.storage", "data.cache_dir", "data.workers", "model.channels_last", "distill.sharded",
)  # fmt: skip


FORMAT = 4
"""Of what is in a checkpoint beside tensors; counts up when that changes."""
ACCEPTED, REWIND = "accepted", "rewind"
"""Marks of checkpoints that a run may have to go back to."""


class RunState:
    """Saves and restores model, optimizer, masks and loss scale, beside what the caller adds.

    Args:
        config: the run's configuration.
        accelerator: ranks, and the gradient scaler of fp16.
        model: the bare model.
        beside: what trains beside it and is no part of it: the bare projections between features.
        optimizer: its torch optimizer.
        pruner: the masks and the place in the schedule.
        shrinking: which channels are in the model.
        checkpoints: where to write.
        tracker_id: the id of the run with its tracker, once there is one.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: nn.Module,
        beside: nn.Module,
        optimizer: Optimizer,
        pruner: MaskHolder,
        shrinking: Shrinking,
        checkpoints: Checkpoints,
        tracker_id: Callable[[], str | None],
    ) -> None:
        self._config = config
        self._scaler = accelerator.scaler
        self._device = accelerator.device
        self._model = model
        self._beside = beside
        self._optimizer = optimizer
        self._pruner = pruner
        self._shrinking = shrinking
        self._checkpoints = checkpoints
        self._tracker_id = tracker_id
        self._failures = 0
        self._marks: dict[str, int] = {}
        self._best: float | None = None
        self._pending: tuple[Callable[[], None], int, dict[str, int], float | None] | None = None
        self._stager: DefaultStager | None = None

    def save(
        self,
        step: int,
        progress: dict[str, Any],
        final: bool,
        top1: float | None,
        wait: bool,
        mark: str | None = None,
    ) -> str | None:
        """Write a checkpoint of `step` with `progress` (JSON values) in it; what went wrong, if it is known to have.

        The first at the final sparsity, and the best of those, are kept for good.

        Args:
            step: optimizer steps done.
            progress: what the trainer must know to go on.
            final: whether the final sparsity is reached.
            top1: the accuracy of the model as it is, where it was just evaluated.
            wait: write now, even if checkpoints are written in the background.
            mark: a name under which this one is kept until another gets it, for `roll_back` or `rewind`; it is written
                now.

        Raises:
            CheckpointError: as many saves in a row as are allowed have failed, or that of a mark has.
            DivergedError: weights or optimizer state are NaN or infinite; nothing is written.
            MaskMismatchError: ranks hold different masks; nothing is written.
        """
        problem = self.settle()
        self._pruner.verify()
        sync_buffers(self._model)
        pruned = self._pruner.state_dict()
        trained = self._trained()
        refuse_nonfinite(trained, step)
        marks, best_top1 = dict(self._marks), self._best
        if self.is_best(final, top1):
            marks["best"], best_top1 = step, top1
        if final:
            marks.setdefault("first-final", step)
        if mark is not None:
            marks[mark] = step
        state = {
            "format": FORMAT,
            "step": step,
            "progress": progress,
            "pruner": {name: value for name, value in pruned.items() if isinstance(value, int)},
            "mask_digest": self._pruner.mask_digest,
            "zeros": self._pruner.zeros,
            "shrinking": self._shrinking.state(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "config": self._config.model_dump(),
            "optimized": [name for name, _, p in self._parameters() if self._optimizer.state.get(p)],
            "best_top1": best_top1,
            "tracker_id": self._tracker_id(),
        }
        tensors = self._tensors(trained, pruned)
        background = self._config.checkpoint.background and not wait and mark is None
        if background:
            tensors = self._staged(tensors)
        write = partial(self._checkpoints.save, step, tensors, state, marks)
        self._pending = Writing(write, self._device).result if background else write, step, marks, best_top1
        problem = problem if background else self.settle()
        if mark is not None and problem is not None:
            raise CheckpointError(f"{problem}; later rounds need this one. Mend that, and the same command goes on")
        return problem

    def is_best(self, final: bool, top1: float | None) -> bool:
        """Whether an accuracy is the highest at the final sparsity, of those that were saved or are being saved."""
        best = self._best if self._pending is None else self._pending[3]
        return final and top1 is not None and (best is None or top1 > best)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint at the final sparsity, once there is one."""
        return self._marks.get("best")

    def best_figures(self) -> dict[str, float]:
        """Step and accuracy of the best checkpoint, under the names that trackers know."""
        if self._best is None:
            return {}
        return {"best/step": self._marks["best"], "best/top1": self._best}

    def settle(self) -> str | None:
        """Wait for a save in the background; what went wrong with it, if it did.

        Raises:
            CheckpointError: as many saves in a row as are allowed have failed.
        """
        if self._pending is None:
            return None
        finish, step, marks, best = self._pending
        self._pending = None
        try:
            finish()
        except CheckpointError as error:
            self._failures += 1
            if self._failures >= self._config.checkpoint.max_failures:
                raise CheckpointError(f"{self._failures} checkpoints in a row have failed; {error}") from None
            logger.warning(f"{error}; earlier checkpoints are whole")
            return str(error)
        self._failures, self._marks, self._best = 0, marks, best
        logger.info(f"checkpoint of step {step}: written")
        return None

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None where there is none at all.

        Raises:
            ConfigError: it is of another job (the message lists the settings that differ), or none can be read.
        """
        try:
            checkpoint = self._checkpoints.newest()
        except CheckpointError as error:
            raise ConfigError(f"run.dir: {error}") from None
        if checkpoint is not None:
            if checkpoint.state.get("format") != FORMAT:
                raise ConfigError(
                    f"run.dir: {checkpoint.path} was written by another version of distprune, which must finish it; "
                    "or choose another run.dir"
                )
            refuse_another_job(checkpoint.state["config"], self._config)
            self._shrinking.refuse_others(checkpoint.state["shrinking"])
        return checkpoint

    def restore(self, checkpoint: Checkpoint) -> Checkpoint:
        """Bring everything back to `checkpoint`, or to one before it where its contents do not fit; the one taken.

        Raises:
            CheckpointError: none can be read.
        """
        while True:
            try:
                for mark in {ACCEPTED, REWIND} & checkpoint.state["marks"].keys():
                    self._checkpoints.of_step(checkpoint.state["marks"][mark])
                self._restore(checkpoint)
            except (CheckpointError, MaskMismatchError, ValueError) as error:
                logger.warning(f"checkpoint {checkpoint.path} is damaged and is passed over: {error}")
                before = self._checkpoints.newest(before=checkpoint.step)
                assert before is not None, "or newest would have raised"
                checkpoint = before
            else:
                return checkpoint

    def go_to_best(self) -> None:
        """Bring everything to the best checkpoint at the final sparsity, for good.

        Raises:
            CheckpointError: it cannot be read.
        """
        self._load(self._marked("best"), {})

    def roll_back(self, mark: str) -> None:
        """Bring everything back to the checkpoint of `mark`, but for the number of steps that are done.

        Raises:
            CheckpointError: it cannot be read.
        """
        done = self._pruner.steps_done
        # Whether the schedule prunes at this step is for the next update to find.
        self._load(self._marked(mark), {"steps_done": done, "steps_seen": done - 1})

    def rewind(self, mark: str) -> None:
        """Bring weights, buffers and optimizer state back to the checkpoint of `mark`, under the masks of now.

        Raises:
            CheckpointError: it cannot be read.
        """
        checkpoint = self._marked(mark)
        pruned = self._pruner.state_dict()
        pruned["observed"] = {name: value.clone() for name, value in pruned["observed"].items()}
        self._materialize_optimizer_state(set(checkpoint.state["optimized"]))
        self._checkpoints.load(checkpoint, self._tensors(self._trained(), {"masks": {}, "observed": {}}))
        self._pruner.load_state_dict(pruned)
        self._load_scaler(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._load(checkpoint, {})
        self._marks, self._best = checkpoint.state["marks"], checkpoint.state["best_top1"]

    def _load(self, checkpoint: Checkpoint, place: dict[str, int]) -> None:
        """Fill everything from `checkpoint`; `place` is the place in the schedule, where it is another."""
        state = checkpoint.state
        self._shrinking.restore(state["shrinking"])
        pruned = self._pruner.state_dict()
        self._materialize_optimizer_state(set(state["optimized"]))
        self._checkpoints.load(checkpoint, self._tensors(self._trained(), pruned))
        self._pruner.load_state_dict({**pruned, **state["pruner"], **place})
        if (self._pruner.mask_digest, self._pruner.zeros) != (state["mask_digest"], state["zeros"]):
            raise CheckpointError("its masks are not those that were saved")
        self._load_scaler(checkpoint)

    def _load_scaler(self, checkpoint: Checkpoint) -> None:
        if self._scaler is not None and checkpoint.state["scaler"] is not None:
            self._scaler.load_state_dict(checkpoint.state["scaler"])

    def _marked(self, mark: str) -> Checkpoint:
        self.settle()
        if mark not in self._marks:
            raise CheckpointError(f"there is no checkpoint of the mark {mark!r}")
        checkpoint = self._checkpoints.of_step(self._marks[mark])
        logger.info(f"going back to {checkpoint.path} ({mark})")
        return checkpoint

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in CPU memory, whose storage is used again by the next save."""
        if self._stager is None:
            pinned = torch.cuda.is_available()
            self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        return cast(dict[str, Tensor], self._stager.stage(tensors))

    def _tensors(self, trained: dict[str, Tensor], pruned: dict[str, Any]) -> dict[str, Tensor]:
        """Every tensor of the run by name: what is trained, buffers, and those of the pruner's state."""
        once, all_names = (dict(self._model.named_parameters(remove_duplicate=each)) for each in (True, False))
        tied = all_names.keys() - once.keys()  # to what has another name already
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items() if name not in tied}
        masks = {f"mask.{name}": value for name, value in pruned["masks"].items()}
        return tensors | trained | masks | {f"score.{name}": value for name, value in pruned["observed"].items()}

    def _trained(self) -> dict[str, Tensor]:
        """Parameters and optimizer state by name, the very ones in use."""
        tensors: dict[str, Tensor] = {}
        for name, key, parameter in self._parameters():
            tensors[key] = parameter.detach()
            for kind, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{kind}"] = value
        return tensors

    def _parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Name, key in a checkpoint, and parameter of all that trains."""
        for name, parameter in self._model.named_parameters():
            yield name, f"model.{name}", parameter
        for name, parameter in self._beside.named_parameters():
            yield f"distill.{name}", f"distill.{name}", parameter

    def _materialize_optimizer_state(self, names: set[str]) -> None:
        """Let the optimizer make its state for the parameters `names`, by a step that moves nothing."""
        self._optimizer.state.clear()
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        for name, _, parameter in self._parameters():
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
