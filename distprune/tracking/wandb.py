"""Weights & Biases, through its own SDK."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from distprune.config.schema import Wandb
from distprune.tracking.tracker import Row

BEST = {"eval/top1": "max", "eval/loss": "min"}


class WandbTracker:
    """One W&B run per run folder, its id kept in the folder before W&B hears of it.

    The x-axis of every metric is trainer/step, which travels as a metric: W&B's own step counts log calls, and
    drops rows where it would fall.

    Args:
        settings: the section tracking.wandb.
        folder: the run folder.
        config: the resolved configuration, and what else is to be kept beside it.
    """

    def __init__(self, settings: Wandb, folder: Path, config: Mapping[str, Any]) -> None:
        id_file = folder / "wandb_id"
        if not id_file.exists() or not id_file.read_text():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            mode=_mode(settings),
            project=settings.project,
            entity=settings.entity,
            name=settings.name or folder.name,
            group=settings.group,
            job_type=settings.job_type,
            tags=settings.tags,
            id=id_file.read_text(),
            resume="allow",
            dir=folder,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")
        for name, summary in BEST.items():
            self._run.define_metric(name, step_metric="trainer/step", summary=f"{summary},last")

    def log(self, row: Row) -> None:
        """Log one row."""
        self._run.log(dict(row))

    def preempt(self) -> None:
        """Say that the run was stopped and will go on."""
        self._run.mark_preempting()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Add the summary and close the run, as failed where there is none."""
        if summary is not None:
            for name, value in summary.items():
                self._run.summary[name] = value
        self._run.finish(exit_code=0 if summary is not None else 1)


def _mode(settings: Wandb) -> Any:
    if settings.mode != "auto":
        return settings.mode
    return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    """Whether `wandb login` or the environment left an API key; looking does not need the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
