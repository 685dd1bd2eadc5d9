"""The random transforms of small images, on whole batches: as torchvision's, without its cost per image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distprune.data.sampler import Draws


@dataclass(frozen=True)
class BatchRandomCrop:
    """Crops of `size` x `size` at random places, after padding all four sides with `padding` zeros."""

    size: int
    padding: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or not isinstance(self.padding, int):
            raise TypeError(f"size and padding are whole numbers, got {self.size} and {self.padding}")

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop `images` (N x C x H x W), each at the place that its draw says.

        Raises:
            ValueError: the padded images are smaller than the crop.
        """
        images = F.pad(images, [self.padding] * 4)
        rows, columns = images.shape[-2] - self.size + 1, images.shape[-1] - self.size + 1
        if rows < 1 or columns < 1:
            raise ValueError(f"RandomCrop of {self.size} does not fit padded images of {tuple(images.shape[-2:])}")
        high, low = draws >> np.uint64(32), draws & np.uint64(0xFFFFFFFF)
        drawn = np.stack([high % np.uint64(rows), low % np.uint64(columns)]).astype(np.int64)
        places = torch.from_numpy(drawn).to(images.device, non_blocking=True)
        window = torch.arange(self.size, device=images.device)
        sample = torch.arange(len(images), device=images.device)[:, None, None, None]
        channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
        y = (places[0, :, None] + window)[:, None, :, None]
        x = (places[1, :, None] + window)[:, None, None, :]
        return images[sample, channel, y, x]


@dataclass(frozen=True)
class BatchRandomHorizontalFlip:
    """Mirrors images left to right with probability `p`."""

    p: float = 0.5

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Flip those of `images` (N x C x H x W) whose draw says so."""
        limit = math.ceil(self.p * 2**64)
        flip = torch.from_numpy(draws < np.uint64(limit) if limit < 2**64 else np.ones(len(draws), np.bool_))
        flip = flip.to(images.device, non_blocking=True)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)


BATCHED: dict[str, type[BatchRandomCrop | BatchRandomHorizontalFlip]] = {
    "RandomCrop": BatchRandomCrop,
    "RandomHorizontalFlip": BatchRandomHorizontalFlip,
}
