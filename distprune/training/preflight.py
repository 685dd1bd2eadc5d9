"""Is every rank of a job fit to train, before a model is built? Hosts, devices, versions, run folder, links, clocks.

Ranks report through the launcher's key-value store, which works where links between GPUs do not. Rank 0 judges, and all
obey: either every rank goes on or every rank ends with the same message, which names hosts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from distprune.config import Config
from distprune.tracking.logs import logger
from distprune.training.hosts import existing, host
from distprune.training.results import versions

C10D: Any = dist  # torch's stores have no types
SECONDS_FOR_LINKS = 300.0
SECONDS_TO_SEE_A_FILE = 10.0
SECONDS_TO_HEAR_FROM_RANK_0 = 10.0
LITTLE_SPACE = 1 << 30
CLOCKS_APART = 5.0

Report = dict[str, Any]
Reports = dict[int, Report]


class PreflightError(RuntimeError):
    """The job cannot start where it is; names hosts and what is wrong with them."""


@dataclass
class Verdict:
    """What rank 0 found in the reports of all ranks."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


class Preflight:
    """The checks of one job, in two parts: `meet` before ranks are connected, `try_links` afterwards.

    Args:
        config: of the run, whose folder need not be there yet.
        run_dir: that folder.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self._config = config
        self._run_dir = run_dir
        self._timeout = config.integrity.start_timeout
        self._store = self._reach_store() if self.world_size > 1 else C10D.HashStore()
        self._began = time.monotonic()

    def meet(self) -> None:
        """Let every rank report its host, device, versions and configuration, and whether it sees the run folder.

        Raises:
            PreflightError: on every rank alike.
        """
        token = self._announce_token()
        try:
            place = existing(self._run_dir)
            mine = {
                "host": host(),
                "pid": os.getpid(),
                "versions": versions(),
                "config": self._config.model_dump(),
                "free": shutil.disk_usage(place).free,
                "sees": not token or _appears(Path(token)),
                "token": token,
                **_device(self._config.run.device == "cpu"),
            }
            self._agree("meet", mine, self._timeout, partial(_judge_reports, world_size=self.world_size))
        finally:
            if self.rank == 0 and token:
                Path(token).unlink(missing_ok=True)

    def try_links(self, device: torch.device) -> None:
        """Sum a number over the ranks of each host, then over all, and compare clocks when that is done.

        Raises:
            PreflightError: on every rank alike.
        """
        if self.world_size == 1:
            return
        limit = min(self._timeout, SECONDS_FOR_LINKS)
        hosts = {rank: json.loads(self._store.get(f"meet/{rank}"))["host"] for rank in range(self.world_size)}
        mine: Report = {"host": host()}
        neighbours = [rank for rank, name in hosts.items() if name == host()]
        try:
            if 1 < len(neighbours) < self.world_size:
                mine["at"] = "host"
                group = dist.new_group(neighbours, timeout=timedelta(seconds=limit), use_local_synchronization=True)
                mine["host_ms"] = _sum(device, cast(dist.ProcessGroup, group), limit)
                dist.destroy_process_group(group)
            mine["at"] = "all"
            mine["all_ms"] = _sum(device, dist.group.WORLD, limit)
            mine["clock"] = time.time()
            mine["at"] = "done"
        except Exception as error:
            mine["error"] = (str(error).strip() or type(error).__name__).splitlines()[0]
            mine["waited"] = isinstance(error, TimeoutError)
        judge = partial(_judge_links, hosts=hosts)
        self._agree("links", mine, 2 * limit + SECONDS_TO_HEAR_FROM_RANK_0, judge)
        self.lines.append(f"took {time.monotonic() - self._began:.1f} s")

    def log(self) -> None:
        """Write what was found to the log, once rank 0 has one."""
        if self.rank == 0:
            for line in self.lines:
                logger.info(f"preflight: {line}")
            for warning in self.warnings:
                logger.warning(warning)

    def _reach_store(self) -> Any:
        try:
            store, _, _ = next(C10D.rendezvous("env://", timeout=timedelta(seconds=self._timeout)))
        except (RuntimeError, OSError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise PreflightError(
                f"rank {self.rank} on {host()} cannot reach rank 0 at {where}: {str(error).splitlines()[0]}; hosts "
                "must resolve each other's names, and no firewall may stand between them"
            ) from None
        return C10D.PrefixStore("distprune/preflight", store)

    def _announce_token(self) -> str:
        """The path of a file that rank 0 has made where the run folder will be; empty where it could not."""
        if self.rank == 0:
            path = existing(self._run_dir) / f".distprune-{secrets.token_hex(8)}"
            try:
                path.touch()
            except OSError:  # `RunFolder.claim` says it better
                path = Path()
            self._store.set("token", str(path) if path.name else "")
        try:
            self._store.wait(["token"], timedelta(seconds=self._timeout))
        except RuntimeError:
            raise PreflightError(
                f"rank {self.rank} on {host()} has not heard from rank 0 in {self._timeout:.0f} s"
            ) from None
        return str(self._store.get("token").decode())

    def _agree(self, stage: str, mine: Report, timeout: float, judge: Callable[[Reports], Verdict]) -> None:
        """Report, and do what rank 0 makes of all reports."""
        self._store.set(f"{stage}/{self.rank}", json.dumps(mine))
        self._store.add(f"{stage}/count", 1)
        if self.rank == 0:
            reports = self._collect(stage, timeout)
            verdict = judge(reports)
            self._store.set(f"{stage}/verdict", json.dumps(asdict(verdict)))
        try:
            wait = timedelta(seconds=timeout + SECONDS_TO_HEAR_FROM_RANK_0)
            self._store.wait([f"{stage}/verdict"], wait)
        except RuntimeError:
            raise PreflightError(f"rank {self.rank} on {host()} has lost rank 0") from None
        verdict = Verdict(**json.loads(self._store.get(f"{stage}/verdict")))
        if verdict.faults:
            raise PreflightError("; ".join(verdict.faults))
        self.lines += verdict.lines
        self.warnings += verdict.warnings

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
        return {"device": "cpu", "threads": torch.get_num_threads()}
    index = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(index)
    return {"device": properties.name, "memory": properties.total_memory, "uuid": str(properties.uuid)}


def _appears(path: Path) -> bool:
    """Whether a file is there; network file systems may show it late."""
    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _sum(device: torch.device, group: dist.ProcessGroup | None, limit: float) -> float:
    """Milliseconds that an all-reduce takes, connecting included."""
    began = time.monotonic()
    number = torch.ones(1, device=device)
    work = dist.all_reduce(number, group=group, async_op=True)
    assert work is not None
    while not work.is_completed():
        if time.monotonic() - began > limit:
            raise TimeoutError(f"not done after {limit:.0f} s")
        time.sleep(0.001)
    work.wait()
    if float(number) != dist.get_world_size(group):
        raise ArithmeticError(f"gave {float(number):g} on {dist.get_world_size(group)} ranks")
    return 1000 * (time.monotonic() - began)


def _judge_reports(reports: Reports, world_size: int) -> Verdict:
    verdict, hosts = Verdict(), _by_host(reports)
    for name, ranks in hosts.items():
        mine = [reports[rank] for rank in ranks]
        kinds = _counts(report["device"] for report in mine)
        devices = " and ".join(f"{n} x {device}" for device, n in kinds.items())
        free = min(report["free"] for report in mine)
        verdict.lines.append(f"{name}: {_ranks(ranks)}, {devices}, {free / 1e9:,.1f} GB free in the run folder")
        if free < LITTLE_SPACE:
            verdict.warnings.append(f"{name}: only {free / 1e6:,.0f} MB are free in the run folder")
        if not all(report["sees"] for report in mine):
            verdict.faults.append(
                f"run.dir: {name} does not see what {reports[0]['host']} wrote into "
                f"{Path(reports[0]['token']).parent}; it must be on a file system that all hosts share"
            )
        twice = [uuid for uuid, n in _counts(r["uuid"] for r in mine if "uuid" in r).items() if n > 1]
        if twice:
            verdict.faults.append(f"{name}: several ranks were given the same GPU ({twice[0]}); one each, please")
        sections = reports[0]["config"]
        if different := [key for key, section in sections.items() if mine[0]["config"][key] != section]:
            verdict.faults.append(
                f"{name} has another configuration than {reports[0]['host']}: look at {', '.join(different)}"
            )
        for package in sorted({key for report in mine for key in report["versions"]}):
            theirs, ours = mine[0]["versions"].get(package), reports[0]["versions"].get(package)
            if theirs != ours:
                verdict.faults.append(f"{name} has {package} {theirs}, {reports[0]['host']} has {ours}")
    if missing := [rank for rank in range(world_size) if rank not in reports]:
        verdict.faults.append(f"no report from {_ranks(missing)} ({_expected_hosts(missing, hosts)})")
    kinds = _counts(report["device"] for report in reports.values())
    if len(kinds) > 1:
        verdict.warnings.append(f"devices differ, and the slowest sets the pace: {', '.join(kinds)}")
    verdict.lines.append(", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items()))
    return verdict


def _judge_links(reports: Reports, hosts: dict[int, str]) -> Verdict:
    verdict = Verdict()
    errors = {rank: report["error"] for rank, report in reports.items() if "error" in report}
    silent = [rank for rank in hosts if rank not in reports]
    within = _by_host({rank: reports[rank] for rank in errors if reports[rank]["at"] == "host"})
    for name, ranks in within.items():
        verdict.faults.append(f"{name}: its {_ranks(ranks)} cannot reach each other: {errors[ranks[0]]}")
    if silent:
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in silent))
        verdict.faults.append(f"{_ranks(silent)} ({where}) ended or hung while links were tried")
    if errors and not verdict.faults:
        # Where one rank finds a fault the others wait for it in vain.
        rank, reason = min(errors.items(), key=lambda item: reports[item[0]]["waited"])
        names = ", ".join(_by_host(reports))
        verdict.faults.append(
            f"the hosts {names} do not reach each other, as seen by rank {rank} on {reports[rank]['host']}: {reason}"
            "; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface to take"
        )
    if verdict.faults:
        return verdict
    slowest = max(report["all_ms"] for report in reports.values())
    nodes = [report["host_ms"] for report in reports.values() if "host_ms" in report]
    inside = f"{max(nodes):.0f} ms within hosts, " if nodes else ""
    clocks = {name: reports[ranks[0]]["clock"] - reports[0]["clock"] for name, ranks in _by_host(reports).items()}
    apart = max(clocks.values()) - min(clocks.values())
    verdict.lines.append(f"first all-reduce: {inside}{slowest:.0f} ms over all; clocks {apart:.3f} s apart")
    verdict.warnings += [
        f"the clock of {name} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} that of {reports[0]['host']}"
        for name, off in clocks.items()
        if abs(off) > CLOCKS_APART
    ]
    return verdict


def _by_host(reports: Reports) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for rank in sorted(reports):
        hosts.setdefault(reports[rank]["host"], []).append(rank)
    return hosts


def _counts(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _ranks(ranks: list[int]) -> str:
    """Such as `rank 3`, `ranks 0-7` or `ranks 0, 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _expected_hosts(ranks: list[int], known: dict[str, list[int]]) -> str:
    """The hosts on which the batch script has started these ranks."""
    names = os.environ.get("DISTPRUNE_HOSTS", "").split()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    found = dict.fromkeys(names[rank // per_host] for rank in ranks if rank // per_host < len(names))
    return ", ".join(found) or f"on other hosts than {', '.join(known)}"
