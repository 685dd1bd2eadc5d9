"""One split of the data as the model sees it: loaders for one rank, with batches on the device."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from distprune.config import Config
from distprune.data import Batch, Inputs, Order, Samples, eval_loader, train_loader
from distprune.data.sampler import Token


class Split(ABC):
    """Loaders of one split for one rank.

    Args:
        config: of the run.
        accelerator: ranks and device.

    Attributes:
        labels: of the samples (int64, 1-D); None where tokens are foretold.
        outputs: how many a model must have: classes, or tokens.
        classes: their names; none where tokens are foretold.
        what: its samples are called.
        tokenizer: of texts; None of images.
    """

    what: str
    labels: Tensor | None
    outputs: int
    classes: list[str]
    tokenizer: Any = None

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self._config = config
        self._accelerator = accelerator

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def first_samples(self, training: bool = False) -> Batch:
        """The first and the last sample as the model will see them, in training or not, on the device.

        Raises:
            ConfigError: they cannot be made.
        """

    @abstractmethod
    def _samples(self, training: bool) -> Samples:
        """What loaders read."""

    @abstractmethod
    def _on_device(self, inputs: Inputs) -> Inputs:
        """What the model takes, of what loaders give."""

    def first_inputs(self) -> Inputs:
        """Those of `first_samples`, as in evaluation."""
        return self.first_samples()[0]

    def drawn_inputs(self, count: int, seed: int, batch_size: int = 64) -> Iterator[Inputs]:
        """Batches of `count` samples, or of all there are, drawn without replacement, as in evaluation."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self), generator=generator)[:count]
        samples = self._samples(training=False)
        for part in torch.split(drawn, batch_size):
            inputs, _ = samples.batch([(0, index) for index in part.tolist()])
            yield self._on_device(inputs)

    def digest(self) -> str:
        """A SHA-256 of labels, and of the first and the last sample."""
        inputs, labels = self._samples(training=False).batch(self._ends)
        digest = hashlib.sha256(tensor_bytes(labels if self.labels is None else self.labels))
        for tensor in (inputs,) if isinstance(inputs, Tensor) else inputs.values():
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def train_batches(self, order: Order, begin: int) -> Iterator[Batch]:
        """Micro-batches from step `begin` on, without end."""
        config, ranks = self._config, self._accelerator
        loader = train_loader(
            self._samples(training=True), order, begin, ranks.process_index, ranks.num_processes,
            config.train.accumulate, config.data.workers, self._pin,
        )  # fmt: skip
        return self._ready(loader)

    def eval_batches(self, alone: bool = False) -> Callable[[], Iterator[Batch]]:
        """This rank's part of the split, as many batches on each rank, or `alone` all of it; anew at each call."""
        return self._batches(self._samples(training=False), alone)

    def _batches(self, samples: Samples, alone: bool = False) -> Callable[[], Iterator[Batch]]:
        config, ranks = self._config, self._accelerator
        rank, world_size = (0, 1) if alone else (ranks.process_index, ranks.num_processes)
        loader = eval_loader(samples, config.eval.batch_size, rank, world_size, config.data.workers, self._pin)
        return lambda: self._ready(loader)

    @property
    def _ends(self) -> list[Token]:
        """The first and the last sample."""
        return [(0, 0), (0, len(self) - 1)]

    @property
    def _pin(self) -> bool:
        return bool(self._accelerator.device.type == "cuda")

    def _ready(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        for inputs, labels in loader:
            yield self._on_device(inputs), labels.to(self._accelerator.device, non_blocking=True)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The elements in row-major order."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
