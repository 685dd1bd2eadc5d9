"""The loop.

for each phase, or round:
    task for the phase                    a teacher comes in here, if at all
    roll back, prune, rewind              where a round begins
    for each optimizer step:
        set the learning rate
        forward, backward                 once for each micro-batch
        skip                              where the loss is not finite, on request
        mask gradients, clip              the optimizer's hook masks again before it steps
        optimizer step
        pruner step                       nothing, unless the schedule says so; channels may be removed
        compare replicas, log, evaluate   where due
        checkpoint, stop                  where due
    evaluate, judge the round, checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distprune.data import Batch
from distprune.data.sampler import mix
from distprune.pruning import Attempt, MaskHolder, NonFiniteError, compare_replicas
from distprune.structured import GroupPenalty
from distprune.tracking import Trackers
from distprune.tracking.logs import logger
from distprune.training.evaluation import EvalResult
from distprune.training.histograms import Histograms
from distprune.training.liveness import Liveness
from distprune.training.meter import Meter
from distprune.training.nonfinite import DivergedError, LossWatch
from distprune.training.phases import Span, Timetable
from distprune.training.recovery import Recovery
from distprune.training.run_state import RunState
from distprune.training.shrinking import Shrinking
from distprune.training.stopping import Stopped, Stopper
from distprune.training.student import Student
from distprune.training.tasks import Task

Batches = Iterator[Batch]

MOST_SKIPPED = 100


class _StopAsked(Exception):
    """Ends an evaluation; its message is the reason."""


class Trainer:
    """Runs the phases and rounds of a timetable.

    Args:
        accelerator: devices, ranks and autocast.
        student: the model, as wrapped for training.
        optimizer: its optimizer, prepared too.
        pruner: holds the masks.
        shrinking: removes channels.
        penalty: adds its gradient to that of the loss in the dense phase; None where there is none.
        timetable: phases and when they begin and end.
        batches_from: this rank's micro-batches, as the model takes them, without end, from a global batch on.
        task_for: the task of a phase, asked for when the phase begins.
        evaluate: counts accuracy on the evaluation sets, on all ranks; takes what to call after each batch.
        trackers: take the figures.
        histograms: of weights.
        run_state: writes checkpoints.
        recovery: judges rounds and takes the run back.
        stopper: says when to stop early.
        loss_watch: looks for losses that are not finite.
        liveness: is told of everything that gets done.
        batch_size: samples per step over all ranks.
        accumulate: micro-batches per step and rank.
        steps_per_epoch: for trainer/epoch.
        clip_norm: largest gradient norm, or None.
        log_every, eval_every, save_every, compare_every: steps between logged lines, evaluations, checkpoints, and
            comparisons of replicas.
        seed: seeds whatever the model draws in a step (dropout), with the rank and the number of the batch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        optimizer: Optimizer,
        pruner: MaskHolder,
        shrinking: Shrinking,
        penalty: GroupPenalty | None,
        timetable: Timetable,
        batches_from: Callable[[int], Batches],
        task_for: Callable[[Span], Task],
        evaluate: Callable[[Callable[[], None]], EvalResult],
        trackers: Trackers,
        histograms: Histograms,
        run_state: RunState,
        recovery: Recovery,
        stopper: Stopper,
        loss_watch: LossWatch,
        liveness: Liveness,
        *,
        batch_size: int,
        accumulate: int,
        steps_per_epoch: int,
        clip_norm: float | None,
        log_every: int,
        eval_every: int | None,
        save_every: int | None,
        compare_every: int | None,
        seed: int,
    ) -> None:
        self.accelerator = accelerator
        self.student = student
        self.optimizer = optimizer
        self.pruner = pruner
        self.shrinking = shrinking
        self.penalty = penalty
        self.timetable = timetable
        self.batches_from = batches_from
        self.task_for = task_for
        self.evaluate = evaluate
        self.trackers = trackers
        self.histograms = histograms
        self.run_state = run_state
        self.recovery = recovery
        self.stopper = stopper
        self.loss_watch = loss_watch
        self.liveness = liveness
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.steps_per_epoch = steps_per_epoch
        self.clip_norm = clip_norm
        self.log_every = log_every
        self.eval_every = eval_every
        self.save_every = save_every
        self.compare_every = compare_every
        self.seed = seed
        self.step = 0
        self.batches_taken = 0
        self.dense: EvalResult | None = None
        self.last: EvalResult | None = None
        self.train_seconds = 0.0
        self._meter = Meter()
        self._began = self._clock = time.perf_counter()
        self._at_last_log = (0, 0.0)
        self._row: dict[str, float] = {}
        self._evaluating = False
        self._evaluated_at: int | None = None
        self._logged_at: int | None = None
        self._is_ahead = False
        """Of what a checkpoint of this step says: the next round has begun, or the last was rolled back."""
        self._held: set[str] = set()

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from what `_progress` told a checkpoint."""
        self.step, self.batches_taken = progress["step"], progress["batches_taken"]
        self.dense, self.last = (e and EvalResult.restored(e) for e in (progress["dense"], progress["last"]))
        self.train_seconds = progress["train_seconds"]
        self._began -= progress["wall_seconds"]
        self._at_last_log = (progress["at_last_log"][0], progress["at_last_log"][1])
        self._row, self._evaluating = progress["row"], progress["evaluating"]
        self._logged_at = progress["logged_at"]
        self.recovery.resume(progress["rounds"])
        self._meter.restore(progress["meter"], self.accelerator)
        self.liveness.goes_on_from(self.step)

    @property
    def wall_seconds(self) -> float:
        """Time spent on the run, in all its starts."""
        return time.perf_counter() - self._began

    def fit(self) -> EvalResult:
        """Train to the end of the timetable and return the evaluation of the model that is left.

        Raises:
            DivergedError: the loss is not finite on a step that is logged or saved, or too many steps were skipped.
            Stopped: the run was asked to stop, and has saved its state.
            CheckpointError: too many saves have failed, or one that is needed later.
            NonFiniteError, MaskMismatchError: see `Pruner.step`.
            WeightMismatchError: replicas differ.
        """
        self.student.wrapped.train()
        if self._evaluating:
            self._finish_evaluation()
        if self.step == 0 and self.recovery.mark(0) is not None:
            self._save(None)
        batches = self.batches_from(self.batches_taken)
        while (span := self.timetable.after(self.step)) is not None:
            task = self._begin(span)
            skipped = 0
            while self.step < span.end:
                if self._train_step(task, span, batches):
                    skipped = 0
                    self.step += 1
                    self._is_ahead = False
                    self.liveness.step(self.step)
                    self._after_step(span)
                    self._save_or_stop(span)
                    continue
                skipped += 1
                self.liveness.moves()
                if (reason := self.stopper.after_step()) is not None:
                    self._save(reason)
                if skipped >= MOST_SKIPPED:
                    raise DivergedError(f"{skipped} steps in a row after step {self.step} were skipped")
        self._log()
        if rolled_back := self.recovery.roll_back_last():
            self._is_ahead = True
            self._row |= self._sparsity_figures() | self._evaluate()
            self._log()
        self.shrinking.at_end(self.step, self.train_seconds)
        self.histograms.at_end(self.step, rolled_back)
        self.run_state.settle()
        assert self.last is not None
        return self.last

    def _begin(self, span: Span) -> Task:
        """Prepare a phase or round, or what is left of it; what is learnt in it."""
        if span.name != "dense" and self.dense is None:
            if self.last is None:
                self._row |= self._evaluate()
            self.dense = self.last
            assert self.dense is not None
            self._row["dense/top1"] = self.dense.top1
        # The dense model has been evaluated, and taken as teacher, by the time it is first pruned.
        task = self.task_for(span)
        self._clock = time.perf_counter()
        if span.name != "dense":
            self.histograms.before(self.step)
        if span.attempt is not None and self.step == span.begin:
            self._log()
            self._is_ahead = True
            self.recovery.begin(span.attempt)
            self._clock = time.perf_counter()
            self._row |= self._update_masks()
            self.recovery.rewind()
        else:
            self._row |= self._update_masks()
        self._log()
        self._clock = time.perf_counter()
        return task

    def _train_step(self, task: Task, span: Span, batches: Batches) -> bool:
        """One optimizer step over the global batch; False where it was left out: something was not finite."""
        # Drawn anew at every step, what the model draws need not be saved.
        self._seed_draws()
        self.batches_taken += 1
        for group in self.optimizer.param_groups:
            group["lr"] = span.lr(self.step)
        self.loss_watch.begin()
        figures: list[tuple[dict[str, Tensor], int]] = []
        for micro in range(self.accumulate):
            inputs, labels = next(batches)
            last = micro + 1 == self.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.student.wrapped):
                output = task(inputs, labels, self.step)
                # DDP averages over ranks; their parts of the batch need not be equal, but each sample counts the same.
                share = len(labels) * self.accelerator.num_processes / self.batch_size
                self.accelerator.backward(output.loss * share)
            self.loss_watch.add(output.loss, self.step + 1)
            figures.append((output.figures, len(labels)))
        if (reason := self.loss_watch.to_skip()) is not None:
            logger.warning(f"{reason} after step {self.step}; the step is left out")
            self.optimizer.zero_grad()
            return False
        for means, samples in figures:
            self._meter.add(means, samples)
        if self.penalty is not None and span.name == "dense":
            scaler = self.accelerator.scaler
            self.penalty.add_to_gradients(1.0 if scaler is None else scaler.get_scale())
        if self.clip_norm is not None or _is_due(self.log_every, self.step + 1, span):
            self.pruner.mask_gradients()
            limit = math.inf if self.clip_norm is None else self.clip_norm
            norm = self.accelerator.clip_grad_norm_(self.student.bare.parameters(), limit)
            self._meter.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.pruner.steps_done > self.step

    def _seed_draws(self) -> None:
        """Seed what the model draws on this rank's device, of this batch."""
        seed = mix(self.seed, self.accelerator.process_index, self.batches_taken)
        # torch.manual_seed would see to accelerators of every kind, and for those that there are not write down where
        # it was called from, which takes half a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)

    def _after_step(self, span: Span) -> None:
        """Prune, evaluate and log where due. A phase's last figures wait: the next phase may add to them."""
        # A dense model, and a round, are evaluated before anything more is pruned.
        if self.step < span.end or (span.name != "dense" and span.attempt is None):
            self._row |= self._update_masks()
        if self.compare_every is not None and self.step % self.compare_every == 0:
            self._compare_replicas()
        if _is_due(self.log_every, self.step, span):
            self._row |= self._train_figures(span)
        if _is_due(self.eval_every, self.step, span):
            self._row |= self._evaluate()
        if self.step < span.end:
            self._log()
        else:
            self._judge(span.attempt)

    def _save_or_stop(self, span: Span) -> None:
        reason = self.stopper.after_step()
        wanted = self.run_state.is_best(self._is_final, self._top1) or self.recovery.mark(self.step) is not None
        if reason is not None or wanted or _is_due(self.save_every, self.step, span):
            self._save(reason)

    def _save(self, reason: str | None) -> None:
        """Write a checkpoint, and end the run if there is a reason to."""
        progress = self._progress()
        self._refuse_nonfinite_loss(progress["meter"])
        if self._is_ahead:  # a start that goes on does that again
            problem = self.run_state.settle()
        else:
            problem = self.run_state.save(
                self.step, progress, self._is_final, self._top1, reason is not None, self.recovery.mark(self.step)
            )
        self._clock = time.perf_counter()
        self.liveness.moves()
        if reason is not None:
            raise Stopped(f"stopped by {reason} at step {self.step}" + (f"; {problem}" if problem else ""))

    @property
    def _is_final(self) -> bool:
        """Whether the sparsity is the final one; under a guard nobody knows which that is."""
        return self.recovery.is_unguarded and self.pruner.is_final and self.step >= self.timetable.pruning.begin

    @property
    def _top1(self) -> float | None:
        """The accuracy of the model as it is, where that is known."""
        return self.last.top1 if self.last is not None and self._evaluated_at == self.step else None

    def _progress(self) -> dict[str, Any]:
        self._stop_clock()
        return {
            "step": self.step,
            "batches_taken": self.batches_taken,
            "dense": self.dense and asdict(self.dense),
            "last": self.last and asdict(self.last),
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
            "at_last_log": self._at_last_log,
            "row": dict(self._row),
            "evaluating": self._evaluating,
            "logged_at": self._logged_at,
            "rounds": self.recovery.state(),
            "meter": self._meter.total(self.accelerator),
        }

    def _evaluate(self) -> dict[str, float]:
        """Evaluate, or stop in the middle; a run that goes on begins with it."""
        self._stop_clock()
        self._evaluating = True
        try:
            self.last = self.evaluate(self._stop_evaluating)
        except _StopAsked as asked:
            self._clock = time.perf_counter()
            self._save(str(asked))
        self._evaluating, self._evaluated_at = False, self.step
        self._clock = time.perf_counter()
        assert self.last is not None
        beside = {} if self.dense is None else {"dense/top1": self.dense.top1}
        return self.last.figures() | beside

    def _judge(self, attempt: Attempt | None) -> None:
        if attempt is not None:
            assert self.dense is not None
            assert self.last is not None
            self._row |= self.recovery.judge(attempt, self.pruner.sparsity, self.dense, self.last)

    def _compare_replicas(self) -> None:
        if not compare_replicas(dict(self.student.bare.named_parameters()), self.step):
            self.compare_every = None
            logger.warning("integrity.every: no rank holds what another holds, so there is nothing to compare")

    def _finish_evaluation(self) -> None:
        """Evaluate where the start before this one was stopped in the middle of that, and do what follows it."""
        self._row |= self._evaluate()
        if any(span.begin < self.step < span.end for span in self.timetable.spans):
            self._log()
        judged = self.recovery.ends_at(self.step)
        self._judge(judged)
        if judged is not None or self.run_state.is_best(self._is_final, self._top1):
            self._save(None)

    def _stop_evaluating(self) -> None:
        self.liveness.moves()
        if (reason := self.stopper.reason()) is not None:
            raise _StopAsked(reason)

    def _train_figures(self, span: Span) -> dict[str, float]:
        means = self._meter.means(self.accelerator)
        self._refuse_nonfinite_loss(means)
        self._stop_clock()
        step, seconds = self._at_last_log
        self._at_last_log = (self.step, self.train_seconds)
        samples = (self.step - step) * self.batch_size
        return {
            **{f"train/{name}": value for name, value in means.items()},
            "train/top1": 100 * means["top1"],
            "train/lr": span.lr(self.step - 1),
            "train/grad_norm": float(self._meter.grad_norm),
            "train/samples_per_s": samples / (self.train_seconds - seconds),
        }

    def _refuse_nonfinite_loss(self, figures: dict[str, float]) -> None:
        if not math.isfinite(figures.get("loss", 0.0)):
            span = next(span for span in self.timetable.spans if self.step <= span.end)
            raise DivergedError(
                f"the training loss is NaN or infinite{self.loss_watch.where()}; try a lower {span.key}.lr, "
                "train.clip_norm, or train.on_nonfinite=skip_step"
            )

    def _update_masks(self) -> dict[str, float]:
        try:
            report = self.pruner.step()
        except NonFiniteError as error:
            # By the time of an update gradients have carried it from one rank to all.
            where = self.loss_watch.where()
            raise NonFiniteError(f"{error}; the loss is NaN or infinite{where}" if where else str(error)) from None
        if report is None:
            return {}
        if report.newly_pruned:
            self._evaluated_at = None
        self.histograms.after(self.step, report.newly_pruned)
        self._stop_clock()
        if self.shrinking.after_update(self.step, self.train_seconds):
            self._clock = time.perf_counter()
        for name in set(report.held) - self._held:
            logger.warning(f"{name} is down to the least that is to stay of it, and is held there")
        self._held |= set(report.held)
        return {
            **self._sparsity_figures(),
            "prune/threshold": report.threshold,
            "prune/update_ms": 1000 * report.seconds,
            "prune/newly_pruned": report.newly_pruned,
        }

    def _sparsity_figures(self) -> dict[str, float]:
        return {
            "prune/target_sparsity": self.pruner.schedule.sparsity(self.step),
            "prune/sparsity": self.pruner.sparsity,
            **self.shrinking.figures(),
            **{f"prune/layer/{name}": layer.sparsity for name, layer in self.pruner.layers().items()},
        }

    def _log(self) -> None:
        if self._row:
            self._logged_at = self.step
            place = {"trainer/step": self.step, "trainer/epoch": self.step / self.steps_per_epoch}
            self.trackers.log(place | self._row)
            self._row = {}

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now


def _is_due(every: int | None, step: int, span: Span) -> bool:
    """Every so many steps, and always at the end of a phase, so that no mean mixes phases."""
    return step == span.end or (every is not None and step % every == 0)
