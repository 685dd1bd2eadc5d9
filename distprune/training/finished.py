"""What a run has left in its folder, read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distprune.config import Config, load_config
from distprune.errors import ConfigError
from distprune.training.run_folder import RunFolder
from distprune.training.setup import make_model
from distprune.training.splits import Split

DECIDED = ("phases", "prune", "distill", "train", "optimizer")
"""Sections of the configuration that say how a run came about."""


class FinishedRun:
    """A run that is done.

    Args:
        path: its folder.
        overrides: `section.key=value` words for what lies elsewhere now, such as data.path.

    Attributes:
        folder: what lies where.
        config: as the run had it.

    Raises:
        ConfigError: it is no run folder, its run is not done, or an override is wrong.
    """

    def __init__(self, path: str, overrides: Sequence[str] = ()) -> None:
        self.folder = RunFolder(path)
        if not self.folder.path.exists():
            raise ConfigError(f"{path} is no run folder: there is no such thing")
        if not self.folder.config.exists():
            raise ConfigError(f"{path} is no run folder: it has no config.yaml")
        if not self.folder.model.exists():
            state = (self.folder.status() or {}).get("state", "unknown")
            raise ConfigError(f"{path} has no model.safetensors yet (its run is {state}); run it to its end first")
        self.config: Config = load_config(self.folder.config, overrides)
        if touched := {word.split("=")[0].split(".")[0] for word in overrides} & set(DECIDED):
            own = load_config(self.folder.config)
            others = [name for name in DECIDED if name in touched and getattr(own, name) != getattr(self.config, name)]
            if others:
                faults = [f"{name}: {path} was run with other settings; they cannot be changed now" for name in others]
                raise ConfigError(*faults)

    @property
    def summary(self) -> dict[str, Any]:
        """Figures of the end, by name."""
        return self._json("summary.json")

    @property
    def rows(self) -> list[dict[str, float]]:
        """Figures by step, in order."""
        path = self.folder.metrics
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None

    @property
    def validation(self) -> dict[str, Any] | None:
        """Accuracy of dense and pruned side by side, by set and class; None where it was not counted."""
        return self._json(self.folder.validation.name) if self.folder.validation.exists() else None

    @property
    def pruned_config(self) -> Config:
        """The configuration of the pruned model."""
        return self._with(self.folder.model)

    def pruned(self, train: Split) -> nn.Module:
        """The model as it was saved, without the channels that were removed, on the CPU."""
        return make_model(self.pruned_config, train)

    def dense(self, train: Split) -> nn.Module | None:
        """The model before its first weight was pruned, on the CPU; None where it was not kept."""
        return make_model(self._with(self.folder.dense), train) if self.folder.dense.exists() else None

    def _with(self, weights: Path) -> Config:
        return self.config.model_copy(update={"model": self.config.model.model_copy(update={"weights": str(weights)})})

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder.path / name
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        return found
