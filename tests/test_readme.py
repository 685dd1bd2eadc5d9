"""The Python of README and docs runs as it stands there, in one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distprune.config.schema import Data
from distprune.data import load_images

ROOT = Path(__file__).parents[1]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)


BLOCKS = blocks("README.md")


def test_readme_shows_a_plain_loop_and_an_accelerate_loop():
    assert len(BLOCKS) == 2
    assert "accelerator.backward" in BLOCKS[1]


@pytest.mark.parametrize("block", BLOCKS, ids=["plain", "accelerate"])
def test_a_loop_of_the_readme_prunes_to_90_percent(block, tmp_path):
    ended = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    zeros, weights = map(int, re.findall(r"\d+", ended.stdout))
    assert weights == 64 * 128 + 128 * 10
    assert zeros == round(0.9 * weights)


def test_the_python_of_the_page_on_pruning_runs(tmp_path):
    page = "\n".join(blocks("docs/pruning.md"))
    page += """
pruner = Pruner(model, optimizer, LinearSchedule(final=0.5, begin=0, end=0), score=small_and_early)
pruner.step()
print(pruner.zeros, pruner.layers()["1.weight"].sparsity < pruner.layers()["3.weight"].sparsity)
"""
    ended = subprocess.run([sys.executable, "-c", page], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(round(0.5 * (64 * 128 + 128 * 10))), "True"]


def test_the_loop_of_the_page_on_recovery_ends_within_its_bound(tmp_path):
    (page,) = blocks("docs/recovery.md")
    page += """
print(pruner.zeros == round(schedule.sparsity(10**9) * pruner.weights), bool(loss() < 2.1), len(schedule.attempts) >= 4)
"""
    ended = subprocess.run([sys.executable, "-c", page], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["True"] * 3


def test_the_python_of_the_page_on_channels_shrinks_a_model(tmp_path):
    (page,) = blocks("docs/channels.md")
    page += """
print(torch.equal(again(images), model(images)), pruner.is_final, abs(pruner.sparsity - 0.5) < 0.02)
"""
    ended = subprocess.run([sys.executable, "-c", page], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-3:] == ["True"] * 3


@pytest.mark.parametrize(("block", "weights"), [(0, 17408), (1, 9472)], ids=["transformers", "lightning"])
def test_the_python_of_the_page_on_integrations_prunes_to_90_percent(block, weights, tmp_path):
    code = blocks("docs/integrations.md")[block]
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"{round(0.9 * weights)} of {weights} weights are zero" in ended.stdout


def test_the_python_of_the_page_on_exports_packs_a_tensor(tmp_path):
    (code,) = blocks("docs/export.md")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert 0.1 < (tmp_path / "packed.safetensors").stat().st_size / (4 * 256 * 256) < 0.15


def test_the_python_of_the_page_on_data_writes_a_set(tmp_path):
    (code,) = blocks("docs/data.md")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    read = load_images(Data(source="tensors", path=str(tmp_path), mean=[0.5] * 3, std=[0.5] * 3), "train[:50%]")
    assert read.images.get([0, 31]).shape == (2, 3, 32, 32)
