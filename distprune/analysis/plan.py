"""`distprune plan`: what a run would do, before it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import SGD

from distprune.config import Config, dump_config, load_config
from distprune.errors import ConfigError
from distprune.pruning import BlockPattern, GradientScore, LayerSparsity, NonFiniteError, OneShotSchedule, magnitude
from distprune.structured import ChannelPruner, Channels
from distprune.training.checks import check_fit, check_teacher, rehearse
from distprune.training.devices import make_accelerator
from distprune.training.features import feature_widths, student_taps, teacher_taps
from distprune.training.held_out import HeldOut, open_split
from distprune.training.methods import make_pattern, make_score
from distprune.training.permuting import check_reorderable
from distprune.training.phases import Timetable, make_timetable
from distprune.training.run_folder import RunFolder
from distprune.training.run_state import refuse_another_job
from distprune.training.setup import (
    find_prunable_channels,
    load_teachers,
    make_model,
    make_optimizer,
    make_order,
    make_pruner,
)

FEW_WEIGHTS = 10
SHOWN_UPDATES = 8


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    config: Config
    timetable: Timetable
    steps_per_epoch: int
    samples: tuple[int, int]
    """In the training and in the evaluation split."""
    what_samples: str
    """They are: images, texts or blocks of tokens."""
    classes: int
    """Or tokens that the tokenizer knows."""
    counted: int
    """Of which the sparsity is a fraction: prunable weights, or what channels cost."""
    what: str
    """It is: zeros, or the budget of channels."""
    left_out: dict[str, str]
    """Why parameters stay dense."""
    layers: dict[str, LayerSparsity]
    """If the starting weights were pruned at once."""
    chains: int | None
    """Of channels that can be reordered; None where none are to be."""

    @property
    def warnings(self) -> list[str]:
        """What is probably not meant."""
        return [*self.timetable.pruning.warnings, *_doubts(self.config, self.layers, self.timetable)]


def make_plan(path: str, overrides: Sequence[str] = (), world_size: int = 1, elsewhere: bool = False) -> Plan:
    """Make everything a run is made of, and try it on two samples.

    Args:
        path, overrides: see `load_config`.
        world_size: on how many ranks it will run.
        elsewhere: whether it will run on other machines than this, so that a GPU which it needs is not missed here.

    Raises:
        ConfigError: what would stop the run before its first step.
    """
    config = load_config(path, overrides)
    _check_folder(RunFolder(config.run.dir or ""), config)
    tried = config.run.model_copy(update={"precision": "fp32"}) if elsewhere else config.run
    accelerator = make_accelerator(config.model_copy(update={"run": tried}))
    train = open_split(config, config.data.train_split, accelerator)
    held_out = HeldOut(config, train, accelerator).split
    order = make_order(config, len(train), world_size)
    timetable = make_timetable(config, order.steps_per_epoch)
    model = make_model(config, train).to(accelerator.device)
    outputs = check_fit(model, held_out.first_inputs(), train.outputs, accelerator)
    chains = check_reorderable(model, held_out.first_inputs()) if config.prune.permute else None
    inputs, labels = train.first_samples(training=True)
    student, dense = student_taps(config.distill, model)
    with student, dense:
        rehearse(model, inputs, labels, train.outputs, accelerator)
    taught = {}
    for key, teacher in load_teachers(config, train).items():
        taps = teacher_taps(config.distill, key, teacher.to(accelerator.device))
        taught[key] = check_teacher(teacher, taps, inputs, outputs, train.outputs, accelerator, key)
    feature_widths(config.distill, student, dense, taught, len(labels))
    channels = find_prunable_channels(config, model, held_out.first_inputs())
    pruner = make_pruner(model, make_optimizer(model, config), timetable.pruning.schedule, config, channels)
    blocks = isinstance(make_pattern(config.prune), BlockPattern)
    counted, what = pruner.weights, "zeros at most, in whole blocks" if blocks else "zeros"
    if isinstance(pruner, ChannelPruner):
        counted, what = pruner.cost(pruner.kept), pruner.budget
    return Plan(
        config,
        timetable,
        order.steps_per_epoch,
        (len(train), len(held_out)),
        train.what,
        train.outputs,
        counted,
        what,
        dict(pruner.left_out),
        _pruned_at_once(model, config, channels),
        chains,
    )


def _check_folder(folder: RunFolder, config: Config) -> None:
    """Refuse a folder that cannot be written, or holds another run."""
    if (fault := folder.unwritable()) is not None:
        raise ConfigError(fault)
    if folder.config.exists() and (folder.is_done() or any(folder.checkpoints.glob("step-*"))):
        refuse_another_job(folder.began_with(), config)


def print_plan(path: str, overrides: Sequence[str] = ()) -> None:
    """Print the resolved configuration, the steps, the schedule, the sparsity of each layer, and warnings.

    Raises:
        ConfigError: what would stop the run before its first step.
    """
    plan = make_plan(path, overrides)
    console = Console(highlight=False)
    console.print(dump_config(plan.config), soft_wrap=True, markup=False)
    counts = f"{plan.samples[0]:,} training and {plan.samples[1]:,} evaluation {plan.what_samples}"
    console.print(f"{counts}, {plan.classes} {'tokens' if plan.config.data.task == 'causal_lm' else 'classes'}")
    console.print(_phase_table(plan.timetable, plan.steps_per_epoch))
    if plan.config.prune.sparsity > 0:
        console.print(_schedule_table(plan.timetable, plan.counted, plan.what))
        console.print(_layer_table(plan.layers, plan.config))
    if plan.chains is not None:
        console.print(f"{plan.chains} chains of channels can be reordered before that")
    for name, reason in plan.left_out.items():
        console.print(f"left dense: {name}, {reason}", markup=False)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", markup=False, style="yellow")


def _pruned_at_once(model: nn.Module, config: Config, channels: Channels | None) -> dict[str, LayerSparsity]:
    """What would be left of the starting weights; scores that look at gradients know nothing yet, so by magnitude."""
    at_once = OneShotSchedule(config.prune.sparsity)
    score = magnitude if _looks_at_gradients(config) else None
    pruner = make_pruner(model, SGD(model.parameters()), at_once, config, channels, score)
    try:
        pruner.step()
    except NonFiniteError as error:
        raise ConfigError(f"model.weights: {error}") from None
    except ValueError as error:
        raise ConfigError(f"prune: {error}") from None
    return pruner.layers()


def _looks_at_gradients(config: Config) -> bool:
    return isinstance(make_score(config), GradientScore)


def _phase_table(timetable: Timetable, steps_per_epoch: int) -> Table:
    table = Table(title=f"Phases, {steps_per_epoch:,} steps an epoch", title_justify="left")
    for column in ("phase", "first step", "last step", "epochs", "learning rate"):
        table.add_column(column, justify="left" if column in ("phase", "learning rate") else "right")
    for span in timetable.spans:
        epochs = (span.end - span.begin) / steps_per_epoch
        rate = f"{span.phase.schedule}, {span.lr(span.begin):.3g} to {span.lr(span.end - 1):.3g}"
        name = span.name if span.attempt is None else f"round {span.attempt.round}"
        table.add_row(name, f"{span.begin + 1:,}", f"{span.end:,}", f"{epochs:.1f}", rate)
    return table


def _schedule_table(timetable: Timetable, counted: int, what: str) -> Table:
    pruning, schedule = timetable.pruning, timetable.pruning.schedule
    updates = [step for step in range(pruning.begin, pruning.end + 1) if schedule.is_update(step)]
    table = Table(title=f"Sparsity, {len(updates):,} updates", title_justify="left")
    for column in ("after step", "sparsity", what if "zeros" in what else f"{what} gone"):
        table.add_column(column, justify="right")
    stride = max(1, (len(updates) - 1) // (SHOWN_UPDATES - 1))
    for step in sorted({*updates[::stride], updates[-1]}):
        sparsity = schedule.sparsity(step)
        table.add_row(f"{step:,}", f"{sparsity:.6f}", f"{round(sparsity * counted):,} of {counted:,}")
    return table


def _layer_table(layers: dict[str, LayerSparsity], config: Config) -> Table:
    origin = "trained" if config.model.is_trained else "freshly drawn"
    how = " by magnitude" if _looks_at_gradients(config) else ""
    table = Table(title=f"Layers, if the {origin} weights were pruned at once{how}", title_justify="left")
    table.add_column("layer", overflow="fold")
    channels = config.prune.pattern == "channels"
    for column in ("channels",) if channels else ("shape", "weights"):
        table.add_column(column, justify="right")
    for column in ("left", "sparsity"):
        table.add_column(column, justify="right")
    for name, layer in layers.items():
        weights = math.prod(layer.shape)
        shape = () if channels else (" x ".join(map(str, layer.shape)),)
        table.add_row(name, *shape, f"{weights:,}", f"{weights - layer.zeros:,}", f"{layer.sparsity:.4f}")
    return table


def _doubts(config: Config, layers: dict[str, LayerSparsity], timetable: Timetable) -> Iterator[str]:
    """What is probably not meant."""
    trained = config.model.is_trained
    if not trained and timetable.spans[0].name != "dense":
        yield "an untrained model is pruned: name trained model.weights, or give phases.dense a length"
    if config.prune.pattern == "channels":
        return
    for name, layer in layers.items():
        weights = math.prod(layer.shape)
        least = config.prune.min_weights
        if trained and weights > least >= weights - layer.zeros:
            what_is_left = least or "nothing"
            yield f"{name}: {what_is_left} would be left of its {weights:,} weights; exclude it, or set prune.bounds"
        elif (left := weights * (1 - config.prune.sparsity)) < FEW_WEIGHTS:
            yield (
                f"{name}: prune.sparsity {config.prune.sparsity} leaves about {left:.0f} of its {weights} weights; "
                "prune.exclude keeps it dense"
            )
