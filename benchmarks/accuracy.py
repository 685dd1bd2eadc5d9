"""Run one configuration with several seeds and write what came of it to results/NAME.json.

    python benchmarks/accuracy.py configs/mnist_lenet300.yaml --seeds 3 data.source=parquet data.path=FOLDER
    python benchmarks/accuracy.py configs/cifar10_guard.yaml --done RUN_DIR

Accuracy is that of the last step on the evaluation split; nothing is chosen on it, but by a guard that judges by it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from common import figures, origin, run, settings, summary_of, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--done", type=Path, nargs="+", metavar="RUN_DIR", help="gather runs that are done instead")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    words = parser.parse_intermixed_args()
    if words.done:
        runs = [summary_of(folder) for folder in words.done]
    else:
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                run(words.config, Path(folder, str(seed)), [f"run.seed={seed}", *words.overrides])
                for seed in range(words.seeds)
            ]
    accuracies = [summary["eval/top1"] for summary in runs]
    result = {
        "config": words.config.name,
        "overrides": settings(words.overrides),
        "eval/top1 mean": statistics.mean(accuracies),
        "eval/top1 range": [min(accuracies), max(accuracies)],
        "runs": [figures(summary) for summary in runs],
        **origin(runs[0]),
    }
    path = write(words.config.stem, result)
    print(f"{path}: {result['eval/top1 mean']:.2f} % (mean of {len(runs)}), {result['eval/top1 range']}")


if __name__ == "__main__":
    main()
