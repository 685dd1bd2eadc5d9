"""Decoded images: once into shared uint8 memory where they fit, else one by one as they are asked for."""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from distprune.cache import cache_folder
from distprune.config.schema import Data
from distprune.errors import ConfigError

if TYPE_CHECKING:
    import datasets

MEMORY_LIMIT = 4 << 30
DECODE_BATCH = 1000

Pixels = npt.NDArray[np.uint8]


class Store(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def get(self, indices: list[int]) -> Tensor | list[Tensor]:
        """Images as uint8 tensors, C x H x W each, or stacked."""
        ...


class MemoryStore:
    """All images decoded, uint8, N x C x H x W; a file mapped into memory is shared by all workers and ranks.

    They may lie on any device; so do those that are asked for.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def get(self, indices: list[int]) -> Tensor:
        return take(self.images, indices)


def take(values: Tensor, indices: list[int]) -> Tensor:
    """Copies of some rows, on the device of all; a GPU is not waited for."""
    rows = torch.tensor(indices)
    return values[rows.pin_memory().to(values.device, non_blocking=True) if values.is_cuda else rows]


class StreamStore:
    """Images decoded when asked for, in the loader's workers."""

    def __init__(self, table: datasets.Dataset, column: str, mode: str) -> None:
        self._encoded = _encoded(table, column)
        self._column = column
        self._mode = mode

    def __len__(self) -> int:
        return len(self._encoded)

    def get(self, indices: list[int]) -> list[Tensor]:
        images = zip(self._encoded[indices][self._column], indices, strict=True)
        return [torch.from_numpy(_decode(image, index, self._mode)) for image, index in images]


class UnequalSizeError(Exception):
    """Images are of different sizes and cannot share one array."""


def open_store(table: datasets.Dataset, config: Data) -> Store:
    """The images of `table`, in memory or streamed as `data.storage` says.

    Raises:
        ConfigError: data.storage is memory or device, but sizes differ; or the column holds no images.
    """
    import datasets

    column, mode = config.image_column, "L" if len(config.mean) == 1 else "RGB"
    if not isinstance(table.features[column], datasets.Image):
        raise ConfigError(f"data.image_column: {column!r} holds {table.features[column]}, not images")
    stream = StreamStore(table, column, mode)
    if config.storage == "stream":
        return stream
    first = stream.get([0])[0]
    if config.storage == "auto" and first.numel() * len(table) > MEMORY_LIMIT:
        return stream
    shape = (len(table), *first.shape)
    try:
        if not table.cache_files:
            return MemoryStore(torch.from_numpy(_decode_all(table, column, mode, np.empty(shape, np.uint8))))
        return MemoryStore(torch.from_numpy(_decode_to_file(table, column, mode, shape, _cache_folder(config))))
    except UnequalSizeError as error:
        if config.storage != "auto":
            what = f"data.storage: {config.storage} needs images of one size"
            raise ConfigError(f"{what}, but {error}; use stream") from None
        return stream


def _cache_folder(config: Data) -> Path:
    return cache_folder() if config.cache_dir is None else Path(config.cache_dir).expanduser()


def _decode_to_file(
    table: datasets.Dataset, column: str, mode: str, shape: tuple[int, ...], folder: Path
) -> npt.NDArray[np.uint8]:
    """Map the decoded images, decoding them first where no earlier run has. One process decodes, others wait."""
    name = hashlib.blake2b(f"{table._fingerprint} {column} {mode} {shape}".encode(), digest_size=12).hexdigest()
    path, mixed = folder / f"{name}.npy", folder / f"{name}.mixed"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if mixed.exists():
            raise UnequalSizeError(mixed.read_text())
        if not path.exists():
            partial = path.with_suffix(".partial")
            try:
                pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                _decode_all(table, column, mode, pixels).flush()
                partial.rename(path)
            except UnequalSizeError as error:
                mixed.write_text(str(error))
                raise
            finally:
                partial.unlink(missing_ok=True)
    # "c" maps pages that all processes share; torch wants an array it might write to.
    return np.lib.format.open_memmap(path, mode="c")


def _decode_all(table: datasets.Dataset, column: str, mode: str, pixels: Any) -> Any:
    """Decode every image into `pixels` (N x C x H x W) and return it."""
    encoded = _encoded(table, column)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        for begin in range(0, len(encoded), DECODE_BATCH):
            batch = encoded[begin : begin + DECODE_BATCH][column]
            named = [(item, begin + offset) for offset, item in enumerate(batch)]
            for offset, image in enumerate(pool.map(lambda pair: _decode(pair[0], pair[1], mode), named)):
                if image.shape != pixels.shape[1:]:
                    raise UnequalSizeError(
                        f"image {begin + offset} is {image.shape[2]}x{image.shape[1]}, the first "
                        f"{pixels.shape[3]}x{pixels.shape[2]}"
                    )
                pixels[begin + offset] = image
    return pixels


def _encoded(table: datasets.Dataset, column: str) -> datasets.Dataset:
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _decode(image: dict[str, Any] | None, index: int, mode: str) -> Pixels:
    if image is None:
        raise ConfigError(f"data.image_column: image {index} is missing")
    try:
        with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
            pixels = np.array(opened.convert(mode))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.image_column: image {index} cannot be read: {error}") from None
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
