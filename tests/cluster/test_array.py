"""`distprune slurm --array --submit` on a real Slurm: every task its own run."""

import itertools

import pytest
import yaml

from tests.jobs import DIGITS, ROOT, SHORT, read_json
from tests.training.runs import reached

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
TABLE = {"prune.sparsity": [0.5, 0.75], "run.seed": [3, 4]}


def test_an_array_runs_each_combination(cluster, tmp_path):
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(TABLE))
    cluster.wait_until_idle()
    words = [str(DIGITS), *SHORT, "phases.dense.epochs=60", "run.dir=sweep"]
    words += ["--array", "table.yaml", "--time", "20", "--submit"]
    said = cluster.call("distprune", "slurm", *words, cwd=tmp_path)
    assert said.startswith("job ")
    assert "4 runs checked and submitted" in said
    number = said.split()[1].rstrip(":")

    # The job number of the last task is that of the whole array; it is requeued alone all the same.
    last = tmp_path / "sweep" / "prune.sparsity=0.75,run.seed=4"
    cluster.wait_for(reached(last, 100))
    assert cluster.job(f"{number}_3")["JobId"] == number
    cluster.call("scancel", "--batch", "--signal=USR1", f"{number}_3")
    cluster.wait_for(lambda: cluster.job(f"{number}_3")["Restarts"] == "1")
    assert read_json(last / "status.json")["state"] == "preempted"
    cluster.wait(f"{number}_3", lambda: read_json(last / "status.json")["state"] == "done")
    cluster.wait_until_gone(number)
    for task, (sparsity, seed) in enumerate(itertools.product(*TABLE.values())):
        folder = tmp_path / "sweep" / f"prune.sparsity={sparsity},run.seed={seed}"
        assert cluster.job(f"{number}_{task}")["Restarts"] == ("1" if task == 3 else "0")
        assert read_json(folder / "status.json")["state"] == "done"
        summary = read_json(folder / "summary.json")
        assert summary["prune/sparsity"] == pytest.approx(sparsity, abs=1e-4)
        assert summary["seed"] == seed
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["tracking"]["wandb"]["group"] == "digits-table"
        assert [path.name for path in (folder / "logs").glob("job-*.log")] == [f"job-{number}_{task}.log"]
    assert len(list((tmp_path / "sweep").iterdir())) == 4
