"""`distprune slurm`: a batch script for one configuration, checked before anything waits in a queue."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from distprune.analysis.plan import Plan, make_plan
from distprune.cluster.grid import read_grid, task_words
from distprune.cluster.script import WARNING_SECONDS, render
from distprune.config.load import read_mapping
from distprune.errors import ConfigError, MissingError
from distprune.training.run_folder import RunFolder

NODES = re.compile(r"[1-9]\d*(-[1-9]\d*)?")
SHORTEST_SECONDS = 600
LAUNCH, SITE = "launch/multi_node.yaml", Path("slurm/site.env")
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")


class SubmitError(RuntimeError):
    """Slurm did not take the job."""


def slurm(asked: Namespace) -> None:
    """Check, render, and print the script or submit it.

    Args:
        asked: the command's words, see `distprune slurm --help`.

    Raises:
        ConfigError: what would stop a job before its first step, or cannot be asked for.
        SubmitError: Slurm did not take it.
    """
    _check_request(asked)
    plans = _check_tasks(asked)
    folders = [RunFolder(plan.config.run.dir or "") for plan in plans]
    left = [number for number, folder in enumerate(folders) if not folder.is_done()]
    for warning in dict.fromkeys(warning for plan in plans for warning in (*plan.warnings, *_time_doubts(asked))):
        print(f"warning: {warning}", file=sys.stderr)
    if len(left) < len(plans):
        print(f"{_runs(len(plans) - len(left))} done already", file=sys.stderr)
    if not left:
        return
    script = _render(asked, plans[0], left)
    if not asked.submit:
        print(script, end="")
        print(f"{_runs(len(left))} checked, nothing submitted; --submit submits this script", file=sys.stderr)
        return
    job = _submit(script)
    print(f"job {job}: {_runs(len(left))} checked and submitted; what goes wrong at once is in slurm-{job}*.log")
    for number in left:
        print(f"  tail -F {folders[number].path}/logs/job-{job}{f'_{number}' if asked.array is not None else ''}.log")


def _check_request(asked: Namespace) -> None:
    faults = []
    if not NODES.fullmatch(asked.nodes) or _most_nodes(asked) < int(asked.nodes.split("-")[0]):
        faults.append(f"--nodes: expected a number such as 2, or a range such as 1-4, got {asked.nodes!r}")
    if not TIME.fullmatch(asked.time):
        faults.append(f"--time: expected minutes, 12:00:00 or 2-12:00:00, got {asked.time!r}")
    if asked.gpus_per_node < 0:
        faults.append(f"--gpus-per-node: expected 0 or more, got {asked.gpus_per_node}")
    if asked.gpus_per_node > 0 and asked.processes_per_node is not None:
        faults.append("--processes-per-node: is for nodes without GPUs; on others there is one process per GPU")
    launch = Path(asked.launch or LAUNCH)
    if launch.is_file():
        if "compute_environment" not in read_mapping(launch, "the launch file", "accelerate's are mappings")[0]:
            faults.append(f"--launch: {launch} is no configuration of accelerate; those in launch/ are")
    elif asked.launch is not None or not SITE.exists():
        faults.append(f"--launch: no file {launch}; submit from the repository's root, or name another")
    words = [option for option in asked.sbatch if not option.startswith("-")]
    faults += [f"--sbatch: {word!r} is no option; write --sbatch=--mem=8G" for word in words]
    for key in ("processes_per_node", "cpus_per_task", "at_once"):
        if (value := getattr(asked, key)) is not None and value < 1:
            faults.append(f"--{key.replace('_', '-')}: expected 1 or more, got {value}")
    if asked.mounts is not None and asked.container is None:
        faults.append("--mounts: mounts are those of a container; name one with --container")
    if asked.at_once is not None and asked.array is None:
        faults.append("--at-once: is for arrays; give a table with --array")
    if faults:
        raise ConfigError(*faults)


def _check_tasks(asked: Namespace) -> list[Plan]:
    """A plan of every task, on as many ranks as the job may have."""
    tasks = read_grid(asked.array) if asked.array is not None else [None]
    plans, faults, kinds = [], [], set()
    for number, task in enumerate(tasks):
        try:
            words = asked.overrides
            if task is not None:
                words = task_words(task, asked.array, asked.config, words)
            plans.append(make_plan(asked.config, words, _most_nodes(asked) * _per_node(asked), elsewhere=True))
        except ConfigError as error:
            where = f"task {number} of {asked.array}: " if task is not None else ""
            faults += [f"{where}{fault}" for fault in error.faults]
            kinds.add(type(error))
    if faults:
        raise (MissingError if kinds == {MissingError} else ConfigError)(*faults, source=asked.config)
    return plans


def _render(asked: Namespace, plan: Plan, left: list[int]) -> str:
    config, per_node = plan.config, _per_node(asked)
    name = asked.name or Path(asked.config).stem
    cpus = asked.cpus_per_task or per_node * (config.data.workers + 1)
    options = [f"--job-name={name}", f"--nodes={asked.nodes}", f"--time={asked.time}", f"--cpus-per-task={cpus}"]
    if asked.gpus_per_node:
        options.append(f"--gpus-per-node={asked.gpus_per_node}")
    options += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(asked, key)) is not None]
    if asked.array is not None:
        limit = f"%{asked.at_once}" if asked.at_once is not None else ""
        options.append(f"--array={_ranges(left)}{limit}")
    settings = {}
    if asked.launch is not None:
        settings["LAUNCH"] = asked.launch
    if asked.processes_per_node is not None:
        settings["PROCESSES_PER_NODE"] = str(asked.processes_per_node)
    if asked.container is not None:
        settings["CONTAINER_IMAGE"] = asked.container
    if asked.mounts is not None:
        settings["CONTAINER_MOUNTS"] = asked.mounts
    table = [asked.array] if asked.array is not None else []
    words = [*table, asked.config, *asked.overrides]
    about = f"Made by: {shlex.join(['distprune', 'slurm', *asked.typed])}\nWhat follows what is in docs/slurm.md."
    warning = min(WARNING_SECONDS, _seconds(asked.time) // 4)
    return render(about, [*options, *asked.sbatch], settings, words, asked.array is not None, warning)


def _submit(script: str) -> str:
    if shutil.which("sbatch") is None:
        raise SubmitError("sbatch is not found; run this on a login node of the cluster")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SubmitError(f"sbatch: {done.stderr.strip().removeprefix('sbatch: error: ')}")
    return done.stdout.strip().partition(";")[0]


def _most_nodes(asked: Namespace) -> int:
    return int(asked.nodes.rpartition("-")[2])


def _per_node(asked: Namespace) -> int:
    return int(asked.gpus_per_node or asked.processes_per_node or 1)


def _time_doubts(asked: Namespace) -> list[str]:
    if _seconds(asked.time) >= SHORTEST_SECONDS:
        return []
    return [f"--time: {asked.time} leaves little between start and checkpoint; the job may be requeued many times"]


def _seconds(time: str) -> int:
    """Of a time as Slurm writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _ranges(numbers: list[int]) -> str:
    """Numbers as sbatch takes them: 0-2,5."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ",".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
