"""From lengths in steps or epochs to the steps of a run: phases, learning rates, the sparsity schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distprune.config.schema import Config, Length, Phase, PhaseName, Phases
from distprune.errors import ConfigError
from distprune.pruning import OneShotSchedule, Schedule
from distprune.training.methods import make_schedule


@dataclass(frozen=True)
class Span:
    """A phase and the optimizer steps it takes: `begin` is its first, `end` the one behind its last."""

    name: PhaseName
    begin: int
    end: int
    phase: Phase
    round: int | None = None
    """Of iterative pruning, from 1; its spans are of the phase finetune."""

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step number `step` of the run, from 0."""
        phase, done, steps = self.phase, step - self.begin, self.end - self.begin
        if done < phase.warmup_steps:
            return phase.lr * (done + 1) / phase.warmup_steps
        if phase.schedule == "step":
            return phase.lr * phase.gamma ** sum(done >= m * steps for m in phase.milestones)
        if phase.schedule == "constant":
            return phase.lr
        part = (done - phase.warmup_steps) / (steps - phase.warmup_steps)
        return phase.min_lr + (phase.lr - phase.min_lr) * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Pruning:
    """The sparsity schedule, the steps of its first and last update, and doubts about it."""

    schedule: Schedule
    begin: int
    end: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timetable:
    """When what happens in a run: phases of some length in order, and pruning."""

    spans: tuple[Span, ...]
    pruning: Pruning

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.spans[-1].end


def make_timetable(config: Config, steps_per_epoch: int) -> Timetable:
    """Lay out the run.

    Raises:
        ConfigError: a phase is shorter than its warm-up, or the run ends before the schedule does.
    """
    spans: list[Span] = []
    begin = 0
    ends: dict[str, int] = {}
    for name in Phases.model_fields:
        phase: Phase = getattr(config.phases, name)
        steps = _steps(phase, steps_per_epoch)
        if steps and phase.warmup_steps >= steps:
            raise ConfigError(
                f"phases.{name}.warmup_steps: {phase.warmup_steps} leaves nothing of the phase's {steps} steps"
            )
        if steps:
            spans.append(Span(name, begin, begin + steps, phase))  # type: ignore[arg-type]
        begin += steps
        ends[name] = begin
    if not spans:
        raise ConfigError("phases: all are shorter than one optimizer step; give one of them steps")
    return Timetable(tuple(spans), _pruning(config, ends, steps_per_epoch))


def _pruning(config: Config, ends: dict[str, int], steps_per_epoch: int) -> Pruning:
    """The schedule, its first and last update, and doubts about it."""
    prune = config.prune
    begin, phase_end, run_end = ends["dense"], ends["prune"], ends["finetune"]
    if prune.sparsity == 0 or prune.schedule == "oneshot":
        doubts = ("no step follows the pruning: give phases.finetune some",) * (prune.sparsity > 0 and begin == run_end)
        return Pruning(OneShotSchedule(prune.sparsity, begin), begin, begin, doubts)
    if phase_end == begin:
        raise ConfigError(
            f"phases.prune: is shorter than one optimizer step, so prune.sparsity {prune.sparsity} is never reached"
        )
    span = phase_end - begin if prune.length is None else _steps(prune.length, steps_per_epoch)
    end, warnings = begin + span, list[str]()
    if end > run_end:
        raise ConfigError(
            f"prune.length: the schedule takes {span} steps, but the prune and finetune phases have only "
            f"{run_end - begin}; sparsity {prune.sparsity} would never be reached"
        )
    if end > phase_end:
        warnings.append(
            f"the prune phase ({phase_end - begin} steps) is shorter than the schedule ({span}): sparsity still rises "
            "while finetune runs"
        )
    if prune.every > span:
        warnings.append(
            f"prune.every ({prune.every}) is larger than the schedule's {span} steps: one update at its end prunes all"
        )
    if phase_end == run_end and end == run_end:
        warnings.append("no step follows the last update: give phases.finetune some, so that the model can recover")
    return Pruning(make_schedule(prune, begin, end), begin, end, tuple(warnings))


def _steps(length: Length, steps_per_epoch: int) -> int:
    return length.steps or round((length.epochs or 0) * steps_per_epoch)
