"""LeNet-300-100 on MNIST at 98 %: what a teacher, the allocation and the schedule are worth, in
results/mnist_ablation.json and .md.

    python benchmarks/ablation.py data.source=parquet data.path=FOLDER

Every variant changes one thing. All begin from the same dense net, one for each seed (12 epochs, cosine from 0.1), and
train 30 epochs from there. Runs that --out holds are not done again, so the same command goes on where it was ended.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import RESULTS, figures, origin, run, settings, write

CONFIG = Path(__file__).parents[1] / "configs" / "mnist_lenet300.yaml"
DENSE = ("phases.dense={epochs: 12, lr: 0.1}", "phases.prune={}", "phases.finetune={}")
GRADUAL = ("phases.prune={epochs: 18, lr: 0.1, schedule: constant}", "phases.finetune={epochs: 12, lr: 0.1}")
VARIANTS: dict[str, tuple[str, ...]] = {
    "teacher, global, cubic": GRADUAL,
    "no teacher": (*GRADUAL, "distill=null"),
    "uniform": (*GRADUAL, "prune.allocation=uniform"),
    "ERK": (*GRADUAL, "prune.allocation=erk"),
    "LAMP": (*GRADUAL, "prune.allocation=lamp"),
    "one-shot": ("phases.prune={}", "phases.finetune={epochs: 30, lr: 0.1}", "prune.schedule=oneshot"),
    # Five rounds that repeat the last six of twelve epochs; the dense net is trained once more, to the same bits.
    "rounds, LR rewinding": (
        *DENSE,
        "prune.rounds={count: 5, recovery: rewind_lr, rewind_to: {epochs: 6}}",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="where the run folders lie")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    words = parser.parse_intermixed_args()
    seeds = range(words.seeds)

    def train(name: str, variant: tuple[str, ...], seed: int) -> dict[str, Any]:
        folder = words.out / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
        return run(CONFIG, folder, [f"run.seed={seed}", *variant, *words.overrides], threads=1)

    def prune(name: str, variant: tuple[str, ...], seed: int) -> dict[str, Any]:
        if "prune.rounds" not in "".join(variant):
            variant = ("phases.dense={}", f"model.weights={words.out}/dense-{seed}/model.safetensors", *variant)
        summary = train(name, variant, seed)
        print(f"{name}, seed {seed}: {summary['dense/top1']:.2f} -> {summary['eval/top1']:.2f} %", flush=True)
        return summary

    with ThreadPoolExecutor(words.parallel) as pool:
        dense = (*DENSE, "prune.sparsity=0", "distill=null")
        list(pool.map(lambda seed: train("dense", dense, seed), seeds))
        jobs = {name: [pool.submit(prune, name, v, seed) for seed in seeds] for name, v in VARIANTS.items()}
        runs = {name: [job.result() for job in of_name] for name, of_name in jobs.items()}
    first = next(iter(runs.values()))[0]
    result = {
        "config": CONFIG.name,
        "overrides": settings(words.overrides),
        "variants": {
            name: {"settings": list(VARIANTS[name]), "runs": [figures(summary) for summary in of_name]}
            for name, of_name in runs.items()
        },
        **origin(first),
    }
    path = write("mnist_ablation", result)
    table = _table(runs)
    (RESULTS / "mnist_ablation.md").write_text(
        f"# LeNet-300-100 on MNIST at 98 %\n\nMade by `python benchmarks/ablation.py` ({result['commit']}): "
        f"{words.seeds} seeds, top-1 accuracy in percent on the 10,000 test images.\n\n{table}",
        encoding="utf-8",
    )
    print(f"{path}\n\n{table}")


def _table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| variant | mean | lowest | highest | dense | seconds a run |", "|---|---|---|---|---|---|"]
    for name, of_name in runs.items():
        found = [summary["eval/top1"] for summary in of_name]
        dense, seconds = (statistics.mean(s[key] for s in of_name) for key in ("dense/top1", "wall_s"))
        cells = [f"{value:.2f}" for value in (statistics.mean(found), min(found), max(found), dense)]
        lines.append(f"| {' | '.join([name, *cells, f'{seconds:.0f}'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
