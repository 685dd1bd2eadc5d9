"""Data sets as tensors, for machines without `datasets` and a network (docs/data.md).

    python benchmarks/tensors.py --data FOLDER --out FOLDER          # mnist and cifar10 from parquet files
    python benchmarks/tensors.py --random --out FOLDER               # a few random images of the same shapes, and
                                                                     # random weights, to try things out on

--out then holds mnist/ and cifar10/ with train.safetensors and test.safetensors each; with --random also weights/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import WEIGHTS
from safetensors.torch import save_file
from torch import Tensor

from distprune.config.schema import Data
from distprune.data import load_images
from distprune.models import build_model

SETS = {"mnist": ("image", 1, 28), "cifar10": ("img", 3, 32)}
RANDOM = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of parquet files (default: data)")
    parser.add_argument("--out", type=Path, required=True, help="folder of tensors")
    parser.add_argument("--random", action="store_true", help="random images and weights")
    words = parser.parse_args()
    for name, (column, channels, side) in SETS.items():
        (words.out / name).mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            path = words.out / name / f"{split}.safetensors"
            if words.random:
                images, labels = drawn(channels, side)
            else:
                images, labels = read(words.data / name, column, channels, split)
            save_file({"images": images, "labels": labels}, path)
            print(f"{path}: {len(labels):,} images, {path.stat().st_size / 1e6:.1f} MB")
    if words.random:
        (words.out / "weights").mkdir(exist_ok=True)
        for file, model in WEIGHTS.items():
            torch.save(build_model(model, {}, 10).state_dict(), words.out / "weights" / file)


def drawn(channels: int, side: int) -> tuple[Tensor, Tensor]:
    images = torch.randint(256, (RANDOM, channels, side, side), dtype=torch.uint8)
    return images, torch.arange(RANDOM, dtype=torch.uint8) % 10


def read(folder: Path, column: str, channels: int, split: str) -> tuple[Tensor, Tensor]:
    flat = [0.5] * channels
    found = load_images(Data(source="parquet", path=str(folder), image_column=column, mean=flat, std=flat), split)
    images = found.images.get(list(range(len(found))))
    assert isinstance(images, Tensor)
    return images.contiguous(), found.labels.to(torch.uint8)


if __name__ == "__main__":
    main()
