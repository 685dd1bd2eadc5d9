"""Weights & Biases, through its own SDK."""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import shlex
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import wandb

from distprune.config.schema import Wandb
from distprune.tracking.logs import logger
from distprune.tracking.tracker import BINS, Histogram, Row, read_histograms
from distprune.tracking.wandb_artifacts import log_models
from distprune.tracking.wandb_file import TABLES, WEIGHTS, kind_of, logged_rows

BEST = {"eval/top1": "max", "eval/loss": "min"}
MILESTONES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Of sparsity, at which there is a table of layers."""
WITHIN = 1e-4
"""Of a milestone: of N weights round(0.9 N) may be a little less than 0.9."""
SECONDS_TO_CONNECT = 3.0


class WandbTracker:
    """One W&B run per run folder, its id kept in the folder before W&B hears of it.

    The x-axis of every metric is trainer/step, which travels as a metric: W&B's own step counts log calls, and
    drops rows where it would fall. A run that goes on repeats the steps since its last checkpoint, and a process that
    was killed may not have handed on the last it logged: rows that W&B's files hold already are left out, and those
    that are only in metrics.jsonl are caught up with, so that all files of a run in order hold each row once.

    Args:
        settings: the section tracking.wandb.
        folder: the run folder, with metrics.jsonl and histograms.jsonl up to where the run goes on.
        config: the resolved configuration, and what else is to be kept beside it.
        shapes: of what is pruned, by the names of layers.
    """

    def __init__(
        self, settings: Wandb, folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        id_file = folder / "wandb_id"
        known = id_file.read_text() if id_file.exists() else ""
        run_id = _run_id(known)
        if run_id != known:
            id_file.write_text(run_id)
        self._settings = settings
        self._folder = folder
        self._shapes = shapes
        self._failed = False
        self._preempted = False
        self._collapsed = False
        self._milestone = 0.0
        self._known = logged_rows(folder, run_id)
        mode = _mode(settings)
        # Where tables wait for their upload; else that is the home, which may be full or not there.
        os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb").absolute()))
        # W&B's service is a process of its own, and Slurm sends signals to every process: SIGUSR1 must not end it, and
        # a mask is inherited. On SIGTERM it writes what it has and ends all the same.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        try:
            self._run = wandb.init(
                mode=mode,
                project=settings.project,
                entity=settings.entity,
                name=settings.name or folder.name,
                group=settings.group,
                job_type=settings.job_type,
                tags=settings.tags,
                id=run_id,
                resume="allow",
                dir=folder,
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")
        for name, summary in BEST.items():
            self._run.define_metric(name, step_metric="trainer/step", summary=f"{summary},last")
        metrics = folder / "metrics.jsonl"
        for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
            self.log(json.loads(line))
        for step, layers in read_histograms(folder / "histograms.jsonl"):
            self.log_histograms(step, layers)

    def log(self, row: Row) -> None:
        """Log one row, unless W&B has it: of a step where rounds meet there are two. What follows from it, too: a table
        of layers where the sparsity passes a milestone, an alert where accuracy collapses."""
        is_new = self._log(row, row.keys(), lambda: row)
        passed = [m for m in MILESTONES if m < row.get("prune/sparsity", 0.0) + WITHIN]
        if passed and passed[-1] > self._milestone:
            self._milestone = passed[-1]
            self._log_table(f"sparsity-{self._milestone:.2f}", row, lambda name: row[f"prune/layer/{name}"])
        lost = row.get("dense/top1", 0.0) - row.get("eval/top1", 100.0)
        if lost > self._settings.collapse and not self._collapsed:
            self._collapsed = True
            if is_new:
                text = f"{row['eval/top1']:.2f} % at step {row['trainer/step']}, {lost:.2f} points below the dense one"
                self._alert("accuracy has collapsed", text, "WARN")

    def log_histograms(self, step: int, layers: Mapping[str, Histogram]) -> None:
        """Log the histograms of one step, unless W&B has them."""
        named = {f"{WEIGHTS}{name}": layer for name, layer in layers.items()}
        self._log({"trainer/step": step}, named, lambda: {name: _histogram(layer) for name, layer in named.items()})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Put a table into the summary: in the history it would be a row without a step."""

        def add() -> None:
            self._run.summary[name] = wandb.Table(columns=list(columns), data=[list(row) for row in rows])

        self._try(add)

    def preempt(self) -> None:
        """Say that the run was stopped and will go on."""
        self._preempted = True
        self._alert("the run was stopped", "it goes on when the same command is run again", "WARN")
        self._try(self._run.mark_preempting)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Add the summary, the last table and models, and close the run, as failed where there is none."""
        if summary is not None:
            layers = summary["prune/layers"]
            self._log_table("final", {"trainer/step": summary["steps"]}, lambda name: layers[name]["sparsity"])
            if self._settings.artifacts and not self._failed:
                log_models(self._run, self._folder, summary)
            text = f"{summary['eval/top1']:.2f} % at sparsity {summary['prune/sparsity']:.4f}"
            self._alert("the run is done", f"{text}, {summary['dense/top1']:.2f} % before pruning", "INFO")
        elif not self._preempted:
            self._alert("the run has failed", "its log and status.json say why", "ERROR")

        def close() -> None:
            if summary is not None:
                for name, value in summary.items():
                    self._run.summary[name] = value
            self._run.finish(exit_code=0 if summary is not None else 1)

        self._try(close)
        if self._failed:
            with suppress(Exception):
                wandb.teardown()  # else it fails at exit once more, with a traceback
        if self._run.offline:
            folder = shlex.quote(str(self._folder))
            print(f"W&B was offline; to upload: wandb sync {folder}/wandb/offline-run-*-{self._run.id}*")

    def _log(self, place: Row, names: Iterable[str], make: Callable[[], Mapping[str, Any]]) -> bool:
        """Log what `make` gives under `names`, with the step of `place`, unless W&B has it; whether it had not."""
        key = kind_of(names), int(place["trainer/step"])
        if self._known[key]:
            self._known[key] -= 1
            return False
        self._try(lambda: self._run.log({**make(), "trainer/step": place["trainer/step"]}))
        return True

    def _log_table(self, name: str, place: Row, sparsity: Callable[[str], float]) -> None:
        """Log a table of all layers, unless W&B has it."""
        name = f"{TABLES}{name}"
        self._log(place, [name], lambda: {name: _table(self._shapes, sparsity)})

    def _alert(self, title: str, text: str, level: str) -> None:
        if self._settings.alerts:
            self._try(lambda: self._run.alert(f"{self._run.name}: {title}", text, level))

    def _try(self, call: Callable[[], object]) -> None:
        """Call W&B; once that fails, no more: a tracker is no reason to end a run."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            reason = str(error) or type(error).__name__
            logger.warning(f"W&B has failed ({reason}); figures are in metrics.jsonl, and the next start hands them on")


def _table(shapes: Mapping[str, tuple[int, ...]], sparsity: Callable[[str], float]) -> Any:
    rows = []
    for layer, shape in shapes.items():
        weights, gone = math.prod(shape), sparsity(layer)
        rows.append([layer, " x ".join(map(str, shape)), weights, round(gone * weights), gone])
    return wandb.Table(["layer", "shape", "weights", "zeros", "sparsity"], rows)


def _histogram(layer: Histogram) -> Any:
    edges = [layer.limit * (2 * place / BINS - 1) for place in range(BINS + 1)]
    return wandb.Histogram(np_histogram=(layer.counts, edges))


def _run_id(known: str) -> str:
    """The id of the trial where a W&B agent started us, since wandb.init heeds no other; else `known`, or a new one."""
    trial = os.environ.get("WANDB_RUN_ID") if _in_sweep() else None
    return trial or known or secrets.token_hex(4)


def _mode(settings: Wandb) -> Any:
    if settings.mode != "auto":
        return settings.mode
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    if _in_sweep():
        return "online"
    if not has_key():
        return "offline"
    if (why := unreachable()) is not None:
        logger.warning(f"{why}; it is kept offline")
    return "online" if why is None else "offline"


def _in_sweep() -> bool:
    """Whether a W&B agent started us, which has logged in, by whatever means."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def has_key() -> bool:
    """Whether `wandb login` or the environment left an API key; looking does not need the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_server().hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def unreachable() -> str | None:
    """Why W&B, or the proxy on the way to it, takes no connections, if so; compute nodes often have no network."""
    way = server = _server()
    proxy = getproxies().get(server.scheme)
    if proxy and not proxy_bypass(server.hostname or ""):
        way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = way.port or (80 if way.scheme == "http" else 443)
        socket.create_connection((way.hostname or "", port), SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        return f"W&B cannot be reached at {way.hostname} ({error})"
    return None


def _server() -> SplitResult:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
