"""Images as the model sees them: loaders of one split, for one rank, normalised and on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from distprune.config import Config
from distprune.config.schema import Data
from distprune.data import Batch, ImageSamples, Inputs, Samples, load_images, normalize
from distprune.data.corruptions import CorruptedSamples, Corruption
from distprune.data.storage import MemoryStore, Store
from distprune.data.transforms import Transforms
from distprune.errors import ConfigError, reason
from distprune.training.splits import Split


class Images(Split):
    """Loaders of one split of images for one rank: normalised batches on the device. See `Split`."""

    what = "images"

    def __init__(self, config: Config, data: Data, split: str, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self._data = data
        self._images = load_images(data, split)
        self.labels = self._images.labels
        self.classes = self._images.classes
        self.outputs = len(self.classes)
        self._mean = torch.tensor(data.mean, device=accelerator.device)
        self._std = torch.tensor(data.std, device=accelerator.device)
        self._memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return len(self._images)

    @cached_property
    def _store(self) -> Store:
        """Images by index, where they are transformed."""
        store = self._images.images
        if self._data.storage != "device":
            return store
        assert isinstance(store, MemoryStore)
        try:
            return MemoryStore(store.images.to(self._accelerator.device))
        except torch.OutOfMemoryError as error:
            size = store.images.nbytes / 1e9
            raise ConfigError(
                f"data.storage: {len(store):,} images take {size:.1f} GB, more than the device has left; set "
                "data.storage=memory"
            ) from error

    def first_samples(self, training: bool = False) -> Batch:
        """See `Split`.

        Raises:
            ConfigError: a transform fails, or makes images of unequal size.
        """
        key = "data.train_transforms" if training else "data.eval_transforms"
        try:
            images, labels = self._samples(training).batch(self._ends)
            return self._on_device(images), labels.to(self._accelerator.device)
        except ConfigError:
            raise
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            remedy = "; Resize and CenterCrop make them equal" if "equal size" in reason(error) else ""
            raise ConfigError(f"{key}: fail on the first images: {reason(error)}{remedy}") from error

    def corrupted_batches(self, corruption: Corruption) -> Callable[[], Iterator[Batch]]:
        """As `eval_batches`, of corrupted images.

        They are corrupted behind `data.eval_transforms`, at the size that the model sees, so that a strength means the
        same whatever size they are stored at; and before they are normalised, as the pixels that a camera would give.

        Raises:
            ConfigError: the transforms do not give what can be corrupted.
        """
        transforms = self._transforms(training=False)
        images = ImageSamples(self._images.images, self._images.labels, transforms)
        samples = CorruptedSamples(images, corruption, self._config.run.seed)
        samples.batch(self._ends[:1])
        return self._batches(samples)

    def _samples(self, training: bool) -> Samples:
        transforms = self._transforms(training)
        if self._data.storage == "device" and transforms.bound is not None:
            raise ConfigError(
                f"data.storage: device takes RandomCrop and RandomHorizontalFlip with plain numbers, CenterCrop and "
                f"Pad, and {transforms.key} has {transforms.bound}; leave it out, or set data.storage=memory"
            )
        labels = self._images.labels
        if self._data.storage == "device":
            labels = labels.to(self._accelerator.device)
        return ImageSamples(self._store, labels, transforms)

    def _transforms(self, training: bool) -> Transforms:
        key = "train_transforms" if training else "eval_transforms"
        return Transforms(getattr(self._data, key), self._config.run.seed, f"data.{key}")

    @property
    def _pin(self) -> bool:
        return super()._pin and self._data.storage != "device"

    def _on_device(self, inputs: Inputs) -> Inputs:
        assert isinstance(inputs, Tensor)
        on_device = inputs.to(self._accelerator.device, non_blocking=True, memory_format=self._memory_format)
        return normalize(on_device, self._mean, self._std)
