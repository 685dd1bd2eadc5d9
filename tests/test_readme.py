"""The README's Python runs as it stands there, in one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.M | re.S)


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
