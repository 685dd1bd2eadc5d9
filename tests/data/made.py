"""Small image sets made of random pixels, and where the libraries may write while they are read."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from distprune.config.schema import Data


def random_images(count, shape=(8, 8), seed=0):
    """`count` uint8 images of random pixels, H x W (grey) or H x W x 3."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


def write_parquet(folder, split, images, labels, label_feature=None):
    """Write one split; images are arrays, or bytes of a file that need not be an image."""
    folder.mkdir(parents=True, exist_ok=True)
    feature = label_feature or datasets.ClassLabel(names=[str(label) for label in range(max(labels) + 1)])
    features = datasets.Features(image=datasets.Image(), label=feature)
    cells = [{"bytes": image, "path": None} if isinstance(image, bytes) else Image.fromarray(image) for image in images]
    table = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    datasets.disable_progress_bars()
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_folder(folder, split, images, names):
    """Write PNG files, one folder a name, in the order of `images`."""
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        place = folder / split / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:04d}.png")
    return folder


def parquet(folder, **more):
    """The section `data` for a folder of `write_parquet`."""
    return Data(**{"source": "parquet", "path": str(folder), "mean": [0.5], "std": [0.5], **more})


def keep_writes_in(folder, monkeypatch):
    """Let Hugging Face and distprune cache under `folder` and nowhere else."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(folder) / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path(folder) / "datasets"))
    monkeypatch.setenv("DISTPRUNE_CACHE", str(Path(folder) / "decoded"))
