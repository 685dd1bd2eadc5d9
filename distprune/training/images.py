"""Images as the model sees them: loaders of one split, for one rank, normalised and on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from distprune.config import Config
from distprune.data import ImageData, Order, eval_loader, load_images, normalize, train_loader
from distprune.data.transforms import Transforms
from distprune.errors import ConfigError, reason


class Images:
    """Loaders of one split for one rank: normalised batches on the device."""

    def __init__(self, config: Config, split: str, accelerator: Accelerator) -> None:
        self.data: ImageData = load_images(config.data, split)
        self._config = config
        self._accelerator = accelerator
        device = accelerator.device
        self._mean = torch.tensor(config.data.mean, device=device)
        self._std = torch.tensor(config.data.std, device=device)
        self._pin = device.type == "cuda"
        self._memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format

    def first_samples(self) -> tuple[Tensor, Tensor]:
        """Two images as the model will see them in training, and their labels, on the device.

        Raises:
            ConfigError: see `first_images`.
        """
        return self.first_images(training=True), self.data.labels[[0, -1]].to(self._accelerator.device)

    def first_images(self, training: bool = False) -> Tensor:
        """Two images as the model will see them, on the device.

        Raises:
            ConfigError: a transform fails, or makes images of unequal size.
        """
        key = "data.train_transforms" if training else "data.eval_transforms"
        indices = [0, len(self.data) - 1]
        try:
            images = self._transforms(training)(self.data.images.get(indices), [(0, index) for index in indices])
            return self._on_device(images)
        except ConfigError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            remedy = "; Resize and CenterCrop make them equal" if "equal size" in reason(error) else ""
            raise ConfigError(f"{key}: fail on the first images: {reason(error)}{remedy}") from error

    def train_batches(self, order: Order, begin: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches from step `begin` on, without end."""
        config, ranks = self._config, self._accelerator
        loader = train_loader(
            self.data, self._transforms(training=True), order, begin, ranks.process_index, ranks.num_processes,
            config.train.accumulate, config.data.workers, self._pin,
        )  # fmt: skip
        return self._ready(loader)

    def eval_batches(self, alone: bool = False) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """This rank's part of the split, as many batches on each rank, or `alone` all of it; anew at each call."""
        config, ranks = self._config, self._accelerator
        rank, world_size = (0, 1) if alone else (ranks.process_index, ranks.num_processes)
        loader = eval_loader(
            self.data, self._transforms(training=False), config.eval.batch_size, rank, world_size,
            config.data.workers, self._pin,
        )  # fmt: skip
        return lambda: self._ready(loader)

    def _transforms(self, training: bool) -> Transforms:
        data, seed = self._config.data, self._config.run.seed
        if training:
            return Transforms(data.train_transforms, seed, "data.train_transforms")
        return Transforms(data.eval_transforms, seed, "data.eval_transforms")

    def _on_device(self, images: Tensor) -> Tensor:
        on_device = images.to(self._accelerator.device, non_blocking=True, memory_format=self._memory_format)
        return normalize(on_device, self._mean, self._std)

    def _ready(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield self._on_device(images), labels.to(self._accelerator.device, non_blocking=True)
