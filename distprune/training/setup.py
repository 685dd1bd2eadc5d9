"""From a configuration to the objects of a run; the one place that knows all parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distprune.config import Config
from distprune.config.schema import AdamW, Teacher, Texts
from distprune.data import Inputs, Order
from distprune.data.sampler import mix
from distprune.errors import ConfigError
from distprune.models import build_model, load_weights
from distprune.pruning import GradientSync, MaskHolder, Permutations, Pruner, Schedule, Score
from distprune.pruning.prunable import unwrap
from distprune.structured import ChannelPruner, Channels, GroupPenalty, find_channels, kept_of
from distprune.tracking import Trackers, read_histograms
from distprune.tracking.logs import logger
from distprune.training.checkpoint import CheckpointError, Checkpoints
from distprune.training.checks import check_fit, check_teacher, fit_to_texts, rehearse
from distprune.training.devices import (
    gradient_exchange,
    is_sharded,
    limit_waiting,
    shard,
    shard_beside,
    side_group,
    wrap,
)
from distprune.training.features import FeatureLoss, Projections, Taps, feature_widths, student_taps, teacher_taps
from distprune.training.held_out import HeldOut, open_split
from distprune.training.histograms import Histograms
from distprune.training.liveness import Liveness
from distprune.training.methods import chosen, make_allocation, make_bounds, make_most, make_pattern, make_score
from distprune.training.nonfinite import LossWatch
from distprune.training.permuting import reorder_channels
from distprune.training.phases import Span, Timetable, make_timetable
from distprune.training.ramps import lay_out, stretch
from distprune.training.recovery import Recovery
from distprune.training.run_folder import RunFolder
from distprune.training.run_state import RunState
from distprune.training.shrinking import Shrinking
from distprune.training.splits import Split
from distprune.training.stopping import Stopper
from distprune.training.student import Student
from distprune.training.tasks import Classification, Distillation, Task
from distprune.training.trainer import Trainer
from distprune.training.whole import metadata, plain_state


def make_model(config: Config, train: Split) -> nn.Module:
    """The student with its initial weights, the same on every rank, on the CPU.

    Raises:
        ConfigError: it cannot be made, or see `fit_to_texts`.
    """
    torch.manual_seed(config.run.seed)
    own = config.model
    return _build(config, own.name, own.args, own.weights, train, "model")


def load_teachers(config: Config, train: Split) -> dict[str, nn.Module]:
    """The teachers that come from files, on the CPU, each by the setting that names it."""
    models: dict[str, nn.Module] = {}
    own = config.model
    for key, teacher in config.distill.teachers.items() if config.distill is not None else ():
        if isinstance(teacher, Teacher):
            name, args = (teacher.name, teacher.args) if teacher.name else (own.name, {**own.args, **teacher.args})
            models[key] = _build(config, name, args, teacher.weights, train, key)
    return models


def _build(config: Config, name: str, args: dict[str, Any], weights: str | None, train: Split, key: str) -> nn.Module:
    """A model for the data, with given weights, or else those it has by itself."""
    model = build_model(name, args, train.outputs, key, config.data.task, pretrained=weights is None)
    if weights is not None:
        load_weights(model, weights, f"{key}.weights")
    if isinstance(config.data, Texts):
        fit_to_texts(model, train.tokenizer, config.data, key)
    return model


def place(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Move a model to a device, in the configured memory format."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.model.channels_last else model


def place_frozen(model: nn.Module, config: Config, accelerator: Accelerator, sharded: bool) -> nn.Module:
    """Move a model that is not trained to the device, sharded and compiled on request."""
    model = shard(model, accelerator) if sharded else place(model, config, accelerator.device)
    if config.run.compile:
        model.compile()
    return model


def make_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer of all parameters that train. Its learning rate is set at every step."""
    options = config.optimizer.model_dump(exclude={"name"})
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(config.optimizer, AdamW):
        return torch.optim.AdamW(parameters, **{**options, "betas": tuple(config.optimizer.betas)})
    return torch.optim.SGD(parameters, **options)


def wrap_projections(
    projections: Projections, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> nn.Module:
    """Place and wrap projections between features as the student is, and let its optimizer train them.

    Args:
        projections: with their initial weights, the same on every rank.
        model: the student as wrapped for training.
        optimizer: its torch optimizer.
        accelerator: ranks and device.
    """
    if not projections.own_widths:
        return projections
    if is_sharded(accelerator):
        shard_beside(projections, model)
    else:
        projections.to(accelerator.device)
    optimizer.add_param_group({"params": list(projections.parameters())})
    wrapped: nn.Module = projections
    if isinstance(model, DistributedDataParallel):
        wrapped = DistributedDataParallel(projections, gradient_as_bucket_view=True)
    # DDP lays out its buckets for good, as in `rehearse`.
    outputs = wrapped({i: torch.zeros(1, own, device=accelerator.device) for i, own in projections.own_widths.items()})
    accelerator.backward(torch.cat(list(outputs.values()), 1).sum())
    wrapped.zero_grad(set_to_none=True)
    return wrapped


class Tasks:
    """The task of each phase, with the dense teacher made when it is first needed.

    Args:
        config: of the run.
        student: the model.
        taps: of it.
        pruner: knows whether it is pruned already.
        spans: of the run.
        train: the data.
        accelerator: ranks, device, autocast.
        folder: where the dense teacher is kept.

    Raises:
        ConfigError: a teacher cannot be made, or see `Taps`.
    """

    def __init__(
        self,
        config: Config,
        student: Student,
        taps: Taps,
        pruner: MaskHolder,
        spans: Sequence[Span],
        train: Split,
        accelerator: Accelerator,
        folder: RunFolder,
    ) -> None:
        self._config = config
        self._student = student
        self._taps = taps
        self._pruner = pruner
        self._spans = spans
        self._train = train
        self._accelerator = accelerator
        self._folder = folder
        self._teachers: dict[str, tuple[nn.Module, Taps]] = {}
        self._is_kept = False
        # Loaded at once: a file that is not there should end the run before it begins.
        for key, teacher in load_teachers(config, train).items():
            self._add(key, teacher)
        self.projections = Projections([])
        self._wrapped: nn.Module = self.projections

    def rehearse(self, inputs: Inputs, outputs: int, samples: int, dense: Taps, optimizer: Optimizer) -> None:
        """Run some inputs through the teachers from files, and make the projections between features.

        Args:
            inputs: which the student has just seen, with its taps and `dense` open.
            outputs: of the student.
            samples: how many there are in the inputs.
            dense: what of the student will teach, see `student_taps`.
            optimizer: the torch optimizer of the student.

        Raises:
            ConfigError: see `check_teacher` and `feature_widths`.
        """
        taught = {
            key: check_teacher(teacher, taps, inputs, outputs, self._train.outputs, self._accelerator, key)
            for key, (teacher, taps) in self._teachers.items()
        }
        widths = feature_widths(self._config.distill, self._taps, dense, taught, samples)
        torch.manual_seed(mix(self._config.run.seed, len(widths)))
        self.projections = Projections(widths)
        self._wrapped = wrap_projections(self.projections, self._student.wrapped, optimizer, self._accelerator)

    def for_span(self, span: Span) -> Task:
        """What is learnt in the phase `span`."""
        accelerator, smoothing, distill = self._accelerator, self._config.train.label_smoothing, self._config.distill
        teacher = distill.dense if distill is not None else None
        if span.name != "dense" and not self._is_kept:
            # Now, before the student is first pruned, whichever phase has the teacher.
            self._keep_dense(teacher is not None)
            self._is_kept = True
            if teacher is not None:
                self._add(teacher, self._from_dense())
        if distill is None or span.name not in distill.phases:
            return Classification(self._student, accelerator.autocast, smoothing)
        teachers, taps = zip(*(self._teachers[key] for key in distill.teachers), strict=True)
        steps = stretch(span, self._spans, distill.phases)
        alpha, temperature = (lay_out(value, *steps) for value in (distill.alpha, distill.temperature))
        features = FeatureLoss(
            distill.features, self._taps, taps, self._wrapped, self.projections.own_widths, self._student
        )
        return Distillation(
            self._student, teachers, alpha, temperature, accelerator.autocast, smoothing,
            features if distill.features else None,
        )  # fmt: skip

    def dense(self) -> nn.Module | None:
        """The model before its first weight was pruned, ready to run; None where it was not kept. Called on all ranks.

        It is the teacher, where that is one.
        """
        distill = self._config.distill
        teacher = None if distill is None else distill.dense
        if teacher in self._teachers:
            return self._teachers[teacher][0]
        (there,) = broadcast_object_list([self._folder.dense.exists()])
        if not there:
            return None
        sharded = is_sharded(self._accelerator) if distill is None or teacher is None else distill.sharded
        return place_frozen(self._from_dense(), self._config, self._accelerator, sharded)

    def _add(self, key: str, teacher: nn.Module) -> None:
        assert self._config.distill is not None
        placed = place_frozen(teacher, self._config, self._accelerator, self._config.distill.sharded)
        self._teachers[key] = placed, teacher_taps(self._config.distill, key, placed)

    def _keep_dense(self, is_needed: bool) -> None:
        """Write the student to a file, where no earlier start has: one that goes on may find it pruned already."""
        self._accelerator.wait_for_everyone()
        (there,) = broadcast_object_list([self._folder.dense.exists()])
        if there:
            return
        if self._pruner.zeros:
            if is_needed:
                raise CheckpointError(f"the dense model {self._folder.dense} is gone, and the model is pruned already")
            return
        weights = plain_state(self._student.bare, self._accelerator.process_index)
        if self._accelerator.is_main_process:
            try:
                self._folder.write_tensors(self._folder.dense.name, weights, metadata(kept_of(self._student.bare)))
            except OSError as error:
                if is_needed:
                    raise
                logger.warning(f"{error}; in the end nothing can be compared with the dense model")
        self._accelerator.wait_for_everyone()

    def _from_dense(self) -> nn.Module:
        # Built anew: a copy of the wrapped student would call the student's own forward.
        own = self._config.model
        return _build(self._config, own.name, own.args, str(self._folder.dense), self._train, "distill.teacher")


@dataclass
class Job:
    """Everything a run needs, made and checked, with nothing written yet."""

    config: Config
    accelerator: Accelerator
    trainer: Trainer
    pruner: MaskHolder
    model: nn.Module
    train: Split
    held_out: HeldOut
    tasks: Tasks
    timetable: Timetable
    trackers: Trackers
    run_state: RunState
    recovery: Recovery
    shrinking: Shrinking
    stopper: Stopper
    liveness: Liveness
    permuted: Permutations | None
    """The order that channels were brought into; None where `prune.permute` is off."""


def make_job(config: Config, folder: RunFolder, accelerator: Accelerator) -> Job:
    """Make the objects of a run that is to write to `folder`.

    Raises:
        ConfigError: something the configuration names is missing or does not fit.
    """
    train = open_split(config, config.data.train_split, accelerator)
    held_out = HeldOut(config, train, accelerator)
    order = make_order(config, len(train), accelerator.num_processes)
    timetable = make_timetable(config, order.steps_per_epoch)
    classes = train.outputs
    if config.distill is not None and config.distill.sharded and not is_sharded(accelerator):
        raise ConfigError(
            "distill.sharded: the teacher can be sharded only where the student is; launch with launch/fsdp2.yaml, or "
            "leave it out"
        )
    exchange = gradient_exchange(config, accelerator)
    bare = make_model(config, train)
    if not is_sharded(accelerator):  # else every rank's part is moved alone
        place(bare, config, accelerator.device)
    outputs = check_fit(bare, held_out.split.first_inputs(), classes, accelerator)
    permuted = None
    if config.prune.permute:
        permuted = reorder_channels(bare, held_out.split.first_inputs(), config, accelerator)
    channels = find_prunable_channels(config, bare, held_out.split.first_inputs())
    wrapped, optimizer = wrap(bare, make_optimizer(bare, config), accelerator)
    inputs, labels = train.first_samples(training=True)
    once = partial(rehearse, inputs=inputs, labels=labels, classes=classes, accelerator=accelerator)
    student = Student(bare, wrapped, accelerator, config.run.compile, once)
    taps, dense = student_taps(config.distill, bare)
    with taps, dense:
        student.prepare()
    dense.remove()
    pruner = make_pruner(wrapped, optimizer, timetable.pruning.schedule, config, channels)
    if exchange != "dense":
        packed = True if exchange == "packed" else None
        student.sync_gradients(lambda wrapped: GradientSync(pruner, wrapped, packed))
    tasks = Tasks(config, student, taps, pruner, timetable.spans, train, accelerator, folder)
    tasks.rehearse(inputs, outputs, len(labels), dense, optimizer.optimizer)
    trackers = Trackers()
    for_stopping, for_saving = (side_group(config.integrity.start_timeout) for _ in range(2))
    stopper = Stopper(folder.stop_file, config.run.max_minutes, for_stopping)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, for_saving)
    shrinking = Shrinking(
        student, pruner, config.prune.channels, timetable.rounds is not None or is_sharded(accelerator),
        held_out.split.first_inputs,
    )  # fmt: skip
    run_state = RunState(
        config, accelerator, bare, tasks.projections, optimizer.optimizer, pruner, shrinking, checkpoints,
        folder.tracker_id,
    )  # fmt: skip
    every = None if config.tracking.histograms is None else config.tracking.histograms.every
    histograms = Histograms(pruner, trackers, every, partial(read_histograms, folder.histograms))
    recovery = Recovery(timetable.rounds, config.prune.guard, run_state)
    liveness = Liveness(
        folder.heartbeats, folder.logs, accelerator.process_index, accelerator.num_processes,
        config.integrity.start_timeout, config.integrity.timeout,
        partial(limit_waiting, bare, (for_stopping, for_saving)),
    )  # fmt: skip
    loss_watch = LossWatch(
        nn.ModuleList([bare, tasks.projections]), accelerator.device, config.train.on_nonfinite == "skip_step",
        gradients=accelerator.scaler is None,
    )  # fmt: skip

    trainer = Trainer(
        accelerator, student, optimizer, pruner, shrinking, make_penalty(pruner, config), timetable,
        partial(train.train_batches, order), tasks.for_span,
        partial(held_out.evaluate, bare), trackers, histograms, run_state, recovery, stopper,
        loss_watch, liveness,
        batch_size=config.train.batch_size, accumulate=config.train.accumulate, steps_per_epoch=order.steps_per_epoch,
        clip_norm=config.train.clip_norm, log_every=config.run.log_every, eval_every=config.eval.every,
        save_every=config.checkpoint.every, compare_every=config.integrity.every, seed=config.run.seed,
    )  # fmt: skip
    return Job(
        config, accelerator, trainer, pruner, bare, train, held_out, tasks, timetable, trackers, run_state, recovery,
        shrinking, stopper, liveness, permuted,
    )  # fmt: skip


def make_order(config: Config, samples: int, world_size: int) -> Order:
    """The order of samples.

    Raises:
        ConfigError: the batch is larger than the data set, or too small for ranks and micro-batches.
    """
    size, parts = config.train.batch_size, world_size * config.train.accumulate
    if size > samples:
        raise ConfigError(f"train.batch_size: {size} is more than the {samples} samples of data.train_split; lower it")
    if size < parts:
        raise ConfigError(
            f"train.batch_size: {size} samples cannot be shared by {world_size} ranks with {config.train.accumulate} "
            f"micro-batches each; it takes at least {parts}"
        )
    return Order(samples, size, config.run.seed)


def find_prunable_channels(config: Config, model: nn.Module, inputs: Inputs) -> Channels | None:
    """The channels that can be removed from the bare model, if channels are to be pruned; on all ranks.

    Rank 0 finds them and tells the others, since what it tries may come out otherwise on another processor.

    Raises:
        ConfigError: see `find_channels`.
    """
    if config.prune.pattern != "channels":
        return None
    found: list[Channels | str] = [""]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = [find_channels(model, inputs, *chosen(config.prune, model))]
        except ValueError as error:
            found = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    if isinstance(found[0], str):
        raise ConfigError(f"prune: {found[0]}")
    return found[0]


def make_penalty(pruner: MaskHolder, config: Config) -> GroupPenalty | None:
    """`prune.channels.penalty`."""
    weight = config.prune.channels.penalty
    return GroupPenalty(pruner, weight) if isinstance(pruner, ChannelPruner) and weight else None


def make_pruner(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    config: Config,
    channels: Channels | None,
    score: Score | None = None,
) -> MaskHolder:
    """The pruner of the section `prune`.

    Args:
        model, optimizer: see `Pruner`.
        schedule: how sparse when.
        config: what else.
        channels: of the model, where these are pruned.
        score: instead of that of the section.

    Raises:
        ConfigError: a pattern matches nothing, nothing can be pruned, or bounds and budget cannot be met together.
    """
    prune = config.prune
    try:
        if channels is not None:
            return ChannelPruner(
                model,
                optimizer,
                schedule,
                channels,
                budget=prune.channels.budget,
                score=score or make_score(config),
                norm=prune.channels.norm,
                compare="uniform" if prune.allocation == "uniform" else "global",
                multiple=prune.channels.multiple,
                min_width=prune.channels.min_width,
                most=make_most(prune, channels),
            )
        include, exclude = chosen(prune, unwrap(model))
        return Pruner(
            model,
            optimizer,
            schedule,
            include=include,
            exclude=exclude,
            embeddings=prune.embeddings,
            score=score or make_score(config),
            allocation=make_allocation(prune),
            bounds=make_bounds(prune),
            min_weights=prune.min_weights,
            pattern=make_pattern(prune),
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"prune: {error}") from error
