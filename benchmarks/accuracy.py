"""Run one configuration with several seeds and write what came of it to results/NAME.json.

    python benchmarks/accuracy.py configs/mnist_lenet300.yaml --seeds 3 data.source=parquet data.path=FOLDER

Accuracy is that of the last step on the evaluation set; nothing is chosen on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KEPT = (
    "dense/top1", "eval/top1", "eval/top1_drop", "prune/sparsity", "prune/zeros", "prune/weights", "seed", "wall_s",
    "world_size", "train_samples_per_s", "mask_digest",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    words = parser.parse_intermixed_args()
    runs = [run(words.config, seed, words.overrides) for seed in range(words.seeds)]
    accuracies = [summary["eval/top1"] for summary in runs]
    result = {
        "config": words.config.name,
        "overrides": [word for word in words.overrides if not word.startswith(("data.path", "model.weights"))],
        "eval/top1 mean": statistics.mean(accuracies),
        "eval/top1 range": [min(accuracies), max(accuracies)],
        "runs": [{key: summary[key] for key in KEPT} for summary in runs],
        "versions": runs[0]["versions"],
        "machine": {"cores": os.cpu_count(), "processor": processor(), "system": platform.platform()},
        "commit": commit(),
    }
    path = RESULTS / f"{words.config.stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{path}: {result['eval/top1 mean']:.2f} % (mean of {len(runs)}), {result['eval/top1 range']}")


def run(config: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run in a process and a folder of its own; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"run.dir={folder}/run", f"run.seed={seed}", "tracking.wandb.mode=disabled", *overrides]
        subprocess.run([sys.executable, "-m", "distprune.train", str(config), *words], check=True)
        summary: dict[str, Any] = json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))
    return summary


def processor() -> str:
    """The model name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


if __name__ == "__main__":
    main()
