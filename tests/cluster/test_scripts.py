"""The batch scripts are what the template makes, and sound as shell scripts; `distprune slurm` makes them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from distprune.cli import main
from distprune.cluster.script import plain_scripts
from tests.jobs import ROOT

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sbatch")), *sorted(GOLDEN.glob("*.sbatch"))]
COMMANDS = {
    "gpus.sbatch": "configs/digits.yaml --nodes 1-4 --gpus-per-node 8 --time 12:00:00 --partition gpu --account lab",
    "cpus.sbatch": "configs/digits.yaml --processes-per-node 2 data.workers=1 --sbatch=--mem=8G run.dir=/scratch/a_b",
    "array.sbatch": "configs/digits.yaml --array configs/grid.yaml --at-once 2 --name sweep run.log_every=10",
    "container.sbatch": "configs/digits.yaml --gpus-per-node 1 --container /images/t.sqsh --mounts /data:/data,/runs",
}


@pytest.fixture
def answer(monkeypatch, capsys):
    """Call `distprune slurm` in the repository's root; its exit code, and what it printed."""
    monkeypatch.chdir(ROOT)

    def call(*words):
        code = main(["slurm", *words])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck"]], ids=" ".join)
def test_scripts_are_sound(script, checker):
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    done = subprocess.run([*checker, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "sweep.sbatch"])
def test_scripts_that_lie_ready_are_those_of_the_template(name):
    assert (ROOT / "slurm" / name).read_text(encoding="utf-8") == plain_scripts()[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_rendered_script_is_the_golden_one(name, answer):
    code, script, said = answer(*COMMANDS[name].split())
    assert code == 0, said
    assert "nothing submitted; --submit submits this script" in said
    assert script == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        (["--nodes=4-2"], ["--nodes: expected a number such as 2, or a range such as 1-4, got '4-2'"]),
        (["--time=tomorrow", "--at-once=2"], ["--time: expected", "--at-once: is for arrays"]),
        (["--launch=nowhere.yaml"], ["--launch: no file nowhere.yaml"]),
        (["--gpus-per-node=2", "--processes-per-node=2"], ["--processes-per-node: is for nodes without GPUs"]),
        (["--nodes=99"], ["train.batch_size: 64 samples cannot be shared by 99 ranks"]),
        (["prune.sparsity=2"], ["prune.sparsity: input should be less than 1"]),
        (["prune.exclude=[nothing]"], ["nothing"]),
        (["--array=configs/none.yaml"], ["cannot read the table configs/none.yaml", "did you mean"]),
    ],
)
def test_what_cannot_start_is_refused_before_it_waits(answer, words, faults):
    code, script, said = answer("configs/digits.yaml", *words)
    assert code == 2
    assert script == ""
    for fault in faults:
        assert fault in said


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("prune.sparsity: 0.9", "prune.sparsity: expected a list of values"),
        ("{}", "the table is empty"),
        ("[1, 2]", "a table is a mapping"),
        ("run.seed: [1, 1]", "several tasks are called run.seed=1"),
        ("prune.sparsity: [0.5, 3]", "task 1 of "),
        ("prune.sparsty: [0.5]", "unknown key; did you mean 'sparsity'?"),
    ],
)
def test_faults_of_a_table_are_told(answer, tmp_path, table, fault):
    path = tmp_path / "table.yaml"
    path.write_text(table)
    code, _, said = answer("configs/digits.yaml", f"--array={path}")
    assert code == 2
    assert fault in said


def test_without_a_slurm_nothing_is_submitted(answer, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, script, said = answer("configs/digits.yaml", "--submit")
    assert (code, script) == (1, "")
    assert "sbatch is not found" in said
