"""`distprune slurm --array --submit` on a real Slurm: every task its own run."""

import pytest
import yaml

from tests.jobs import DIGITS, ROOT, SHORT, read_json

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
TABLE = {"prune.sparsity": [0.5, 0.75], "run.seed": [3, 4]}


def test_an_array_runs_each_combination(cluster, tmp_path):
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(TABLE))
    cluster.wait_until_idle()
    words = [str(DIGITS), *SHORT, "run.dir=sweep", "--array", "table.yaml", "--time", "20", "--submit"]
    said = cluster.call("distprune", "slurm", *words, cwd=tmp_path)
    assert said.startswith("job ")
    assert "4 runs checked and submitted" in said
    number = said.split()[1].rstrip(":")
    cluster.wait_until_gone(number)
    for sparsity in TABLE["prune.sparsity"]:
        for seed in TABLE["run.seed"]:
            folder = tmp_path / "sweep" / f"prune.sparsity={sparsity},run.seed={seed}"
            assert read_json(folder / "status.json")["state"] == "done"
            summary = read_json(folder / "summary.json")
            assert summary["prune/sparsity"] == pytest.approx(sparsity, abs=1e-4)
            assert summary["seed"] == seed
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert config["tracking"]["wandb"]["group"] == "digits-table"
            assert len(list((folder / "logs").glob("job-*.log"))) == 1
    assert len(list((tmp_path / "sweep").iterdir())) == 4
