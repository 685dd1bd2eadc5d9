"""Where this process runs: its host, and the Slurm job it is part of."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

JOB_VARIABLES = {
    "job_id": "SLURM_JOB_ID",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "job_name": "SLURM_JOB_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT",
    "nodes": "SLURM_JOB_NODELIST",
    "restarts": "SLURM_RESTART_COUNT",
}


def host() -> str:
    """The name of this host: Slurm's for the node where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def slurm_job() -> dict[str, str]:
    """What Slurm says of the job this process is part of; empty outside of one."""
    return {name: os.environ[variable] for name, variable in JOB_VARIABLES.items() if os.environ.get(variable)}


def processor() -> str:
    """The model name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
