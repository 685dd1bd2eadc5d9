"""What rank 0 makes of the reports of a preflight: faults that end the start, doubts, and what is worth a line."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

LITTLE_SPACE = 1 << 30
CLOCKS_APART = 5.0

Report = dict[str, Any]
Reports = dict[int, Report]


@dataclass
class Verdict:
    """What rank 0 found in the reports of all ranks."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    """Of each rank."""


def judge_reports(reports: Reports, world_size: int) -> Verdict:
    """On hosts, devices, versions, configurations and the run folder.

    Args:
        reports: by rank, of those that came in time; rank 0's is there.
        world_size: how many there should be.
    """
    hosts = _by_host(reports)
    verdict = Verdict(hosts=[reports[rank]["host"] if rank in reports else "" for rank in range(world_size)])
    if missing := [rank for rank in range(world_size) if rank not in reports]:
        verdict.faults.append(f"no report from {_ranks(missing)}{_expected_hosts(missing)}")
    for rank, report in reports.items():
        if "error" in report:
            verdict.faults.append(f"{report['host']}: rank {rank}: {report['error']}")
    if verdict.faults:
        return verdict
    first = reports[0]
    for name, ranks in hosts.items():
        mine = [reports[rank] for rank in ranks]
        devices = " and ".join(f"{n} x {device}" for device, n in Counter(r["device"] for r in mine).items())
        free = min(report["free"] for report in mine)
        verdict.lines.append(f"{name}: {_ranks(ranks)}, {devices}, {free / 1e9:,.1f} GB free in the run folder")
        if free < LITTLE_SPACE:
            verdict.warnings.append(f"{name}: only {free / 1e6:,.0f} MB are free in the run folder")
        if not all(report["sees"] for report in mine):
            verdict.faults.append(
                f"run.dir: {name} does not see what {first['host']} wrote into {first['folder']}; it must be on a file "
                "system that all hosts share"
            )
        twice = [uuid for uuid, n in Counter(r["uuid"] for r in mine if "uuid" in r).items() if n > 1]
        if twice:
            verdict.faults.append(f"{name}: several ranks were given the same GPU ({twice[0]}); each needs its own")
        verdict.faults += [f"{name} has {what}, {first['host']} has {ours}" for what, ours in _differences(mine, first)]
    kinds = Counter(report["device"] for report in reports.values())
    without = [rank for rank, report in reports.items() if report["device"] == "cpu"]
    if 0 < len(without) < world_size:
        names = ", ".join(_by_host({rank: reports[rank] for rank in without}))
        others = ", ".join(kind for kind in kinds if kind != "cpu")
        verdict.faults.append(f"{names}: no GPU is seen by {_ranks(without)}, while others have {others}")
    elif len(kinds) > 1:
        verdict.warnings.append(f"devices differ, and the slowest sets the pace: {', '.join(kinds)}")
    verdict.lines.append(", ".join(f"{name} {version}" for name, version in first["versions"].items()))
    return verdict


def _differences(reports: list[Report], first: Report) -> list[tuple[str, str]]:
    """In what ranks are unlike the first one: what they have, and what that has."""
    found: dict[str, str] = {}
    for report in reports:
        for package in sorted({*report["versions"], *first["versions"]}):
            theirs, ours = report["versions"].get(package), first["versions"].get(package)
            if theirs != ours:
                found[f"{package} {theirs}"] = f"{ours}"
        if different := [key for key, section in first["config"].items() if report["config"][key] != section]:
            found[f"another configuration in {', '.join(different)}"] = "its own"
    return list(found.items())


def judge_links(reports: Reports, hosts: list[str]) -> Verdict:
    """On all-reduces and clocks.

    Args:
        reports: by rank, of those that came in time.
        hosts: of each rank.
    """
    verdict = Verdict(hosts=hosts)
    errors = {rank: report["error"] for rank, report in reports.items() if "error" in report}
    silent = [rank for rank in range(len(hosts)) if rank not in reports]
    stuck = reports if len(set(hosts)) == 1 else {r: reports[r] for r in errors if reports[r]["at"] == "host"}
    for name, ranks in _by_host({rank: stuck[rank] for rank in errors if rank in stuck}).items():
        verdict.faults.append(
            f"{name}: its ranks do not reach each other, as seen by {_ranks(ranks)}: {errors[ranks[0]]}"
        )
    if silent:
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in silent))
        verdict.faults.append(f"{_ranks(silent)} ({where}) ended or hung while links were tried")
    if errors and not verdict.faults:
        # Where one rank finds a fault the others wait for it in vain.
        rank, reason = min(errors.items(), key=lambda item: reports[item[0]]["waited"])
        verdict.faults.append(
            f"the hosts {', '.join(dict.fromkeys(hosts))} do not reach each other, as seen by rank {rank} on "
            f"{hosts[rank]}: {reason}; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface to take"
        )
    if verdict.faults:
        return verdict
    slowest = max(report["all_ms"] for report in reports.values())
    on_host = [report["host_ms"] for report in reports.values() if "host_ms" in report]
    inside = f"{max(on_host):.0f} ms within hosts, " if on_host else ""
    clocks = {name: reports[ranks[0]]["clock"] - reports[0]["clock"] for name, ranks in _by_host(reports).items()}
    apart = max(clocks.values()) - min(clocks.values())
    verdict.lines.append(f"first all-reduce: {inside}{slowest:.0f} ms over all; clocks {apart:.3f} s apart")
    verdict.warnings += [
        f"the clock of {name} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} that of {hosts[0]}"
        for name, off in clocks.items()
        if abs(off) > CLOCKS_APART
    ]
    return verdict


def _by_host(reports: Reports) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for rank in sorted(reports):
        hosts.setdefault(reports[rank]["host"], []).append(rank)
    return hosts


def _ranks(ranks: list[int]) -> str:
    """Such as `rank 3`, `ranks 0-7` or `ranks 0, 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _expected_hosts(ranks: list[int]) -> str:
    """The hosts on which the batch script has started these ranks, where one did."""
    names = os.environ.get("DISTPRUNE_HOSTS", "").split()
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    found = dict.fromkeys(names[rank // per_host] for rank in ranks if rank // per_host < len(names))
    return f" ({', '.join(found)})" if found else ""
