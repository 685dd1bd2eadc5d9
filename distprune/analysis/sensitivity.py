"""`distprune sensitivity`: what it costs to prune each layer alone, and how sparse each should be for it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from distprune.analysis.equal_loss import Curve, UnreachableError, allocate
from distprune.analysis.heat_map import draw
from distprune.analysis.sensitivity_folder import SensitivityFolder, Trial
from distprune.analysis.sensitivity_report import Layer, Sensitivity, print_table, write_allocation, write_figures
from distprune.config import Config, load_config
from distprune.errors import ConfigError
from distprune.pruning import Prunable, find_prunable
from distprune.tracking import Progress
from distprune.training.checks import check_fit, check_labels
from distprune.training.devices import is_sharded, make_accelerator
from distprune.training.evaluation import EvalResult, evaluate
from distprune.training.held_out import open_split
from distprune.training.methods import chosen
from distprune.training.setup import make_model, place
from distprune.training.splits import Split, tensor_bytes
from distprune.training.stopping import Stopped, Stopper

C10D: Any = dist  # torch's stores have no types

Evaluate = Callable[[], EvalResult]
SECONDS_BETWEEN_LOOKS = 0.1


def print_sensitivity(path: str, overrides: Sequence[str], sparsities: str, out: str | None) -> None:
    """Measure what is not in the folder yet, write sensitivity.json, its picture and the allocation, print a table.

    Called on all ranks, each of which holds the whole model.

    Args:
        path, overrides: see `load_config`.
        sparsities: numbers between 0 and 1 with commas between them.
        out: the folder; by default beside the run folder.

    Raises:
        ConfigError: lists what is wrong with the arguments, or says what does not fit.
        Stopped: the same command goes on.
    """
    config, levels, folder = _check(path, overrides, sparsities, out)
    stopper = Stopper(folder.stop_file, config.run.max_minutes, None)
    accelerator = make_accelerator(config)
    try:
        if is_sharded(accelerator):
            raise ConfigError(
                "launcher: every rank holds the whole model here, FSDP would shard it; take launch/multi_gpu.yaml, or "
                "launch/cpu.yaml without GPUs"
            )
        held_out = open_split(config, config.data.eval_split, accelerator)
        train = open_split(config, config.data.train_split, accelerator)
        check_labels(train, held_out, "data.eval_split", config.data.eval_split)
        model = place(make_model(config, train), config, accelerator.device)
        check_fit(model, held_out.first_inputs(), train.outputs, accelerator)
        tensors = _find_prunable(model, config)
        trials = [Trial(), *(Trial(tensor.name, level) for tensor in tensors for level in levels)]
        known = _open(folder, config, model, held_out, accelerator)
        batches = held_out.eval_batches(alone=True)

        def look() -> None:
            if (why := stopper.after_step()) is not None:
                raise Stopped(f"stopped by {why}")

        def evaluate_alone() -> EvalResult:
            return evaluate(model, batches(), accelerator.autocast, accelerator.device, look, alone=True)

        stopper.listen()
        _measure(trials, known, tensors, evaluate_alone, look, folder, accelerator)
        if accelerator.is_main_process:
            found = _conclude(folder.results(), trials, tensors, config)
            write_figures(found, folder)
            write_allocation(found, folder, path)
            draw(found, folder)
            print_table(found, folder, [path, *overrides])
    finally:
        folder.release()
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def pruned(weight: Tensor, sparsity: float) -> Iterator[None]:
    """Set the round(sparsity * n) smallest of n weights to 0 until the block ends; of equal ones the later go first."""
    whole, count = weight.detach(), weight.numel()
    before = whole.clone()
    # A stable sort leaves equal ones in the order that they have here, the last first.
    order = whole.abs().flatten().flip(0).argsort(stable=True)
    zeros = torch.zeros(count, dtype=torch.bool, device=weight.device)
    zeros[count - 1 - order[: round(sparsity * count)]] = True
    whole.masked_fill_(zeros.view(weight.shape), 0)
    try:
        yield
    finally:
        whole.copy_(before)


class Turns:
    """Numbers below `count`, each for one rank: whoever is free takes the next."""

    def __init__(self, count: int) -> None:
        self._count = count
        if dist.is_initialized():
            self._store = C10D.PrefixStore("sensitivity", C10D.distributed_c10d._get_default_store())
        else:
            self._store = C10D.HashStore()

    def __iter__(self) -> Iterator[int]:
        while (turn := self._store.add("taken", 1) - 1) < self._count:
            yield turn
            self._store.add("done", 1)

    def wait(self, look: Callable[[], None]) -> None:
        """Until all are done, by whichever rank.

        No collective: its time limit would end the wait for an evaluation that takes long. A rank that dies is for the
        launcher to see, which ends the others.

        Args:
            look: called meanwhile; what it raises ends the wait.

        Raises:
            Stopped: another rank has stopped.
        """
        while self.done < self._count:
            look()
            if self._store.check(["stopped"]):
                raise Stopped(self._store.get("stopped").decode())
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self, why: str) -> None:
        """Tell the ranks that wait."""
        self._store.set("stopped", why)

    @property
    def done(self) -> int:
        """How many all ranks have done."""
        return cast(int, self._store.add("done", 0))


def _check(
    path: str, overrides: Sequence[str], sparsities: str, out: str | None
) -> tuple[Config, list[float], SensitivityFolder]:
    levels, faults = _levels(sparsities)
    config = None
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        faults += error.faults
    if config is not None:
        if not config.model.is_trained:
            faults.append("model.weights: nothing to measure; name trained weights")
        if config.prune.pattern is not None:
            faults.append("prune.pattern: single weights are measured here; set prune.pattern=null")
        out = out or f"{Path(config.run.dir or '')}-sensitivity"
        if levels and config.prune.sparsity >= levels[-1]:
            faults.append(_too_few(config.prune.sparsity, levels))
    folder = SensitivityFolder(out or "")
    if (fault := folder.unwritable()) is not None:
        faults.append(fault)
    if faults or config is None:
        raise ConfigError(*faults, source=path)
    return config, levels, folder


def _levels(text: str) -> tuple[list[float], list[str]]:
    """Sparsities in rising order, and what is wrong with them."""
    levels: list[float] = []
    faults = []
    for word in text.split(","):
        try:
            level = float(word)
        except ValueError:
            faults.append(f"--sparsities: {word!r} is no number; expected some such as 0.5,0.9,0.99")
            continue
        if not 0 < level < 1:
            faults.append(f"--sparsities: {word} is not between 0 and 1")
        elif level in levels:
            faults.append(f"--sparsities: {word} is given twice")
        else:
            levels.append(level)
    return sorted(levels), faults


def _too_few(sparsity: float, levels: Sequence[float]) -> str:
    digits = 2 - math.floor(math.log10(1 - sparsity))
    higher = round(1 - (1 - sparsity) / 2, digits)
    words = ",".join(f"{level:g}" for level in (*levels, higher))
    return (
        f"prune.sparsity: {sparsity} is not below {levels[-1]:g}, the most that layers reach as far as they are "
        f"measured, so none could make up for another; add a higher one: --sparsities {words}"
    )


def _find_prunable(model: nn.Module, config: Config) -> tuple[Prunable, ...]:
    prune = config.prune
    try:
        tensors = find_prunable(model, *chosen(prune, model), prune.embeddings).tensors
    except ValueError as error:
        raise ConfigError(f"prune: {error}") from error
    faults = [f"model.weights: {t.name} has NaN or infinity" for t in tensors if not t.weight.isfinite().all()]
    if faults:
        raise ConfigError(*faults)
    return tensors


def _open(
    folder: SensitivityFolder, config: Config, model: nn.Module, held_out: Split, accelerator: Accelerator
) -> set[Trial]:
    """Let rank 0 take the folder, and every rank know what is in it."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            folder.claim()
            answer[0] = set(folder.begin(_settings(config, model, held_out)))
        except ConfigError as error:
            answer[1] = error.faults
    known, faults = broadcast_object_list(answer)
    if faults is not None:
        raise ConfigError(*faults)
    return cast(set[Trial], known)


def _settings(config: Config, model: nn.Module, held_out: Split) -> dict[str, Any]:
    """What results depend on. Files may be moved: weights and samples are known by what is in them."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor_bytes(tensor))
    data = config.data.model_dump(include={"eval_split", "eval_transforms", "mean", "std", "tokenizer", "max_length"})
    return {
        "model.name": config.model.name,
        "model.args": config.model.args,
        "model.weights": f"sha256 {weights.hexdigest()[:16]}",
        **{f"data.{key}": value for key, value in data.items()},
        "data": f"{len(held_out)} {held_out.what}, sha256 {held_out.digest()[:16]}",
        "run.precision": config.run.precision,
        "run.seed": config.run.seed,
    }


def _measure(
    trials: Sequence[Trial],
    known: set[Trial],
    tensors: Sequence[Prunable],
    evaluate_alone: Evaluate,
    look: Callable[[], None],
    folder: SensitivityFolder,
    accelerator: Accelerator,
) -> None:
    """Evaluate what is not known, shared out to the ranks, and wait until all of it is done."""
    weights = {tensor.name: tensor.weight for tensor in tensors}
    todo = [trial for trial in trials if trial not in known]
    before = len(trials) - len(todo)
    turns = Turns(len(todo))
    progress = Progress(lambda: len(trials), before, "evaluation") if accelerator.is_main_process else None
    try:
        for turn in turns:
            trial = todo[turn]
            with pruned(weights[trial.layer], trial.sparsity) if trial.layer is not None else nullcontext():
                result = evaluate_alone()
            if trial.layer is None and not math.isfinite(result.loss):
                raise ConfigError(f"model.weights: the loss of the dense model is {result.loss}")
            folder.add(accelerator.process_index, trial, result)
            if progress is not None:
                row = {"prune/sparsity": trial.sparsity, "eval/top1": result.top1}
                progress.log({"trainer/step": before + turns.done + 1, **row})
        turns.wait(look)
        if progress is not None:
            progress.log({"trainer/step": len(trials)})
    except Stopped as stop:
        turns.stop(str(stop))
        raise
    finally:
        if progress is not None:
            progress.finish(None)


def _conclude(
    results: dict[Trial, EvalResult], trials: Sequence[Trial], tensors: Sequence[Prunable], config: Config
) -> Sensitivity:
    """Put results together, and share the sparsity out to the layers.

    Raises:
        ConfigError: ranks wrote where this one does not see it, or the sparsity is not reached.
    """
    lacking = [trial for trial in trials if trial not in results]
    if lacking:
        raise ConfigError(
            f"--out: {len(lacking)} results are not there, of {lacking[0]} first; all ranks must see the same folder"
        )
    dense = results[Trial()]
    levels = {tensor.name: [t.sparsity for t in trials if t.layer == tensor.name] for tensor in tensors}
    curves = {}
    for tensor in tensors:
        losses = [results[Trial(tensor.name, level)].loss for level in levels[tensor.name]]
        increases = [loss - dense.loss for loss in takewhile(math.isfinite, losses)]
        curves[tensor.name] = Curve(tensor.numel, levels[tensor.name][: len(increases)], increases)
    try:
        allocation = allocate(curves, config.prune.sparsity)
    except UnreachableError as error:
        raise ConfigError(
            f"prune.sparsity: {config.prune.sparsity} is above {error.most:g}, the most that is reached without layers "
            "whose loss is not finite; add lower ones to --sparsities, or lower it"
        ) from None
    layers = {
        tensor.name: Layer(
            tuple(tensor.weight.shape),
            {level: results[Trial(tensor.name, level)] for level in levels[tensor.name]},
            allocation.sparsities[tensor.name],
            tensor.numel - int(tensor.weight.count_nonzero()),
        )
        for tensor in tensors
    }
    return Sensitivity(dense, layers, config.prune.sparsity, allocation.increase)
