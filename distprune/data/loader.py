"""Loaders: batches of inputs and labels, in the order of the sampler."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distprune.data.sampler import Order, RankBatches, Token
from distprune.data.storage import Store, take
from distprune.data.transforms import Transforms

Inputs = Tensor | Mapping[str, Tensor]
"""What a model takes: images (N x C x H x W), or texts as keyword arguments (N x tokens each)."""
Batch = tuple[Inputs, Tensor]
"""Inputs and labels (int64, N, or N x tokens)."""

PADDING = -1
"""The label of a sample or token that is not to be counted."""
_FILLER: Token = (-1, 0)


class Samples(Protocol):
    """One split as loaders ask for it."""

    def __len__(self) -> int: ...

    def batch(self, tokens: Sequence[Token]) -> Batch:
        """The samples of `tokens`, with labels on memory of their own."""
        ...


class ImageSamples:
    """Images as transforms make them, uint8 as a rule.

    Args:
        images: by index.
        labels: of the same, on the device that these are on.
        transforms: of all.
    """

    def __init__(self, images: Store, labels: Tensor, transforms: Transforms) -> None:
        self._images = images
        self._labels = labels
        self._transforms = transforms

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, tokens: Sequence[Token]) -> Batch:
        """See `Samples`."""
        indices = [index for _, index in tokens]
        return self._transforms(self._images.get(indices), tokens), take(self._labels, indices)


class _Batches(Dataset[Batch]):
    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitems__(self, tokens: Sequence[Token]) -> Batch:
        inputs, labels = self._samples.batch(tokens)
        if tokens[-1] == _FILLER:  # fillers are the last
            labels[torch.tensor([token == _FILLER for token in tokens])] = PADDING
        return inputs, labels


def train_loader(
    samples: Samples,
    order: Order,
    begin: int,
    rank: int,
    world_size: int,
    accumulate: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """This rank's micro-batches of the optimizer steps from `begin` on, without end, `accumulate` for each step."""
    batches = RankBatches(order, begin, rank, world_size, accumulate)
    return _loader(samples, batches, workers, pin_memory)


def eval_loader(
    samples: Samples, batch_size: int, rank: int, world_size: int, workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """This rank's part of `samples`, each sample on exactly one rank.

    All ranks have as many batches of as many samples; what a part lacks is filled up with samples of label `PADDING`.
    """
    parts = [[(0, index) for index in part.tolist()] for part in torch.arange(len(samples)).tensor_split(world_size)]
    mine = parts[rank] + [_FILLER] * (len(parts[0]) - len(parts[rank]))
    batches = [mine[begin : begin + batch_size] for begin in range(0, len(mine), batch_size)]
    return _loader(samples, batches, workers, pin_memory)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images as float32 with zero mean and unit deviation per channel; uint8 is scaled to [0, 1] first.

    Runs on the device that holds the images, so that a quarter of the bytes travel to it.
    """
    scaled = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
    return (scaled - mean[:, None, None]).div_(std[:, None, None])


def _loader(samples: Samples, batches: Any, workers: int, pin_memory: bool) -> DataLoader[Batch]:
    return DataLoader(
        _Batches(samples),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        prefetch_factor=4 if workers else None,
        # Without one of its own, a loader draws from the generator that dropout draws from.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(_: int) -> None:
    """Stopping is the trainer's business; a worker that a signal ends would take the run with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
