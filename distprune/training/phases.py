"""From lengths in steps or epochs to the steps of a run: phases, learning rates, the sparsity schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distprune.config.schema import Config, Length, Phase, PhaseName, Phases
from distprune.errors import ConfigError
from distprune.pruning import CubicSchedule


@dataclass(frozen=True)
class Span:
    """A phase and the optimizer steps it takes: `begin` is its first, `end` the one behind its last."""

    name: PhaseName
    begin: int
    end: int
    phase: Phase

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
class Timetable:
    """When what happens in a run: phases of some length in order, the sparsity schedule, and doubts about them."""

    spans: tuple[Span, ...]
    schedule: CubicSchedule
    warnings: tuple[str, ...]

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
    schedule, warnings = _schedule(config, ends, steps_per_epoch)
    return Timetable(tuple(spans), schedule, tuple(warnings))


def _schedule(config: Config, ends: dict[str, int], steps_per_epoch: int) -> tuple[CubicSchedule, list[str]]:
    prune = config.prune
    begin, phase_end, run_end = ends["dense"], ends["prune"], ends["finetune"]
    if prune.sparsity == 0:
        return CubicSchedule(final=0.0, begin=begin, end=begin), []
    if phase_end == begin:
        raise ConfigError(
            f"phases.prune: is shorter than one optimizer step, so prune.sparsity {prune.sparsity} is never reached"
        )
    span = phase_end - begin if prune.length is None else _steps(prune.length, steps_per_epoch)
    end, warnings = begin + span, []
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
    return CubicSchedule(prune.sparsity, begin, end, prune.every, prune.initial), warnings


def _steps(length: Length, steps_per_epoch: int) -> int:
    return length.steps or round((length.epochs or 0) * steps_per_epoch)
