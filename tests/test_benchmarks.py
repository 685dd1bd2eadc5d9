"""What is measured on a GPU runs on a CPU too, in tiny sizes, and leaves results as they are."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def gpu(*words, timeout=600):
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *words], capture_output=True, text=True, timeout=timeout, check=False
    )


def dry_run(*pieces, timeout=600):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    done = gpu("--dry-run", *pieces, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    return done.stdout


def test_pieces_run_on_a_cpu():
    said = dry_run("update", "two-four", "mnist-1")
    assert [line for line in said.splitlines() if line.startswith("==")] == ["== update", "== two-four", "== mnist-1"]
    assert "takes" in said or "times" in said
    assert "not measured" in said
    assert "mnist-1: " in said


def test_a_piece_or_option_that_there_is_not_is_refused():
    assert gpu("--fast").returncode == 2
    assert gpu().returncode == 2
    unknown = gpu("resnet21-80")
    assert unknown.returncode == 2
    assert "resnet20-80" in unknown.stderr
