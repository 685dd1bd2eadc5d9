"""The random transforms of small images, on whole batches: as torchvision's, without its cost per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BatchRandomCrop:
    """Crops of `size` x `size` at random places, after padding all four sides with `padding` zeros."""

    size: int
    padding: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or not isinstance(self.padding, int):
            raise TypeError(f"size and padding are whole numbers, got {self.size} and {self.padding}")

    def __call__(self, images: Tensor, draws: Sequence[int]) -> Tensor:
        """Crop `images` (N x C x H x W), each at the place that its draw, an integer of 64 random bits, says.

        Raises:
            ValueError: the padded images are smaller than the crop.
        """
        images = F.pad(images, [self.padding] * 4)
        rows, columns = images.shape[-2] - self.size + 1, images.shape[-1] - self.size + 1
        if rows < 1 or columns < 1:
            raise ValueError(f"RandomCrop of {self.size} does not fit padded images of {tuple(images.shape[-2:])}")
        places = torch.tensor([((draw >> 32) % rows, (draw & 0xFFFFFFFF) % columns) for draw in draws])
        window = torch.arange(self.size)
        sample = torch.arange(len(images))[:, None, None, None]
        channel = torch.arange(images.shape[1])[None, :, None, None]
        y = (places[:, :1] + window)[:, None, :, None]
        x = (places[:, 1:] + window)[:, None, None, :]
        return images[sample, channel, y, x]


@dataclass(frozen=True)
class BatchRandomHorizontalFlip:
    """Mirrors images left to right with probability `p`."""

    p: float = 0.5

    def __call__(self, images: Tensor, draws: Sequence[int]) -> Tensor:
        """Flip those of `images` (N x C x H x W) whose draw, an integer of 64 random bits, says so."""
        flip = torch.tensor([draw < self.p * 2**64 for draw in draws])
        return torch.where(flip[:, None, None, None], images.flip(-1), images)


BATCHED: dict[str, type[BatchRandomCrop | BatchRandomHorizontalFlip]] = {
    "RandomCrop": BatchRandomCrop,
    "RandomHorizontalFlip": BatchRandomHorizontalFlip,
}
