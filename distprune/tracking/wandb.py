"""Weights & Biases, through its own SDK."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import wandb

from distprune.config.schema import Wandb
from distprune.tracking.logs import logger
from distprune.tracking.tracker import Row
from distprune.tracking.wandb_file import logged_steps

BEST = {"eval/top1": "max", "eval/loss": "min"}
SECONDS_TO_CONNECT = 3.0


class WandbTracker:
    """One W&B run per run folder, its id kept in the folder before W&B hears of it.

    The x-axis of every metric is trainer/step, which travels as a metric: W&B's own step counts log calls, and
    drops rows where it would fall. A run that goes on repeats the steps since its last checkpoint, and a process that
    was killed may not have handed on the last it logged: rows that W&B's files hold already are left out, and those
    that are only in metrics.jsonl are caught up with, so that all files of a run in order hold each row once.

    Args:
        settings: the section tracking.wandb.
        folder: the run folder, with metrics.jsonl up to where the run goes on.
        config: the resolved configuration, and what else is to be kept beside it.
    """

    def __init__(self, settings: Wandb, folder: Path, config: Mapping[str, Any]) -> None:
        id_file = folder / "wandb_id"
        known = id_file.read_text() if id_file.exists() else ""
        run_id = _run_id(known)
        if run_id != known:
            id_file.write_text(run_id)
        self._folder = folder
        self._failed = False
        self._known = logged_steps(folder, run_id)
        mode = _mode(settings)
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

    def log(self, row: Row) -> None:
        """Log one row, unless W&B has it: of a step where rounds meet there are two."""
        step = int(row["trainer/step"])
        if self._known[step]:
            self._known[step] -= 1
        else:
            self._try(lambda: self._run.log(dict(row)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Put a table into the summary: in the history it would be a row without a step."""

        def add() -> None:
            self._run.summary[name] = wandb.Table(columns=list(columns), data=[list(row) for row in rows])

        self._try(add)

    def preempt(self) -> None:
        """Say that the run was stopped and will go on."""
        self._try(self._run.mark_preempting)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Add the summary and close the run, as failed where there is none."""

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
            print(f"W&B was offline; to upload: wandb sync {self._folder}/wandb/offline-run-*-{self._run.id}")

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


def _run_id(known: str) -> str:
    """The id of the trial where a W&B agent started us, since wandb.init heeds no other; else `known`, or a new one."""
    trial = os.environ.get("WANDB_RUN_ID") if _in_sweep() else None
    return trial or known or secrets.token_hex(4)


def _mode(settings: Wandb) -> Any:
    if settings.mode != "auto":
        return settings.mode
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    return "online" if _in_sweep() or (_has_key() and _is_reachable()) else "offline"


def _in_sweep() -> bool:
    """Whether a W&B agent started us, which has logged in, by whatever means."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def _has_key() -> bool:
    """Whether `wandb login` or the environment left an API key; looking does not need the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(_server().hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _is_reachable() -> bool:
    """Whether W&B, or the proxy on the way to it, takes connections; compute nodes often have no network."""
    way = server = _server()
    proxy = getproxies().get(server.scheme)
    if proxy and not proxy_bypass(server.hostname or ""):
        way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = way.port or (80 if way.scheme == "http" else 443)
        socket.create_connection((way.hostname or "", port), SECONDS_TO_CONNECT).close()
    except (OSError, ValueError) as error:
        logger.warning(f"W&B cannot be reached at {way.hostname} ({error}); it is kept offline")
        return False
    return True


def _server() -> SplitResult:
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
