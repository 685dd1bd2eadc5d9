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
from distprune.cluster.script import render
from distprune.errors import ConfigError

NODES = re.compile(r"[1-9]\d*(-[1-9]\d*)?")
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
    script = _render(asked, plans[0])
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    if not asked.submit:
        print(script, end="")
        print(f"{_tasks(len(plans))} checked, nothing submitted; --submit submits this script", file=sys.stderr)
        return
    number = _submit(script)
    print(f"job {number}: {_tasks(len(plans))} checked and submitted")
    for plan in plans:
        print(f"  {plan.config.run.dir}/logs/job-*.log")


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
    if not Path(asked.launch).is_file():
        faults.append(f"--launch: no file {asked.launch}; submit from the repository's root, or name another")
    if asked.mounts is not None and asked.container is None:
        faults.append("--mounts: mounts are those of a container; name one with --container")
    if asked.at_once is not None and asked.array is None:
        faults.append("--at-once: is for arrays; give a table with --array")
    if faults:
        raise ConfigError(*faults)


def _check_tasks(asked: Namespace) -> list[Plan]:
    """A plan of every task, on as many ranks as the job may have."""
    numbers = range(len(read_grid(asked.array))) if asked.array is not None else [None]
    plans, faults = [], []
    for number in numbers:
        try:
            words = asked.overrides
            if number is not None:
                words = task_words(asked.array, number, asked.config, words)
            plans.append(make_plan(asked.config, words, _most_nodes(asked) * _per_node(asked), asked.gpus_per_node > 0))
        except ConfigError as error:
            where = f"task {number} of {asked.array}: " if number is not None else ""
            faults += [f"{where}{fault}" for fault in error.faults]
    if faults:
        raise ConfigError(*faults, source=asked.config)
    return plans


def _render(asked: Namespace, plan: Plan) -> str:
    config, per_node = plan.config, _per_node(asked)
    name = asked.name or Path(asked.config).stem
    cpus = asked.cpus_per_task or per_node * (config.data.workers + 1)
    options = [f"--job-name={name}", f"--nodes={asked.nodes}", f"--time={asked.time}", f"--cpus-per-task={cpus}"]
    if asked.gpus_per_node:
        options.append(f"--gpus-per-node={asked.gpus_per_node}")
    options += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(asked, key)) is not None]
    if asked.array is not None:
        limit = f"%{asked.at_once}" if asked.at_once is not None else ""
        options.append(f"--array=0-{len(read_grid(asked.array)) - 1}{limit}")
    settings = {"LAUNCH": asked.launch}
    if asked.processes_per_node is not None:
        settings["PROCESSES_PER_NODE"] = str(asked.processes_per_node)
    if asked.container is not None:
        settings["CONTAINER_IMAGE"] = asked.container
    if asked.mounts is not None:
        settings["CONTAINER_MOUNTS"] = asked.mounts
    table = [asked.array] if asked.array is not None else []
    words = [*table, asked.config, *asked.overrides]
    about = f"Made by: {shlex.join(['distprune', 'slurm', *asked.typed])}\nWhat follows what is in docs/slurm.md."
    return render(about, [*options, *asked.sbatch], settings, words, array=asked.array is not None)


def _submit(script: str) -> str:
    if shutil.which("sbatch") is None:
        raise SubmitError("sbatch is not found; run this on a login node of the cluster")
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SubmitError(f"sbatch: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _most_nodes(asked: Namespace) -> int:
    return int(asked.nodes.rpartition("-")[2])


def _per_node(asked: Namespace) -> int:
    return int(asked.gpus_per_node or asked.processes_per_node or 1)


def _tasks(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
