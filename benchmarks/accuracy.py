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
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from common import WEIGHTS, StoppedEarly, figures, origin, run, settings, write
from jobs import JOBS, Job

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = 256
"""Images of a --tiny run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--list", action="store_true", help="print the names of all jobs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of data sets (default: data)")
    parser.add_argument("--models", type=Path, default=Path("weights"), help="of trained weights (default: weights)")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="of run folders")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on (default: as many as the job has)")
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
        parser.error("--set tries settings, so it takes --choose; what is kept of them belongs into jobs.py")
    if words.choose and (seen := [name for name in words.jobs if JOBS[name].weights is not None]):
        parser.error(f"--choose: the weights that {', '.join(seen)} begin with have seen all training images")
    bench = Bench(words)
    try:
        for name in words.jobs:
            runs = [bench.run(name, seed, words.set) for seed in range(words.seeds or JOBS[name].seeds)]
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
    rounds = [re.sub(r"rewind_to: \{.*?\}", "rewind_to: {steps: 2}", word) for word in overrides if "rewind_to" in word]
    return [*short, *rounds, "prune.every=2", "train.batch_size=32", "eval.batch_size=64"]


if __name__ == "__main__":
    sys.exit(main())
