"""From a configuration to the objects of a run; the one place that knows all parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from distprune.config import Config
from distprune.config.schema import AdamW, Teacher
from distprune.data import ImageData, Order, eval_loader, load_images, normalize, train_loader
from distprune.data.sampler import mix
from distprune.data.transforms import Transforms
from distprune.errors import ConfigError
from distprune.models import build_model, load_weights
from distprune.pruning import Pruner
from distprune.pruning.prunable import unwrap
from distprune.tracking import Trackers
from distprune.training.evaluation import EvalResult, evaluate
from distprune.training.phases import Span, Timetable, make_timetable
from distprune.training.tasks import Classification, Distillation, Task
from distprune.training.trainer import Trainer


def make_accelerator(config: Config) -> Accelerator:
    """Devices and ranks as the launcher says, on the CPU where there is no accelerator or run.device says so.

    Raises:
        ConfigError: there are more processes than GPUs, or the processes do not find each other.
    """
    gpus = torch.cuda.device_count()
    cpu = config.run.device == "cpu" or not torch.accelerator.is_available()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not cpu and torch.cuda.is_available() and local_ranks > gpus:
        raise ConfigError(
            f"{local_ranks} processes were launched on this host, which has {gpus} GPUs; lower --num_processes, or set "
            "run.device=cpu"
        )
    if cpu and config.run.precision == "fp16":
        raise ConfigError("run.precision: fp16 needs a GPU, and there is none; take bf16 or fp32")
    accelerator = Accelerator(
        # Without cpu=True, ranks on a machine without a GPU each believe that they are alone.
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(config.run.precision, config.run.precision),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}; check the accelerate "
            "configuration (launch/cpu.yaml works without a GPU)"
        )
    return accelerator


class Images:
    """Loaders of one split for one rank: normalised batches on the device."""

    def __init__(self, config: Config, split: str, accelerator: Accelerator) -> None:
        self.data: ImageData = load_images(config.data, split)
        self._config = config
        self._accelerator = accelerator
        device = accelerator.device
        self._mean = torch.tensor(config.data.mean, device=device)
        self._std = torch.tensor(config.data.std, device=device)
        self._pin = device.type == "cuda"
        self._memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format

    def train_batches(self, order: Order, begin: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches from step `begin` on, without end."""
        config, ranks = self._config, self._accelerator
        transforms = Transforms(config.data.train_transforms, config.run.seed, "data.train_transforms")
        loader = train_loader(
            self.data, transforms, order, begin, ranks.process_index, ranks.num_processes, config.train.accumulate,
            config.data.workers, self._pin,
        )  # fmt: skip
        return self._ready(loader)

    def eval_batches(self) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """This rank's part of the split, anew at each call."""
        config, ranks = self._config, self._accelerator
        transforms = Transforms(config.data.eval_transforms, config.run.seed, "data.eval_transforms")
        loader = eval_loader(
            self.data, transforms, config.eval.batch_size, ranks.process_index, ranks.num_processes,
            config.data.workers, self._pin,
        )  # fmt: skip
        return lambda: self._ready(loader)

    def _ready(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._accelerator.device
        for images, labels in loader:
            on_device = images.to(device, non_blocking=True, memory_format=self._memory_format)
            yield normalize(on_device, self._mean, self._std), labels.to(device, non_blocking=True)


def make_model(config: Config, classes: int) -> nn.Module:
    """The student with its initial weights, the same on every rank, on the CPU."""
    torch.manual_seed(config.run.seed)
    model = build_model(config.model.name, config.model.args, classes)
    if config.model.weights is not None:
        load_weights(model, config.model.weights)
    return model


def load_teacher(config: Config, classes: int) -> nn.Module | None:
    """The teacher that comes from a file, on the CPU; None where there is none."""
    teacher = config.distill.teacher if config.distill is not None else None
    if not isinstance(teacher, Teacher):
        return None
    own = config.model
    name, args = (teacher.name, teacher.args) if teacher.name else (own.name, {**own.args, **teacher.args})
    model = build_model(name, args, classes, "distill.teacher")
    load_weights(model, teacher.weights, "distill.teacher.weights")
    return model


def place(model: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Move `model` to the device, in the configured memory format, compiled on request."""
    model = model.to(device)
    if config.model.channels_last:
        model = model.to(memory_format=torch.channels_last)
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


class Tasks:
    """The task of each phase, with the teacher made when it is first needed."""

    def __init__(self, config: Config, model: nn.Module, classes: int, accelerator: Accelerator) -> None:
        self._config = config
        self._model = model
        self._classes = classes
        self._accelerator = accelerator
        # Loaded at once: a file that is not there should end the run before it begins.
        teacher = load_teacher(config, classes)
        self.teacher = None if teacher is None else place(teacher, config, accelerator.device)

    def for_span(self, span: Span) -> Task:
        """What is learnt in the phase `span`."""
        smoothing, distill = self._config.train.label_smoothing, self._config.distill
        if distill is None or span.name not in distill.phases:
            return Classification(self._model, smoothing)
        if self.teacher is None:
            self.teacher = self._from_student()
        return Distillation(
            self._model, self.teacher, distill.alpha, distill.temperature, self._accelerator.autocast, smoothing
        )

    def _from_student(self) -> nn.Module:
        # Built anew: a copy of the wrapped student would call the student's own forward.
        model = build_model(self._config.model.name, self._config.model.args, self._classes)
        model.load_state_dict(unwrap(self._model).state_dict())
        return place(model, self._config, self._accelerator.device)


@dataclass
class Job:
    """Everything a run needs, made and checked, with nothing written yet."""

    config: Config
    accelerator: Accelerator
    trainer: Trainer
    pruner: Pruner
    model: nn.Module
    tasks: Tasks
    timetable: Timetable
    trackers: Trackers


def make_job(config: Config) -> Job:
    """Make the objects of a run.

    Raises:
        ConfigError: something the configuration names is missing or does not fit.
    """
    accelerator = make_accelerator(config)
    train = Images(config, config.data.train_split, accelerator)
    held_out = Images(config, config.data.eval_split, accelerator)
    order = make_order(config, len(train.data), accelerator.num_processes)
    timetable = make_timetable(config, order.steps_per_epoch)
    classes = len(train.data.classes)
    bare = place(make_model(config, classes), config, accelerator.device)
    eval_batches = held_out.eval_batches()
    check_fit(bare, eval_batches(), classes, accelerator)
    model, optimizer = accelerator.prepare(bare, make_optimizer(bare, config))
    pruner = make_pruner(model, optimizer, timetable, config)
    tasks = Tasks(config, model, classes, accelerator)
    trackers = Trackers()
    # From here on randomness (dropout, say) may differ between ranks; samples and augmentation have seeds of their own.
    torch.manual_seed(mix(config.run.seed, accelerator.process_index))

    def evaluate_held_out() -> EvalResult:
        return evaluate(bare, eval_batches(), accelerator.autocast, accelerator.device)

    trainer = Trainer(
        accelerator, model, optimizer, pruner, timetable, train.train_batches(order, begin=0), tasks.for_span,
        evaluate_held_out, trackers,
        batch_size=config.train.batch_size, accumulate=config.train.accumulate, steps_per_epoch=order.steps_per_epoch,
        clip_norm=config.train.clip_norm, log_every=config.run.log_every, eval_every=config.eval.every,
    )  # fmt: skip
    return Job(config, accelerator, trainer, pruner, bare, tasks, timetable, trackers)


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


def make_pruner(model: nn.Module, optimizer: Optimizer, timetable: Timetable, config: Config) -> Pruner:
    """The pruner of the section `prune`.

    Raises:
        ConfigError: a pattern matches nothing, or nothing can be pruned.
    """
    prune = config.prune
    try:
        return Pruner(
            model,
            optimizer,
            timetable.schedule,
            include=prune.include,
            exclude=prune.exclude,
            embeddings=prune.embeddings,
        )
    except ValueError as error:
        raise ConfigError(f"prune: {error}") from error


@torch.inference_mode()
def check_fit(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], classes: int, accelerator: Accelerator
) -> None:
    """Run one small batch through the model.

    Raises:
        ConfigError: images do not fit the model, or it has fewer outputs than there are classes.
    """
    images, _ = next(batches)
    shape = tuple(images.shape[1:])
    model.eval()
    try:
        with accelerator.autocast():
            logits = model(images[:2])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model: {type(model).__name__} does not take images of {shape}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConfigError(f"model: {type(model).__name__} does not return logits of shape (batch, classes)")
    if logits.shape[1] < classes:
        raise ConfigError(
            f"model: {type(model).__name__} has {logits.shape[1]} outputs, but data has {classes} classes; set "
            f"model.args.num_classes={classes}"
        )
