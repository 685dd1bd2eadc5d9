"""`distprune analyze`: what pruning has brought, counted and measured."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distprune.analysis.analysis_tables import print_analysis_tables
from distprune.analysis.costs import LayerCost, layer_costs, parameters
from distprune.analysis.exports import Exports
from distprune.analysis.latency import MIN_ROUNDS, Form, Timing, measure, of_model
from distprune.analysis.words import in_words
from distprune.config import Config
from distprune.data import Inputs
from distprune.errors import ConfigError
from distprune.export.source import Source
from distprune.models.packed import save_packed
from distprune.structured import kept_of
from distprune.tracking import Progress
from distprune.training.checks import check_fit
from distprune.training.devices import make_accelerator
from distprune.training.finished import FinishedRun
from distprune.training.held_out import open_split
from distprune.training.hosts import processor
from distprune.training.logits import repeated, to_device
from distprune.training.setup import place

CHUNK = 1 << 24


def print_analysis(
    path: str,
    overrides: Sequence[str],
    batch_sizes: str,
    threads: int | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Analyse a finished run, write analysis.json into its folder, and print tables, or the JSON.

    Args:
        path: the run folder.
        overrides: see `FinishedRun`.
        batch_sizes: numbers with commas between them, for which latency is measured.
        threads: that compute on the CPU; None takes as many as torch does by itself.
        seconds: for each form, device and batch size.
        as_json: print the JSON.

    Raises:
        ConfigError: lists what is wrong with the arguments.
    """
    run = FinishedRun(path, overrides)
    batches = _numbers(batch_sizes)
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads: must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if not seconds > 0:
        raise ConfigError(f"--seconds: must be above 0, got {seconds}")
    if (fault := run.folder.unwritable()) is not None:
        raise ConfigError(fault)
    found = analyze(run, batches, seconds)
    run.folder.write_json("analysis.json", found)
    if as_json:
        print(json.dumps(found))
    else:
        print_analysis_tables(found, run.folder.path)


def analyze(run: FinishedRun, batches: Sequence[int], seconds: float) -> dict[str, Any]:
    """JSON values: machine, layers, totals, sizes, latency, accuracy and words.

    Raises:
        ConfigError: the data or the models cannot be read.
    """
    config = run.config
    accelerator = make_accelerator(config)
    train = open_split(config, config.data.train_split, accelerator)
    held_out = open_split(config, config.data.eval_split, accelerator)
    models = {"dense": run.dense(train), "pruned": run.pruned(train)}
    inputs = held_out.first_inputs()
    for model in models.values():
        if model is not None:
            check_fit(model.to(accelerator.device), inputs, train.outputs, accelerator)
    pruned = models["pruned"]
    assert pruned is not None
    costs = {form: layer_costs(model, inputs) for form, model in models.items() if model is not None}
    totals = {form: _total(models[form], layers) for form, layers in costs.items()}
    totals.setdefault("dense", _as_dense(totals["pruned"], run.summary))
    devices = sorted({torch.device("cpu"), accelerator.device}, key=str)
    with tempfile.TemporaryDirectory() as scratch:
        dense = run.dense(train)
        unpruned = None if dense is None else Source(run, accelerator, train, held_out, dense.eval())
        exports = Exports(run.folder.path / "export", unpruned, Path(scratch), bool(kept_of(pruned)))
        timings = _time(
            lambda device: [*_models(models, config, device), *exports.forms(device)], inputs, devices, batches, seconds
        )
    sizes = _sizes(run, pruned)
    accuracy = run.validation["sets"]["eval"] if run.validation is not None else None
    layers = {name: asdict(cost) for name, cost in costs["pruned"].items()}
    for name, cost in costs.get("dense", {}).items():
        gone = {**asdict(cost), "weights": 0, "zeros": 0, "macs": 0, "effective_macs": 0}
        layers.setdefault(name, gone)["dense_macs"] = cost.macs
    return {
        "machine": _machine(accelerator.device),
        "layers": layers,
        "totals": totals,
        "sizes": sizes,
        "latency": [{**asdict(timing), "verdict": timing.verdict} for timing in timings],
        "accuracy": accuracy,
        "words": in_words(str(run.folder.path), config.prune.pattern, totals, sizes, timings, accuracy),
    }


def _models(models: Mapping[str, nn.Module | None], config: Config, device: torch.device) -> list[Form]:
    """Dense and pruned as torch runs them, and compiled where the run was."""
    dense, pruned = models["dense"], models["pruned"]
    assert pruned is not None
    name = "shrunk" if kept_of(pruned) else "masked"
    forms = []
    for compiled in (False, True) if config.run.compile else (False,):
        way = " compiled" if compiled else ""
        if dense is not None:
            forms.append(of_model(f"dense{way}", place(dense, config, device), device, compiled))
        forms.append(of_model(f"{name}{way}", place(pruned, config, device), device, compiled, f"dense{way}"))
    return forms


def _time(
    forms: Callable[[torch.device], list[Form]],
    inputs: Inputs,
    devices: Sequence[torch.device],
    batches: Sequence[int],
    seconds: float,
) -> list[Timing]:
    timings = list[Timing]()
    total = len(devices) * len(batches) * MIN_ROUNDS
    done = 0
    progress = Progress(lambda: max(total, done), 0, "round")

    def after_round() -> None:
        nonlocal done
        done += 1
        progress.log({"trainer/step": done})

    for device in devices:
        own = forms(device)
        for batch in batches:
            timings += measure(own, to_device(repeated(inputs, batch), device), seconds, after_round)
    progress.finish(None)
    return timings


def _total(model: nn.Module | None, layers: dict[str, LayerCost]) -> dict[str, int]:
    assert model is not None
    every, nonzero = parameters(model)
    return {
        "parameters": every,
        "nonzero": nonzero,
        "macs": sum(cost.macs for cost in layers.values()),
        "effective_macs": sum(cost.effective_macs for cost in layers.values()),
    }


def _as_dense(total: dict[str, int], summary: Mapping[str, Any]) -> dict[str, int]:
    """What is known of a dense model that was not kept: the run counted it if it pruned channels, else it had the
    shape of the pruned one."""
    every, macs = summary.get("params/dense", total["parameters"]), summary.get("macs/dense", total["macs"])
    return {"parameters": every, "nonzero": every, "macs": macs, "effective_macs": macs}


def _sizes(run: FinishedRun, pruned: nn.Module) -> dict[str, int]:
    """Bytes of files."""
    folder = run.folder
    sizes = {"dense": folder.dense.stat().st_size} if folder.dense.exists() else {}
    sizes["pruned"] = folder.model.stat().st_size
    sizes["pruned zipped"] = _zipped(folder.model)
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "packed.safetensors"
        save_packed(pruned.state_dict(), packed)
        sizes["packed"] = packed.stat().st_size
    return sizes


def _zipped(path: Path) -> int:
    """Bytes that zip makes of a file (deflate, level 6)."""
    packer, count = zlib.compressobj(6), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            count += len(packer.compress(chunk))
    return count + len(packer.flush())


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
    }


def _numbers(text: str) -> list[int]:
    faults, numbers = [], []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) < 1:
            faults.append(f"--batch-sizes: {word!r} is no number of samples; expected some such as 1,64")
        else:
            numbers.append(int(word))
    if faults:
        raise ConfigError(*faults)
    return sorted(set(numbers))
