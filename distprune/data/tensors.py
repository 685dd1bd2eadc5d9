"""Image sets that are tensors already: a folder of SPLIT.safetensors, which takes neither a decoder nor `datasets`.

Each file holds `images`, uint8 of N x C x H x W or, grey, N x H x W, and `labels`, N whole numbers from 0 on; its
metadata may hold `classes`, their names, one a line.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distprune.config.schema import Data
from distprune.errors import ConfigError, reason

_SPLIT = re.compile(r"(?P<name>[\w-]+)(?:\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?")


def read_split(config: Data, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Images (uint8, N x C x H x W, in a mapped file where that is whole), labels (int64, N), and names of classes.

    Args:
        config: its path is the folder.
        split: name of a file without its ending, or of a part of it by samples or percent: train[:45000], train[90%:].

    Raises:
        ConfigError: there is no such file or part, or it holds something else; the message says what.
    """
    assert config.path is not None
    matched = _SPLIT.fullmatch(split)
    folder = Path(config.path).expanduser()
    if matched is None:
        raise ConfigError(f"data: {split!r} is no split; write a name, or a part of it: train[:45000], train[90%:]")
    path = folder / f"{matched['name']}.safetensors"
    if not path.is_file():
        there = sorted(file.stem for file in folder.glob("*.safetensors"))
        has = f"has {', '.join(there)}" if there else "holds no .safetensors file"
        raise ConfigError(f"data: there is no {path}; the folder {has}")
    try:
        with safe_open(path, "pt") as file:
            if missing := {"images", "labels"} - set(file.keys()):
                raise ConfigError(f"data: {path} has no tensor {' or '.join(sorted(missing))}")
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
            names = (file.metadata() or {}).get("classes")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"data: {path} cannot be read: {reason(error)}") from error
    images = images[:, None] if images.dim() == 3 else images
    _check(path, images, labels, len(config.mean))
    labels = labels.long()
    classes = names.splitlines() if names else [str(label) for label in range(int(labels.max()) + 1)]
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise ConfigError(f"data: labels of {path} are not all from 0 to {len(classes) - 1}")
    begin, end = (_place(matched[name], len(labels), default) for name, default in (("begin", 0), ("end", len(labels))))
    if begin >= end:
        raise ConfigError(f"data: split {split!r} of {config.path} is empty; {path.name} has {len(labels)} samples")
    return images[begin:end], labels[begin:end], classes


def _check(path: Path, images: Tensor, labels: Tensor, channels: int) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
        raise ConfigError(
            f"data: images of {path} are {images.dtype} {tuple(images.shape)}, not uint8 of N x C x H x W or N x H x W"
        )
    if labels.dtype.is_floating_point or labels.shape != (len(images),):
        raise ConfigError(
            f"data: labels of {path} are {labels.dtype} {tuple(labels.shape)}, not whole numbers of ({len(images)},)"
        )
    if images.shape[1] != channels:
        raise ConfigError(
            f"data.mean: has {channels} values, but images of {path} have {images.shape[1]} channels; give as many"
        )


def _place(word: str | None, samples: int, default: int) -> int:
    """Where a slice begins or ends."""
    if word is None:
        return default
    place = round(samples * int(word[:-1]) / 100) if word.endswith("%") else int(word)
    return min(max(place + samples if place < 0 else place, 0), samples)
