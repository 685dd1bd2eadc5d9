"""Ways to start a job."""

import os
import subprocess
import sys

import pytest

from tests.jobs import ROOT, own_cache
from tests.training.runs import Starter


@pytest.fixture
def environment(tmp_path):
    """Environment variables of a launched process: nothing outside tmp_path is written."""
    return {**os.environ, "DISTPRUNE_CACHE": own_cache(tmp_path), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}


@pytest.fixture
def launch(tmp_path, environment):
    """Start the main job as a user would, with `processes` ranks, and wait for it."""

    def start(processes, config, *overrides, timeout=600):
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        program += ["--config_file", str(ROOT / "launch" / "cpu.yaml"), "--num_processes", str(processes)]
        program += ["-m", "distprune.train", str(config), *overrides]
        return subprocess.run(
            program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return start


@pytest.fixture
def start(tmp_path, environment):
    """Start the job of `tests.training.runs` in tmp_path."""
    return Starter(tmp_path, environment)
