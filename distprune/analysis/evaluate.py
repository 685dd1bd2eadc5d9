"""`distprune evaluate`: accuracy counted again from saved weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distprune.config import Config, load_config
from distprune.errors import ConfigError
from distprune.training.checks import check_fit
from distprune.training.devices import make_accelerator
from distprune.training.finished import FinishedRun
from distprune.training.held_out import HeldOut, open_split
from distprune.training.setup import make_model, place


def print_evaluation(target: str, overrides: Sequence[str] = ()) -> None:
    """Evaluate a run folder's model, or the initial weights of a configuration; print one JSON object.

    Raises:
        ConfigError: the target is neither, or what it names is missing.
    """
    config = _config_of(target, overrides)
    accelerator = make_accelerator(config)
    train = open_split(config, config.data.train_split, accelerator)
    held_out, classes = HeldOut(config, train, accelerator), train.outputs
    model = place(make_model(config, train), config, accelerator.device)
    check_fit(model, held_out.split.first_inputs(), classes, accelerator)
    result = held_out.evaluate(model)
    weights = sum(p.numel() for p in model.parameters())
    nonzero = sum(int((p != 0).sum()) for p in model.parameters())
    figures = {
        **result.figures(),
        "eval/samples": result.samples,
        "params/total": weights,
        "params/nonzero": nonzero,
        "weights": config.model.weights,
    }
    print(json.dumps(figures))


def _config_of(target: str, overrides: Sequence[str]) -> Config:
    if not Path(target).exists():
        raise ConfigError(f"{target} is neither a run folder nor a configuration file: there is no such thing")
    if not Path(target).is_dir():
        config = load_config(target, overrides)
        if not config.model.is_trained:
            raise ConfigError("model.weights: nothing to evaluate; name trained weights, or give a run folder")
        return config
    return FinishedRun(target, overrides).pruned_config
