"""The batch scripts are what the template makes, and sound as shell scripts; `distprune slurm` makes them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from distprune.cli import main
from distprune.cluster.grid import read_grid, task_words
from distprune.cluster.script import plain_scripts
from distprune.cluster.submit import _seconds
from distprune.config import dump_config, load_config
from distprune.training.run_folder import RunFolder
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
def answer(monkeypatch, capsys, tmp_path_factory):
    """Call `distprune slurm` in a folder like the repository's root, without its runs; its exit code and output."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("configs", "launch", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)

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
        (["--launch=configs/digits.yaml"], ["--launch: configs/digits.yaml is no configuration of accelerate"]),
        (["--processes-per-node=0"], ["--processes-per-node: expected 1 or more, got 0"]),
        (["--sbatch=mem=0"], ["--sbatch: 'mem=0' is no option"]),
        (["run.dir=README.md/x"], ["run.dir: cannot write to README.md/x"]),
        (["run.dir=README.md"], ["run.dir: cannot write to README.md"]),
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
        ("run.dir: [a, b]", "run.dir: each task has its own"),
        ("model: {a: 1}", "this is a configuration; the table comes before it"),
        ("run.seed: [1", "not valid YAML, line 1, column "),
        (f"data.path: [{'x' * 300}]", "too long for a folder"),
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


def test_a_table_of_sections_and_of_words_that_yaml_reads_otherwise(answer, tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text("prune.exclude: [['*.bias # x', first], [last]]\nrun.precision: [fp32, bf16]\n")
    assert read_grid(str(path))[0].words == ("prune.exclude=['*.bias # x', first]", "run.precision=fp32")
    words = task_words(read_grid(str(path))[0], str(path), "configs/digits.yaml", [])
    folder = "runs/digits/prune.exclude=['*.bias # x', first],run.precision=fp32"
    assert load_config("configs/digits.yaml", words).run.dir == folder
    words = task_words(read_grid(str(path))[3], str(path), "configs/digits.yaml", [])
    assert load_config("configs/digits.yaml", words).run.dir == "runs/digits/prune.exclude=[last],run.precision=bf16"


def test_tasks_that_are_done_are_not_submitted_again(answer, tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text("run.seed: [0, 1, 2, 3]\n")
    words = ["configs/digits.yaml", f"--array={path}", f"run.dir={tmp_path}/sweep"]
    for seed in (1, 3):
        folder = RunFolder(tmp_path / "sweep" / f"run.seed={seed}")
        folder.path.mkdir(parents=True)
        folder.write_text("config.yaml", dump_config(load_config("configs/digits.yaml", [f"run.seed={seed}"])))
        folder.write_status("done", 5, 5)
    code, script, said = answer(*words)
    assert code == 0, said
    assert "2 runs done already" in said
    assert "#SBATCH --array=0,2\n" in script
    code, script, said = answer(*words, "prune.sparsity=0.5")
    assert code == 2
    assert "task 1 of " in said
    assert "prune.sparsity: was 0.9 when the run in" in said


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-12", 216000), ("1-0:30", 88200), ("1-1:1:1", 90061)],
)
def test_times_are_read_as_slurm_does(time, seconds):
    assert _seconds(time) == seconds


def test_a_short_time_limit_is_warned_of(answer):
    code, script, said = answer("configs/digits.yaml", "--time=4")
    assert code == 0
    assert "--signal=B:USR1@60" in script
    assert "--time: 4 leaves little between start and checkpoint" in said
