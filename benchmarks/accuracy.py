"""How accurate pruned models get: jobs with several seeds, each into results/accuracy-NAME.json.

    python benchmarks/accuracy.py --list
    python benchmarks/accuracy.py mnist-10 mnist-5 --data FOLDER --models FOLDER [--out runs/accuracy] [--seeds 3]

--data holds `mnist` and `cifar10`, each as parquet files or as tensors (`tensors.py`); on a GPU tensors are held there.
--models holds trained weights. Accuracy is that of the last step on the test images; nothing is chosen on them, but by
the job `guard`, which judges by them. Settings are chosen with --choose, which trains on nine tenths of the training
images and counts on the rest, and writes no result. Runs that --out holds are not done again, and one that was stopped
goes on; with --minutes all stop in time, with exit code 75.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import WEIGHTS, StoppedEarly, figures, origin, run, settings, write

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = 256
"""Images of a --tiny run."""


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes:
        config: below configs.
        data: below --data.
        overrides: of the configuration.
        weights: below --models, to begin with.
        teacher: another job, whose first model teaches; or trained weights below --models, of one of WEIGHTS.
        begins_with: another job, whose model of the same seed this begins with.
        published: the best that is published: percent, and whose.
        asked: percent that ours should reach.
    """

    config: str
    data: str
    overrides: tuple[str, ...] = ()
    weights: str | None = None
    teacher: str | None = None
    begins_with: str | None = None
    published: tuple[float, str] | None = None
    asked: float | None = None


def mnist(kept: int, published: tuple[float, str], asked: float) -> Job:
    """LeNet-300-100 of which so many percent are kept."""
    # Chosen on the last tenth of the training images.
    lr, method = (0.1, "train.clip_norm=1.0") if kept >= 5 else (0.05, "distill.temperature=2.0")
    overrides = (
        f"prune.sparsity={1 - kept / 100:g}", method,
        f"phases.prune={{epochs: 36, lr: {lr}, schedule: constant, warmup_steps: 400}}",
        f"phases.finetune={{epochs: 24, lr: {lr}}}",
    )  # fmt: skip
    return Job("mnist_lenet300.yaml", "mnist", overrides, None, "mnist-teacher", None, published, asked)


RESNET20, RESNET56 = WEIGHTS


def cifar10(
    weights: str, sparsity: float, epochs: int, published: tuple[float, str], asked: float, batch: int = 256
) -> Job:
    """A trained ResNet, taught by ResNet-56."""
    lr = 0.1 * batch / 256
    overrides = (
        f"model.name={WEIGHTS[weights]}", f"prune.sparsity={sparsity:g}", "prune.every=50", "run.precision=bf16",
        f"train.batch_size={batch}",
        f"phases.prune={{epochs: {epochs // 3}, lr: {lr:g}, schedule: constant, warmup_steps: 200}}",
        f"phases.finetune={{epochs: {epochs - epochs // 3}, lr: {lr:g}}}",
    )  # fmt: skip
    return Job("cifar10_resnet20.yaml", "cifar10", overrides, weights, RESNET56, None, published, asked)


SPARSE_MOMENTUM = "Sparse Momentum, Dettmers and Zettlemoyer 2019"
RENDA = "LR rewinding, Renda et al. 2020"
AT_80 = (91.75, f"{RENDA}, at 79.0 %")
AT_90 = (90.91, "weight rewinding, Renda et al. 2020, at 89.3 %")
GRADUAL = "progressive magnitude, arXiv:2606.12278"
UNPRUNED = ("prune.sparsity=0", "phases.prune={}", "phases.finetune={}", "distill=null")
JOBS = {
    "mnist-teacher": Job(
        "mnist_lenet300.yaml", "mnist",
        (
            "model.name=mnist_cnn", "model.args={width: 8}", "phases.dense={epochs: 24, lr: 0.05}",
            "data.train_transforms=[{RandomCrop: {size: 28, padding: 2}}]", *UNPRUNED,
        ),
    ),
    "mnist-10": mnist(10, (98.67, SPARSE_MOMENTUM), 98.95),
    "mnist-5": mnist(5, (98.53, SPARSE_MOMENTUM), 98.90),
    "mnist-2": mnist(2, (98.35, GRADUAL), 98.60),
    "mnist-1": mnist(1, (97.64, SPARSE_MOMENTUM), 98.20),
    "mnist-self": Job("mnist_lenet300.yaml", "mnist", published=(98.35, GRADUAL)),
    "resnet20-80": cifar10(RESNET20, 0.8, 120, AT_80, 91.9),
    "resnet20-90": cifar10(RESNET20, 0.9, 120, AT_90, 91.0),
    # What two CPU cores do in an hour and a quarter.
    "resnet20-80-short": cifar10(RESNET20, 0.8, 42, AT_80, 91.9, batch=128),
    "resnet20-90-short": cifar10(RESNET20, 0.9, 42, AT_90, 91.0, batch=128),
    "resnet56-956": cifar10(RESNET56, 0.956, 60, (92.57, RENDA), 92.8),
    "resnet56-channels": Job(
        "cifar10_channels.yaml", "cifar10",
        ("prune.sparsity=0.53", "prune.channels.penalty=5.0e-4", "phases.dense={epochs: 40, lr: 0.05}"),
        RESNET56, None, None, (93.77, "DepGraph, Fang et al. 2023, at 2.13 times fewer"), 93.8,
    ),
    "channels-short": Job(
        "cifar10_channels.yaml", "cifar10",
        (
            "phases.prune={steps: 200, lr: 0.02, schedule: constant, warmup_steps: 10}",
            "phases.finetune={steps: 200, lr: 0.02}", "prune.every=20", "prune.channels.shrink_every=2",
        ),
        RESNET56,
    ),
    "guard": Job("cifar10_guard.yaml", "cifar10", (), RESNET20),
    "resnet18-dense": Job("cifar10_resnet18.yaml", "cifar10", UNPRUNED),
    "resnet18-90": Job(
        "cifar10_resnet18.yaml", "cifar10", ("prune.sparsity=0.9", "phases.dense={}"), None, None, "resnet18-dense",
        (95.06, GRADUAL), 95.3,
    ),
    "resnet18-95": Job(
        "cifar10_resnet18.yaml", "cifar10", ("prune.sparsity=0.95", "phases.dense={}"), None, None, "resnet18-dense",
        (93.86, GRADUAL), 94.8,
    ),
    "fast-90": Job(
        "cifar10_resnet18.yaml", "cifar10",
        (
            "phases.dense={epochs: 5, lr: 0.4, schedule: constant, warmup_steps: 200}",
            "phases.prune={epochs: 9, lr: 0.4, schedule: constant}", "phases.finetune={epochs: 14, lr: 0.4}",
            "train.batch_size=512", "distill=null", "prune.every=20", "tracking.histograms=null",
        ),
        asked=94.0,
    ),
}  # fmt: skip
SEEDS = {"guard": 1, "channels-short": 1, "mnist-teacher": 1, "resnet20-80-short": 1, "resnet20-90-short": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--list", action="store_true", help="print the names of all jobs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of data sets (default: data)")
    parser.add_argument("--models", type=Path, default=Path("weights"), help="of trained weights (default: weights)")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="of run folders")
    parser.add_argument("--seeds", type=int, help=f"how many, from 0 on (default: 3, but 1 of {', '.join(SEEDS)})")
    parser.add_argument("--threads", type=int, help="of each run")
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--choose", action="store_true", help="count on a tenth of the training images")
    parser.add_argument("--tiny", action="store_true", help="four steps a phase on few images; writes no result")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="only with --choose")
    words = parser.parse_args()
    if words.list:
        print("\n".join(JOBS))
        return 0
    if unknown := [name for name in words.jobs if name not in JOBS] or (not words.jobs and ["none"]):
        parser.error(f"no job {', '.join(unknown)}; there are {', '.join(JOBS)}")
    if words.set and not words.choose:
        parser.error("--set tries settings, so it takes --choose; what is kept of them belongs into JOBS")
    if words.choose and (seen := [name for name in words.jobs if JOBS[name].weights is not None]):
        parser.error(f"--choose: the weights that {', '.join(seen)} begin with have seen all training images")
    bench = Bench(words)
    try:
        for name in words.jobs:
            runs = [bench.run(name, seed, words.set) for seed in range(words.seeds or SEEDS.get(name, 3))]
            accuracies = [summary["eval/top1"] for summary in runs]
            told = f"{name}: {statistics.mean(accuracies):.2f} % (mean of {len(runs)}), {accuracies}"
            print(told if words.choose or words.tiny else f"{told}, {write(f'accuracy-{name}', result(name, runs))}")
    except StoppedEarly as stopped:
        print(f"{stopped}; the same command goes on")
        return 75
    return 0


def result(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a job."""
    job = JOBS[name]
    accuracies = [summary["eval/top1"] for summary in runs]
    return {
        "config": job.config,
        "overrides": settings(job.overrides),
        "teacher": job.teacher,
        "begins_with": job.begins_with or job.weights,
        "eval/top1 mean": statistics.mean(accuracies),
        "eval/top1 range": [min(accuracies), max(accuracies)],
        "runs": [figures(summary) for summary in runs],
        **origin(runs[0]),
    }


class Bench:
    """Runs jobs where their data and models are."""

    def __init__(self, words: argparse.Namespace) -> None:
        self.words = words
        self._ends = None if words.minutes is None else time.monotonic() + 60 * words.minutes

    def run(self, name: str, seed: int, tried: Sequence[str] = ()) -> dict[str, Any]:
        """A run of a job with settings that are tried, behind those that it needs; its summary.

        Raises:
            StoppedEarly: the time is over.
        """
        job, words = JOBS[name], self.words
        overrides = [*job.overrides, *self._data(job), f"run.seed={seed}"]
        if job.weights is not None:
            overrides.append(f"model.weights={words.models / job.weights}")
        if job.begins_with is not None:
            overrides.append(f"model.weights={self._trained(job.begins_with, seed)}")
        if job.teacher in WEIGHTS:
            teacher = f"name: {WEIGHTS[job.teacher]}, weights: {words.models / job.teacher}"
            overrides.append(f"distill.teacher={{{teacher}}}")
        elif job.teacher is not None:
            teacher = f"{named(JOBS[job.teacher])}weights: {self._trained(job.teacher, 0)}"
            overrides.append(f"distill.teacher={{{teacher}}}")
        if words.tiny:
            overrides += tiny(CONFIGS / job.config, overrides)
        minutes = None if self._ends is None else (self._ends - time.monotonic()) / 60
        if minutes is not None and minutes < 0.1:
            raise StoppedEarly(f"no time is left for {name}, seed {seed}")
        return run(CONFIGS / job.config, self._folder(name, seed, tried), [*overrides, *tried], words.threads, minutes)

    def _trained(self, name: str, seed: int) -> Path:
        """The model of a job, which is run first."""
        self.run(name, seed)
        return self._folder(name, seed) / "model.safetensors"

    def _folder(self, name: str, seed: int, tried: Sequence[str] = ()) -> Path:
        behind = "".join(f"_{word}" for word in tried).replace("/", "-").replace(" ", "")
        return Path(self.words.out, f"{name}-{seed}{'-choose' if self.words.choose else ''}{behind}")

    def _data(self, job: Job) -> list[str]:
        folder = self.words.data / job.data
        overrides = [f"data.path={folder}"]
        if (folder / "train.safetensors").exists():
            overrides += ["data.source=tensors", "data.workers=0"]
            if torch.cuda.is_available():
                overrides += ["data.storage=device", "run.precision=bf16"]
        else:
            overrides.append("data.source=parquet")
        if self.words.choose:
            overrides += ["data.train_split='train[:90%]'", "data.eval_split='train[90%:]'"]
        elif self.words.tiny:
            overrides += [f"data.train_split='train[:{TINY}]'", f"data.eval_split='test[:{TINY}]'"]
        return overrides


def named(teacher: Job) -> str:
    """What a job's model is called, as entries of a teacher; nothing where it is the configuration's own."""
    entries = [word.removeprefix("model.") for word in teacher.overrides if word.startswith("model.")]
    return "".join(f"{key}: {value}, " for key, _, value in (entry.partition("=") for entry in entries))


def tiny(config: Path, overrides: Sequence[str]) -> list[str]:
    """Four steps for each phase that a configuration, with its overrides, has."""
    phases = dict(yaml.safe_load(config.read_text(encoding="utf-8"))["phases"])
    for word in overrides:
        key, _, value = word.partition("=")
        if key.startswith("phases."):
            phases[key.removeprefix("phases.")] = yaml.safe_load(value)
    short = [f"phases.{name}={{steps: 4, lr: 0.01}}" for name, phase in phases.items() if phase]
    return [*short, "prune.every=2", "train.batch_size=32", "eval.batch_size=64"]


if __name__ == "__main__":
    sys.exit(main())
