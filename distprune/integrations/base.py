"""What the callbacks have in common: their settings, the Pruner that is made of them, and its figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distprune.integrations.hugging_face import chosen
from distprune.integrations.whole_state import load_whole_state
from distprune.pruning import (
    NM,
    Allocation,
    Bounds,
    CubicSchedule,
    GlobalAllocation,
    Pruner,
    PruneReport,
    Schedule,
    Score,
    magnitude,
)
from distprune.pruning.prunable import unwrap


class CallbackBase:
    """Prunes while somebody else's loop trains.

    `PruningCallback(sparsity=0.9)` prunes 90 % of the weights along a cubic schedule in about 100 updates, from 10 % to
    70 % of all optimizer steps, and leaves embeddings and the output heads of Hugging Face's models dense.

    Args:
        sparsity: the final one, a fraction in [0, 1) of the prunable weights. Either this or `schedule`.
        schedule: a Schedule, or a function that makes one from the number of optimizer steps of the training.
        begin, end: when the first and the last update of the masks come; an int is an optimizer step, a float a
            fraction in [0, 1] of all steps. With `sparsity` only.
        every: optimizer steps between updates; None makes about 100 of them. With `sparsity` only.
        head: prune the output heads of Hugging Face's models too: what a PreTrainedModel adds to its base model, and
            its output embeddings.
        include, exclude, embeddings: what to prune, see `distprune.find_prunable`. If `include` is given, it says also
            whether heads are pruned.
        score, allocation, bounds, min_weights, pattern: see `distprune.Pruner`. With a pattern, weights whose input
            dimension is not the second (GPT-2's Conv1D, experts in one tensor) stay dense.

    Attributes:
        pruner: made when the training begins, after model and optimizer are wrapped, and readable once it has ended.
        report: of the last update of the masks since then.

    Raises:
        ValueError: a setting lies outside its range, or two exclude each other.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        schedule: Schedule | Callable[[int], Schedule] | None = None,
        begin: int | float = 0.1,
        end: int | float = 0.7,
        every: int | None = None,
        head: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        embeddings: bool = False,
        score: Score = magnitude,
        allocation: Allocation | None = None,
        bounds: Mapping[str, Bounds] = MappingProxyType({}),
        min_weights: int = 1,
        pattern: NM | None = None,
    ) -> None:
        super().__init__()
        self.pruner: Pruner | None = None
        self.report: PruneReport | None = None
        self._schedule = _schedule(sparsity, schedule, begin, end, every)
        self._head = head
        self._include, self._exclude, self._embeddings = include, exclude, embeddings
        self._settings: dict[str, Any] = {
            "score": score,
            "allocation": allocation or GlobalAllocation(),
            "bounds": bounds,
            "min_weights": min_weights,
            "pattern": pattern,
        }

    def _start(
        self, model: nn.Module, optimizer: Optimizer | None, steps: int | None, saved: Mapping[str, Any] | None
    ) -> None:
        """Make the Pruner, give it its saved state, and prune if the first update is due; called on all ranks.

        Args:
            model, optimizer: wrapped, sharded and loaded.
            steps: optimizer steps of the whole training, None where nobody knows.
            saved: from `whole_state`, if the training goes on from a checkpoint.

        Raises:
            ValueError: the optimizer is missing, the number of steps is not known or too small for the schedule, or see
                `Pruner` and `load_whole_state`.
        """
        self._finish()
        _refuse_flat_shards(model)
        groups = optimizer.param_groups if optimizer is not None else []
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        if optimizer is None or trained.isdisjoint(map(id, model.parameters())):
            raise ValueError("no optimizer trains this model, and pruning needs the one that does")
        model = unwrap(model)
        include, exclude = chosen(
            model,
            self._include,
            self._exclude,
            self._embeddings,
            head=self._head,
            pattern=self._settings["pattern"] is not None,
        )
        self.pruner = Pruner(
            model,
            optimizer,
            self._schedule_over(steps),
            include=include,
            exclude=exclude,
            embeddings=self._embeddings,
            **self._settings,
        )
        self.report = None
        if saved is not None:
            load_whole_state(self.pruner, saved)
        self._advance()

    def _advance(self) -> bool:
        """Update the masks if that is due; whether more is pruned than before."""
        assert self.pruner is not None
        report = self.pruner.step()
        self.report = report or self.report
        return report is not None and report.newly_pruned > 0

    def _figures(self) -> dict[str, float]:
        """How sparse the model is and should be, and what the last update did."""
        assert self.pruner is not None
        figures = {
            "prune/target_sparsity": self.pruner.schedule.sparsity(self.pruner.steps_done),
            "prune/sparsity": self.pruner.sparsity,
        }
        if (report := self.report) is not None:
            figures |= {
                "prune/threshold": report.threshold,
                "prune/update_ms": 1000 * report.seconds,
                "prune/newly_pruned": float(report.newly_pruned),
            }
        return figures

    def _finish(self) -> str | None:
        """Let go of the optimizer; what to warn of, if the final sparsity was not reached."""
        if self.pruner is None:
            return None
        self.pruner.close()
        if self.pruner.is_final:
            return None
        return (
            f"training ended after {self.pruner.steps_done} optimizer steps with a sparsity of "
            f"{self.pruner.sparsity:.4f}, before the schedule reached {self.pruner.schedule.final}"
        )

    def _schedule_over(self, steps: int | None) -> Schedule:
        schedule = self._schedule
        if not isinstance(schedule, Schedule):
            if steps is None:
                raise ValueError(
                    "how many optimizer steps the training takes is not known, and the schedule depends on it: set "
                    "max_steps, or give a schedule with steps of its own, such as "
                    "schedule=CubicSchedule(final=0.9, begin=1000, end=7000)"
                )
            schedule = schedule(steps)
            if not isinstance(schedule, Schedule):
                raise ValueError(f"schedule({steps}) is no Schedule but {schedule!r}")
        if steps is not None and (last := schedule.sparsity(steps)) < schedule.final:
            raise ValueError(
                f"the schedule is at a sparsity of {last:.4f} when training ends after {steps} optimizer steps, and "
                f"reaches {schedule.final} later: let it end earlier, or train longer"
            )
        return schedule


def _schedule(
    sparsity: float | None,
    schedule: Schedule | Callable[[int], Schedule] | None,
    begin: int | float,
    end: int | float,
    every: int | None,
) -> Schedule | Callable[[int], Schedule]:
    if (sparsity is None) == (schedule is None):
        raise ValueError(
            f"give one of sparsity and schedule, got {'neither' if schedule is None else 'both'}; sparsity=0.9 prunes "
            "90 % of the weights along a cubic schedule"
        )
    if schedule is not None:
        if (begin, end, every) != (0.1, 0.7, None):
            raise ValueError("begin, end and every go with sparsity; a schedule has its own")
        if not isinstance(schedule, Schedule) and not callable(schedule):
            raise ValueError(f"schedule must be a Schedule, or a function that makes one of steps, got {schedule!r}")
        return schedule
    assert sparsity is not None
    for name, value in {"begin": begin, "end": end}.items():
        if isinstance(value, float) and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be a fraction of all steps in [0, 1], or a step as an int, got {value}")
    CubicSchedule(sparsity, 0, 0, 1 if every is None else every)  # checks both

    def cubic(steps: int) -> CubicSchedule:
        first, last = (round(x * steps) if isinstance(x, float) else x for x in (begin, end))
        return CubicSchedule(sparsity, first, last, max(1, round((last - first) / 100)) if every is None else every)

    return cubic


def _refuse_flat_shards(model: nn.Module) -> None:
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is sharded by FSDP version 1, which flattens weights; version 2 (fully_shard, fsdp_version: 2) "
            "can be pruned"
        )
