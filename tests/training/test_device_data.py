"""Small sets that lie on the device, and sets that are tensors: the same runs to the bit, with fewer packages."""

import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from distprune.config.schema import Data
from distprune.data import load_images
from distprune.train import main
from tests.blocked import block
from tests.jobs import DIGITS, SHORT
from tests.training.runs import whole

JOB = (
    *SHORT,
    "model.args={width: 8}",
    "data.train_transforms=[{RandomCrop: {size: 8, padding: 1}}, {RandomHorizontalFlip: {p: 0.3}}]",
    "data.eval_transforms=[{Pad: {padding: 1}}, {CenterCrop: {size: 8}}]",
    "data.eval_split=test[:100]",
    "eval.corruptions=[contrast]",
)
ALONE = block(("datasets", "sklearn", "wandb")) + "from distprune.train import main\nsys.exit(main(sys.argv[1:]))"


@pytest.fixture
def in_memory(tmp_path, monkeypatch):
    """What a run from memory comes to, with a worker that loads."""
    monkeypatch.chdir(tmp_path)
    return run(tmp_path / "memory", "data.workers=1")


def run(folder, *overrides):
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(DIGITS), *JOB, f"run.dir={folder}", *overrides]) == 0
    return whole(folder)


def test_images_on_the_device_give_the_same_run_to_the_bit(tmp_path, in_memory):
    assert run(tmp_path / "device", "data.storage=device") == in_memory


def test_tensors_give_the_same_run_to_the_bit_without_datasets_and_wandb(tmp_path, in_memory):
    for split in ("train", "test"):
        digits = load_images(Data(source="digits", mean=[0.3], std=[0.4]), split)
        images = digits.images.get(list(range(len(digits))))
        save_file({"images": images, "labels": digits.labels.to(torch.uint8)}, tmp_path / f"{split}.safetensors")
    words = [
        "tracking.wandb.mode=auto",
        "data.source=tensors",
        f"data.path={tmp_path}",
        "data.storage=device",
        f"run.dir={tmp_path / 'tensors'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(DIGITS), *JOB, *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert whole(tmp_path / "tensors") == in_memory
