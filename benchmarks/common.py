"""What the benchmarks share: one run in a process of its own, and where figures come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from distprune.cli import STOPPED_EARLY
from distprune.training.hosts import processor

RESULTS = Path(__file__).parent / "results"
KEPT = (
    "dense/top1", "eval/top1", "eval/top1_drop", "prune/sparsity", "prune/zeros", "prune/weights", "prune/guard",
    "prune/budget", "prune/shrinks", "params/dense", "params/total", "macs/dense", "macs/left",
    "prune/rounds", "seed", "steps", "wall_s", "world_size", "train_samples_per_s", "mask_digest",
    "precision", "commit",
)  # fmt: skip
WEIGHTS = {"resnet20-12fca82f.th": "resnet20", "resnet56-4bfd9763.th": "resnet56"}
"""Trained weights (configs/cifar10_resnet20.yaml says where from), and which model they are of."""
OF_A_PLACE = ("data.path", "data.source", "model.weights", "run.dir", "tracking")


class StoppedEarly(Exception):
    """A run was stopped when its time was over."""


def run(
    config: Path, folder: Path, overrides: Sequence[str], threads: int | None = None, minutes: float | None = None
) -> dict[str, Any]:
    """One run in a process of its own; its summary, with its precision, and the commit that it began with. One that
    is done already is not done again.

    Args:
        config: its configuration.
        folder: its run folder.
        overrides: of the configuration.
        threads: of the process; None leaves them to torch.
        minutes: that it may take; one that was stopped goes on.

    Raises:
        StoppedEarly: it took longer.
    """
    words = [f"run.dir={folder}", "tracking.wandb.mode=disabled", *overrides]
    words += [] if minutes is None else [f"run.max_minutes={minutes:.2f}"]
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "distprune.train", str(config), *words]
    stamp = folder / "commit"
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(commit(), encoding="utf-8")
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
    if code == STOPPED_EARLY:
        raise StoppedEarly(f"{folder} was stopped")
    if code:
        sys.exit(f"{' '.join(command)} has failed")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    precision = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["run"]["precision"]
    return {**summary, "precision": precision, "commit": stamp.read_text(encoding="utf-8")}


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a summary."""
    return {key: summary[key] for key in KEPT if key in summary}


def settings(overrides: Sequence[str]) -> list[str]:
    """Overrides that say what was run, not where."""
    return [word for word in overrides if not word.startswith(OF_A_PLACE)]


def origin(summary: dict[str, Any]) -> dict[str, Any]:
    """Versions, machine and commit."""
    return {
        "versions": summary["versions"],
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "commit": summary.get("commit") or commit(),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """What this is measured on."""
    found = {"cores": os.cpu_count(), "processor": processor(), "system": platform.platform()}
    return found if device == "cpu" else {**found, "gpu": torch.cuda.get_device_name()}


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def write(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """The commit that is checked out, marked where files differ from it, but for results and pages of them; "unknown"
    where there is no repository and DISTPRUNE_COMMIT does not say."""
    git = ["git", "-C", str(RESULTS.parents[1])]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return os.environ.get("DISTPRUNE_COMMIT", "unknown")
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("-dirty" if changed.stdout else "")
