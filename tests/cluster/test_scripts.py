"""The batch scripts are sound as shell scripts."""

import shutil
import subprocess

import pytest

from tests.jobs import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck"]], ids=" ".join)
def test_scripts_are_sound(script, checker):
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    done = subprocess.run([*checker, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
