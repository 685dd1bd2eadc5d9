"""From lengths in steps or epochs to the steps of a run: phases, learning rates, the sparsity schedule."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace

from distprune.config.schema import Config, Length, Phase, PhaseName, Phases
from distprune.errors import ConfigError
from distprune.pruning import Attempt, OneShotSchedule, RoundsSchedule, Schedule
from distprune.training.methods import make_schedule


@dataclass(frozen=True)
class Span:
    """A phase and the optimizer steps it takes: `begin` is its first, `end` the one behind its last."""

    name: PhaseName
    begin: int
    end: int
    phase: Phase
    key: str
    """The setting of `phase`."""
    left_out: int = 0
    """So many first steps of `phase` are not done."""
    attempt: Attempt | None = None
    """At a round of iterative pruning; its name is finetune, whichever phase it trains."""

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step number `step` of the run, from 0."""
        phase, done, steps = self.phase, step - self.begin + self.left_out, self.end - self.begin + self.left_out
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
class Rounds:
    """Of iterative pruning: when, and what each of them trains."""

    schedule: RoundsSchedule
    phase: Phase
    key: str
    """The setting of `phase`."""
    rewind_to: int
    """So many first steps of `phase` are not done again; the step of the run that rewound weights come from."""
    rewinds_weights: bool

    @property
    def spans(self) -> list[Span]:
        """Of the attempts of the schedule, as it stands."""
        return [
            Span("finetune", attempt.begin, attempt.end, self.phase, self.key, self.rewind_to, attempt)
            for attempt in self.schedule.attempts
        ]


@dataclass(frozen=True)
class Timetable:
    """When what happens in a run: phases of some length in order, rounds behind them, and pruning."""

    phases: tuple[Span, ...]
    pruning: Pruning
    rounds: Rounds | None = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """Phases and rounds; those to come change when a round is refused."""
        return self.phases if self.rounds is None else (*self.phases, *self.rounds.spans)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, as far as is known."""
        return self.spans[-1].end

    def after(self, step: int) -> Span | None:
        """What comes once `step` steps are done, or goes on; None at the end."""
        return next((span for span in self.spans if step < span.end), None)


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
            spans.append(Span(name, begin, begin + steps, phase, f"phases.{name}"))  # type: ignore[arg-type]
        begin += steps
        ends[name] = begin
    if not spans:
        raise ConfigError("phases: all are shorter than one optimizer step; give one of them steps")
    if config.prune.rounds is not None:
        timetable = _with_rounds(config, {span.name: span for span in spans}, steps_per_epoch)
    else:
        timetable = Timetable(tuple(spans), _pruning(config, ends, steps_per_epoch))
    taught = [] if config.distill is None else config.distill.phases
    if taught and not any(span.name in taught for span in timetable.spans):
        doubt = f"distill.phases: there is no phase {' or '.join(taught)} of some length, so the teacher never teaches"
        pruning = timetable.pruning
        return replace(timetable, pruning=replace(pruning, warnings=(*pruning.warnings, doubt)))
    return timetable


def _with_rounds(config: Config, phases: dict[PhaseName, Span], steps_per_epoch: int) -> Timetable:
    """Iterative pruning, behind the dense phase if there is one."""
    prune, chosen = config.prune, config.prune.rounds
    assert chosen is not None
    trained: PhaseName = "finetune" if chosen.recovery == "finetune" else "dense"
    if (span := phases.get(trained)) is None:
        raise ConfigError(f"phases.{trained}: is shorter than one optimizer step, and every round trains it")
    rewind_to = _steps(chosen.rewind_to, steps_per_epoch) if chosen.rewind_to is not None else 0
    if rewind_to >= (steps := span.end - span.begin):
        raise ConfigError(
            f"prune.rounds.rewind_to: step {rewind_to} is not within the {steps} steps of the dense phase; lower it"
        )
    dense = tuple(span for name, span in phases.items() if name == "dense")
    begin = dense[0].end if dense else 0
    least = {} if prune.guard is None else {"min_step": prune.guard.min_step}
    schedule = RoundsSchedule(prune.sparsity, begin, steps - rewind_to, chosen.count, **least)
    doubts = list[str]()
    refused = copy(schedule)
    refused.judge(False)
    if prune.guard is not None and len(refused.attempts) == 1:
        doubts.append(
            "prune.guard.min_step is more than half a round prunes: a round that is refused is not tried again"
        )
    if prune.guard is not None and prune.guard.set is None:
        doubts.append(
            "prune.guard judges by data.eval_split, so the last accuracy is a little too good; name one of eval.sets "
            "in prune.guard.set"
        )
    hot = config.distill is not None and config.distill.temperature != 1.0
    if chosen.recovery != "finetune" and hot:
        doubts.append(
            "distill.temperature: rewound learning rates were those of a loss without a teacher, which a temperature T "
            "multiplies by up to T^2; try 1.0, or set distill to null"
        )
    rounds = Rounds(schedule, span.phase, span.key, rewind_to, chosen.recovery == "rewind_weights")
    return Timetable(dense, Pruning(schedule, begin, schedule.attempts[-1].begin, tuple(doubts)), rounds)


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
