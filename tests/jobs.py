"""A small job, and what is read from its folder."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits.yaml"
SHORT = (
    "phases.dense.epochs=3",
    "phases.prune.epochs=3",
    "phases.finetune.epochs=1",
    "run.log_every=10",
    "tracking.wandb.mode=disabled",
)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text(encoding="utf-8").splitlines()]


def own_cache(folder):
    """A cache for processes of one test, with nothing in it but the script of reports, which takes a second to make."""
    from distprune.report.bundle import kept_at, vega

    vega()
    folder = Path(folder) / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / kept_at().name).symlink_to(kept_at())
    return str(folder)
