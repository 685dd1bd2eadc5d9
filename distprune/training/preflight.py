"""Is every rank of a job fit to train, before a model is built? Hosts, devices, versions, run folder, links, clocks.

Ranks report through the launcher's key-value store, which works where links between GPUs do not. Rank 0 judges, and all
obey: either every rank goes on or every rank ends with the same message, which names hosts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from distprune.config import Config
from distprune.errors import reason
from distprune.tracking.logs import logger
from distprune.training.hosts import host
from distprune.training.judgement import Report, Reports, Verdict, judge_links, judge_reports
from distprune.training.results import versions
from distprune.training.run_folder import RunFolder

C10D: Any = dist  # torch's stores have no types
SECONDS_FOR_LINKS = 300.0
SECONDS_TO_SEE_A_FILE = 10.0
SECONDS_TO_HEAR_FROM_RANK_0 = 10.0


class PreflightError(RuntimeError):
    """The job cannot start where it is; names hosts and what is wrong with them."""


class Preflight:
    """The checks of one job, in two parts: `meet` before ranks are connected, `try_links` afterwards.

    Args:
        config: of the run.
        folder: its folder, which need not be there yet.

    Raises:
        PreflightError: this rank does not reach rank 0.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.lines: list[str] = []
        self._config = config
        self._folder = folder
        self._timeout = config.integrity.start_timeout
        self._store = self._reach_store() if self.world_size > 1 else C10D.HashStore()
        self._hosts: list[str] = []
        self._began = time.monotonic()

    def meet(self) -> None:
        """Let every rank report its host, device, versions and configuration, and whether it sees the run folder.

        Raises:
            PreflightError: on every rank alike.
        """
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # for `finally`
        token = None
        try:
            if self.rank == 0:
                token = self._make_token()
            mine: Report = {"host": host()}
            try:
                mine |= self._report()
            except Exception as error:
                mine["error"] = reason(error)
            judge = partial(judge_reports, world_size=self.world_size)
            self._hosts = self._agree("meet", mine, self._timeout, judge).hosts
        finally:
            signal.signal(signal.SIGTERM, before)
            if token is not None:
                token.unlink(missing_ok=True)

    def try_links(self, device: torch.device) -> None:
        """Sum a number over the ranks of each host, then over all, and compare clocks when that is done.

        Raises:
            PreflightError: on every rank alike.
        """
        if self.world_size == 1:
            return
        limit = min(self._timeout, SECONDS_FOR_LINKS)
        mine: Report = {"host": host()}
        neighbours = [rank for rank, name in enumerate(self._hosts) if name == host()]
        try:
            if 1 < len(neighbours) < self.world_size:
                mine["at"] = "host"
                mine["host_ms"] = _within(limit, lambda: _sum_on_host(neighbours, device, 2 * limit))
            mine["at"] = "all"
            mine["all_ms"] = _within(limit, lambda: _sum(device, dist.group.WORLD))
            mine["at"] = "done"
            mine["clock"] = time.time()
        except Exception as error:
            mine["error"] = reason(error)
            mine["waited"] = isinstance(error, TimeoutError)
        judge = partial(judge_links, hosts=self._hosts)
        self._agree("links", mine, 2 * limit + SECONDS_TO_HEAR_FROM_RANK_0, judge)
        self.lines.append(f"took {time.monotonic() - self._began:.1f} s")

    def log(self) -> None:
        """Write what was found to the log, once rank 0 has one."""
        for line in self.lines if self.rank == 0 else []:
            logger.info(f"preflight: {line}")

    def _reach_store(self) -> Any:
        try:
            store, _, _ = next(C10D.rendezvous("env://", timeout=timedelta(seconds=self._timeout)))
        except (RuntimeError, OSError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise PreflightError(
                f"rank {self.rank} on {host()} cannot reach rank 0 at {where}: {reason(error)}; hosts must resolve "
                "each other's names, and no firewall may stand between them"
            ) from None
        # A launcher that starts its ranks again has the same store.
        return C10D.PrefixStore(f"distprune/preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _make_token(self) -> Path | None:
        """A file where the run folder will be, which all ranks should see; None where it cannot be written."""
        token = self._folder.nearest / f".distprune-{secrets.token_hex(8)}"
        try:
            token.touch()
        except OSError:  # `RunFolder.claim` says it better
            self._store.set("token", "")
            return None
        self._store.set("token", str(token))
        return token

    def _report(self) -> Report:
        try:
            self._store.wait(["token"], timedelta(seconds=self._timeout))
        except RuntimeError:
            raise PreflightError(f"has not heard from rank 0 in {self._timeout:.0f} s") from None
        token = str(self._store.get("token").decode())
        seen = not token or _appears(Path(token))
        folder = Path(token).parent if token and seen else Path.cwd()
        return {
            "versions": versions(),
            "config": self._config.model_dump(),
            "folder": str(Path(token).parent),
            "sees": seen,
            "free": shutil.disk_usage(folder).free,
            **_device(self._config.run.device == "cpu"),
        }

    def _agree(self, stage: str, mine: Report, timeout: float, judge: Callable[[Reports], Verdict]) -> Verdict:
        """Report, and do what rank 0 makes of all reports."""
        self._store.set(f"{stage}/{self.rank}", json.dumps(mine))
        self._store.add(f"{stage}/count", 1)
        if self.rank == 0:
            verdict = judge(self._collect(stage, timeout))
            self._store.set(f"{stage}/verdict", json.dumps(asdict(verdict)))
            for warning in verdict.warnings:
                print(f"distprune: {warning}", file=sys.stderr)
        try:
            self._store.wait([f"{stage}/verdict"], timedelta(seconds=timeout + SECONDS_TO_HEAR_FROM_RANK_0))
        except RuntimeError:
            raise PreflightError(f"rank {self.rank} on {host()} has lost rank 0") from None
        verdict = Verdict(**json.loads(self._store.get(f"{stage}/verdict")))
        if verdict.faults:
            raise PreflightError("; ".join(verdict.faults))
        self.lines += [*verdict.lines, *verdict.warnings]
        return verdict

    def _collect(self, stage: str, timeout: float) -> Reports:
        """The reports of all ranks, or of those that came in time."""
        deadline, pause = time.monotonic() + timeout, 0.01
        while self._store.add(f"{stage}/count", 0) < self.world_size and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)
        names = {rank: f"{stage}/{rank}" for rank in range(self.world_size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in names.items() if self._store.check([key])}


def _device(cpu: bool) -> Report:
    if cpu or not torch.cuda.is_available():
        return {"device": "cpu"}
    index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(index)
    return {"device": properties.name, "uuid": str(properties.uuid)}


def _appears(path: Path) -> bool:
    """Whether a file is there; network file systems may show it late."""
    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _within(limit: float, work: Callable[[], float]) -> float:
    """What `work` returns; TimeoutError where it takes longer, since collectives may block for ever."""
    answers: list[float] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"not done after {limit:.0f} s")
    return answers[0]


def _sum(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Milliseconds that an all-reduce takes, connecting included."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    began = time.monotonic()
    number = torch.ones(1, device=device)
    dist.all_reduce(number, group=group)
    if float(number) != dist.get_world_size(group):
        raise ArithmeticError(f"an all-reduce gave {float(number):g} on {dist.get_world_size(group)} ranks")
    return 1000 * (time.monotonic() - began)


def _sum_on_host(ranks: list[int], device: torch.device, timeout: float) -> float:
    group = dist.new_group(ranks, timeout=timedelta(seconds=timeout), use_local_synchronization=True)
    took = _sum(device, cast(dist.ProcessGroup, group))
    dist.destroy_process_group(group)
    return took
