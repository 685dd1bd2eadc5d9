"""How long it takes from the command to the first step, beside a plain script; and `distprune --help`.

    python benchmarks/start.py [--rounds 7]

Both train ResNet-18 on the same images, on two processes by `accelerate launch`, in turns: `distprune.train` (which
checks hosts, folder, model and data first), and `benchmarks/plain.py`, which does no more than train.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import torch
import yaml
from common import commit, machine, write
from PIL import Image
from step import job

HERE = Path(__file__).parent
LAUNCH = ["accelerate", "launch", "--config_file", str(HERE.parent / "launch" / "cpu.yaml")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="starts of each (default: 7)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.worker:
        worker(words.worker)
        return
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parquet_files(folder / "images")
        config = job(folder, 100, taught=False)
        config["model"] = {"name": "torchvision:resnet18"}
        config["data"] |= {"source": "parquet", "path": str(folder / "images")}
        (folder / "job.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        for number in range(words.rounds + 1):
            shutil.rmtree(folder / "run", ignore_errors=True)
            started = [
                first_step([*LAUNCH, str(HERE / "start.py"), "--worker", str(folder / "job.yaml")]),
                first_step([*LAUNCH, str(HERE / "plain.py"), str(folder / "images")]),
            ]
            if number:  # the first reads programs from the disk, and decodes the images
                ours.append(started[0])
                theirs.append(started[1])
    low, ratio, high = statistics.quantiles([own / plain for own, plain in zip(ours, theirs, strict=True)], n=4)
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "ours_s": statistics.median(ours),
        "plain_s": statistics.median(theirs),
        "ratio": ratio,
        "low": low,
        "high": high,
        "help_s": statistics.median(answer() for _ in range(words.rounds)),
    }
    print(write("start", result))
    first = f"first step after {result['ours_s']:.2f} s, plain {result['plain_s']:.2f} s"
    print(f"{first}: {ratio:.3f} ({low:.3f}-{high:.3f})")
    print(f"distprune --help {result['help_s']:.3f} s")


def parquet_files(folder: Path) -> None:
    """Write a data set of CIFAR-10's shapes."""
    generator = np.random.default_rng(0)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(label) for label in range(10)])
    )
    folder.mkdir()
    for split, count in (("train", 2560), ("test", 250)):
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": [i % 10 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def first_step(command: list[str]) -> float:
    """Seconds from the command to the end of the first step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("first step ")]
    if not said:
        sys.exit(f"{' '.join(command)} has failed:\n{done.stdout}{done.stderr}")
    return float(said[0].split()[-1]) - began


def answer() -> float:
    began = time.perf_counter()
    subprocess.run(["distprune", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def worker(config: str) -> None:
    """The main job up to its first step."""
    from distprune.train import main as train
    from distprune.training.stopping import Stopper

    def after_step(_: Stopper) -> str:
        if int(os.environ["RANK"]) == 0:
            print(f"first step {time.time()}", flush=True)
        os._exit(0)

    with patch.object(Stopper, "after_step", after_step):
        sys.exit(train([config]))


if __name__ == "__main__":
    main()
