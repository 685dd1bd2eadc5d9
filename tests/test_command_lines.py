"""The command lines of README and docs run as they stand there, in a folder like the repository's whose configurations
are short ones and whose CIFAR-10 is sixty pictures of random pixels."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from distprune.cli import main
from distprune.models import build_model
from tests.data.made import random_images, write_parquet
from tests.jobs import ROOT, own_cache

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
COMMANDS = ("accelerate", "distprune", "export", "pip", "pytest", "python", "sbatch", "srun", "tail", "wandb", ".")
ELSEWHERE = {
    "pip install -e '.[dev]' && pytest -n 2 --dist loadfile": "is what runs this",
    "pip install -e '.[transformers]'": "is part of the extra dev",
    "pip install 'distprune[wandb]'": "is part of the extra dev",
    "distprune slurm configs/digits.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00 --submit":
        "tests/cluster/test_scripts.py",
    "distprune slurm configs/cifar10_resnet20.yaml run.dir=/shared/runs/r20 --nodes 2 --gpus-per-node 8 "
    "--time 12:00:00 --submit": "tests/cluster/test_scripts.py",
    "distprune slurm configs/digits.yaml --array configs/grid.yaml --at-once 4 --submit": "tests/cluster/test_array.py",
    "sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 slurm/train.sbatch "
    "configs/imagenet_resnet50.yaml run.dir=/shared/runs/r50": "tests/cluster/test_train.py",
    "sbatch --array=0-5 slurm/sweep.sbatch configs/grid.yaml configs/digits.yaml": "tests/cluster/test_array.py",
    ". /shared/envs/distprune/bin/activate": "needs a cluster",
    "export DISTPRUNE_CACHE=/shared/cache/distprune HF_HOME=/shared/cache/huggingface": "needs a cluster",
    "distprune prepare configs/cifar10_resnet20.yaml": "tests/cluster/test_prepare.py",
    "tail -f /shared/runs/r20/logs/job-*.log": "needs a cluster",
    "wandb login && wandb sync /shared/runs/r20/wandb/offline-run-*": "needs a W&B server",
    "wandb sweep configs/sweep.yaml": "needs a W&B server",
    "srun --gpus-per-node=1 wandb agent --forward-signals SWEEP_ID": "needs a W&B server",
    "wandb sync runs/digits/wandb/offline-run-*": "needs a W&B server",
    "distprune dashboard --entity TEAM --project distprune": "needs a W&B server",
    "wandb leet runs/digits/wandb": "needs a terminal",
    "wandb leet runs/digits/wandb/latest-run": "needs a terminal",
    "accelerate launch --config_file launch/multi_gpu.yaml -m distprune.cli sensitivity configs/cifar10_resnet20.yaml":
        "needs GPUs",
    "accelerate launch -m distprune.train configs/bert_sst2.yaml": "tests/training/test_texts.py",
    "accelerate launch -m distprune.train configs/llama.yaml": "tests/training/test_texts.py",
}  # fmt: skip
"""Lines that no workspace of a test can run as they are, and why not, or which test runs their like."""
DIGITS_98 = "distprune train configs/digits.yaml prune.sparsity=0.98 run.dir=runs/digits-98"
INSTALL = "python -m venv .venv && . .venv/bin/activate && pip install -e . && "
SHORT = {"prune": {"epochs": 2, "lr": 0.05, "schedule": "constant"}, "finetune": {"epochs": 1, "lr": 0.05}}


def command_lines(page):
    """Those of its blocks that are no Python, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = [re.sub(r"\s{2,}# .*", "", line) for block in blocks for line in block.splitlines()]
    return [line.removeprefix(INSTALL) for line in lines if line.split(" ")[0] in COMMANDS]


LINES = [(page, line) for page in PAGES for line in command_lines(page) if line not in ELSEWHERE]


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Run a line in the workspace, most of `distprune` in this process, others in a shell. Runs of which other pages
    speak come first."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("launch", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").mkdir()
    for name in ("digits", "cifar10_resnet20"):
        config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        config["phases"] = config["phases"] | SHORT
        config["prune"] |= {"every": 2}
        if name != "digits":
            config["data"] |= {"source": "parquet", "path": "images", "image_column": "image", "label_column": "label"}
            config["eval"] = {"every": 2}
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for split, count in (("train", 256), ("test", 20)):
        write_parquet(folder / "images", split, random_images(count, (32, 32, 3)), [i % 10 for i in range(count)])
    (folder / "weights").mkdir()
    state = build_model("resnet20", {}, 10).state_dict()
    torch.save({"state_dict": state}, folder / "weights" / "resnet20-12fca82f.th")
    changed = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "DISTPRUNE_CACHE": own_cache(folder),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }

    def call(line):
        words = shlex.split(line)
        if words[0] != "distprune" or words[1] == "train":  # W&B leaves traces in the environment of a process
            done = subprocess.run(
                line, shell=True, cwd=folder, env={**os.environ, **changed}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for name, value in changed.items():
                patch.setenv(name, value)
            assert main(words[1:]) == 0

    first = (*command_lines("README.md")[:3], DIGITS_98, *command_lines("docs/sensitivity.md")[:2])
    for line in first:
        if line not in ELSEWHERE:
            call(line)
    return lambda line: None if line in first else call(line)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_line_runs_as_it_stands(call, page, line):
    call(line)


def test_what_is_left_to_other_tests_is_in_docs_and_those_tests_are_there():
    assert not ELSEWHERE.keys() - {line for page in PAGES for line in command_lines(page)}
    for why in ELSEWHERE.values():
        assert not why.startswith("tests/") or (ROOT / why).exists()
