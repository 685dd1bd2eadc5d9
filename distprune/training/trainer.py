"""The loop.

for each phase:
    task for the phase                    a teacher comes in here, if at all
    for each optimizer step:
        set the learning rate
        forward, backward                 once for each micro-batch
        mask gradients, clip              the optimizer's hook masks again before it steps
        optimizer step
        pruner step                       nothing, unless the schedule says so
        log, evaluate                     where due
    evaluate
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from distprune.pruning import Pruner
from distprune.tracking import Trackers
from distprune.training.evaluation import EvalResult
from distprune.training.phases import Span, Timetable
from distprune.training.tasks import Task

Batches = Iterator[tuple[Tensor, Tensor]]


class DivergedError(RuntimeError):
    """The training loss is NaN or infinite."""


@dataclass
class Meter:
    """Means of scalars over samples and ranks, kept on the device until somebody asks."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    grad_norm: Tensor | float = 0.0

    def add(self, figures: dict[str, Tensor], samples: int) -> None:
        """Count the batch means of `samples` samples."""
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value * samples if name in self.sums else value * samples
        self.samples += samples

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks since the last call. One collective and one wait for the device."""
        local = torch.stack([*self.sums.values(), next(iter(self.sums.values())).new_tensor(self.samples)])
        *sums, samples = accelerator.reduce(local, "sum").tolist()
        names = list(self.sums)
        self.sums, self.samples = {}, 0
        return {name: total / samples for name, total in zip(names, sums, strict=True)}


class Trainer:
    """Runs the phases of a timetable.

    Args:
        accelerator: devices, ranks and autocast.
        model: the student as prepared by the accelerator.
        optimizer: its optimizer, prepared too.
        pruner: holds the masks.
        timetable: phases and when they begin and end.
        batches: this rank's micro-batches without end, normalised and on the device.
        task_for: the task of a phase, asked for when the phase begins.
        evaluate: counts accuracy on the evaluation set, on all ranks.
        trackers: take the figures.
        batch_size: samples per step over all ranks.
        accumulate: micro-batches per step and rank.
        steps_per_epoch: for trainer/epoch.
        clip_norm: largest gradient norm, or None.
        log_every, eval_every: steps between logged lines and evaluations.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        pruner: Pruner,
        timetable: Timetable,
        batches: Batches,
        task_for: Callable[[Span], Task],
        evaluate: Callable[[], EvalResult],
        trackers: Trackers,
        *,
        batch_size: int,
        accumulate: int,
        steps_per_epoch: int,
        clip_norm: float | None,
        log_every: int,
        eval_every: int | None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.pruner = pruner
        self.timetable = timetable
        self.batches = batches
        self.task_for = task_for
        self.evaluate = evaluate
        self.trackers = trackers
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.steps_per_epoch = steps_per_epoch
        self.clip_norm = clip_norm
        self.log_every = log_every
        self.eval_every = eval_every
        self.step = 0
        self.dense: EvalResult | None = None
        self.last: EvalResult | None = None
        self.train_seconds = 0.0
        self._meter = Meter()
        self._clock = time.perf_counter()
        self._at_last_log = (0, 0.0)

    def fit(self) -> EvalResult:
        """Train to the end of the timetable and return the final evaluation.

        Raises:
            DivergedError: the loss is not finite on a step that is logged.
            NonFiniteError, MaskMismatchError: see `Pruner.step`.
        """
        self.model.train()
        row: dict[str, float] = {}
        for span in self.timetable.spans:
            if span.name != "dense" and self.dense is None:
                row = row or self._evaluate()
                self.dense = self.last
            task = self.task_for(span)
            # The dense model has been evaluated, and taken as teacher, by the time it is first pruned.
            self._log(row | self._update_masks())
            self._clock = time.perf_counter()
            while self.step < span.end:
                if self._train_step(task, span):
                    self.step += 1
                    row = self._after_step(span)
                    if self.step < span.end:
                        self._log(row)
        self._log(row)
        assert self.last is not None
        return self.last

    def _train_step(self, task: Task, span: Span) -> bool:
        """One optimizer step over the global batch; False where the gradient scaler skipped it."""
        for group in self.optimizer.param_groups:
            group["lr"] = span.lr(self.step)
        for micro in range(self.accumulate):
            images, labels = next(self.batches)
            last = micro + 1 == self.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                output = task(images, labels)
                # DDP averages over ranks; their parts of the batch need not be equal, but each sample counts the same.
                share = len(labels) * self.accelerator.num_processes / self.batch_size
                self.accelerator.backward(output.loss * share)
            self._meter.add(output.figures, len(labels))
        if self.clip_norm is not None or _is_due(self.log_every, self.step + 1, span):
            self.pruner.mask_gradients()
            limit = math.inf if self.clip_norm is None else self.clip_norm
            self._meter.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.pruner.steps_done > self.step

    def _after_step(self, span: Span) -> dict[str, float]:
        """Prune and evaluate where due; the figures to log."""
        row: dict[str, float] = {}
        if span.name != "dense" or self.step < span.end:
            row |= self._update_masks()
        if _is_due(self.log_every, self.step, span):
            row |= self._train_figures(span)
        if _is_due(self.eval_every, self.step, span):
            row |= self._evaluate()
        return row

    def _evaluate(self) -> dict[str, float]:
        self._stop_clock()
        self.last = self.evaluate()
        self._clock = time.perf_counter()
        return {"eval/top1": self.last.top1, "eval/loss": self.last.loss}

    def _train_figures(self, span: Span) -> dict[str, float]:
        means = self._meter.means(self.accelerator)
        if not math.isfinite(means["loss"]):
            raise DivergedError(
                f"the training loss is {means['loss']} at step {self.step}; try a lower phases.{span.name}.lr or "
                "train.clip_norm"
            )
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

    def _update_masks(self) -> dict[str, float]:
        report = self.pruner.step()
        if report is None:
            return {}
        return {
            "prune/target_sparsity": report.target_sparsity,
            "prune/sparsity": report.sparsity,
            "prune/threshold": report.threshold,
            "prune/update_ms": 1000 * report.seconds,
            "prune/newly_pruned": report.newly_pruned,
            **{f"prune/layer/{name}": layer.sparsity for name, layer in self.pruner.layers().items()},
        }

    def _log(self, row: dict[str, float]) -> None:
        if row:
            self.trackers.log({"trainer/step": self.step, "trainer/epoch": self.step / self.steps_per_epoch, **row})

    def _stop_clock(self) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now


def _is_due(every: int | None, step: int, span: Span) -> bool:
    """Every so many steps, and always at the end of a phase, so that no mean mixes phases."""
    return step == span.end or (every is not None and step % every == 0)
