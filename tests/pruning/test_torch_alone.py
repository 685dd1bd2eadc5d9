"""The core needs torch and nothing else: its tests pass where nothing else can be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.blocked import block

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FORBIDDEN = (
    "accelerate",
    "datasets",
    "lightning",
    "pandas",
    "pyarrow",
    "pydantic",
    "pytorch_lightning",
    "rich",
    "safetensors",
    "sklearn",
    "timm",
    "torchvision",
    "tqdm",
    "transformers",
    "wandb",
    "yaml",
)


def run_blocked(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", block(FORBIDDEN) + code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", ["yaml", "wandb.sdk", "torchvision.transforms"])
def test_the_block_blocks(name):
    done = run_blocked(f"import {name}")
    assert done.returncode != 0
    assert "ModuleNotFoundError: No module named" in done.stderr


def test_core_imports_no_module_but_torch_and_what_torch_brings():
    code = """
import torch
import torch.distributed.tensor
before = {name.partition(".")[0] for name in sys.modules}
import distprune.pruning
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - sys.stdlib_module_names))
"""
    done = run_blocked(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["distprune"]


def test_tests_of_the_core_pass_with_torch_alone():
    arguments = [
        str(HERE),
        f"--ignore={__file__}",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not bytes_per_weight",  # slow, and no import makes a difference to it
    ]
    done = run_blocked(f"import pytest; sys.exit(pytest.main({arguments!r}))", HYPOTHESIS_PROFILE="few")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
