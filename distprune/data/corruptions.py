"""Images made worse: noise, blur, brightness, contrast and JPEG, each at three strengths.

The kinds and their strengths are the first, third and fifth of Hendrycks and Dietterich 2019 (arXiv:1903.12261): of
CIFAR-10-C for small images, of ImageNet-C for larger ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from distprune.config.schema import CorruptionKind
from distprune.data.loader import Batch, Samples
from distprune.data.sampler import Token, mix
from distprune.errors import ConfigError

KINDS: tuple[CorruptionKind, ...] = get_args(CorruptionKind)
STRENGTHS = (1, 2, 3)
SMALL = 64
"""Pixels of the shorter side up to which images are small."""
SIDES = {True: 32, False: 224}
"""Of the images, small or not, that the standard deviations of blur are given for."""
SEVERITIES: dict[str, dict[bool, tuple[float, float, float]]] = {
    "noise": {True: (0.04, 0.08, 0.10), False: (0.08, 0.18, 0.38)},
    "blur": {True: (0.4, 0.7, 1.0), False: (1.0, 3.0, 6.0)},
    "brightness": {True: (1.1, 1.3, 1.6), False: (1.2, 1.6, 2.0)},
    "contrast": {True: (0.75, 0.4, 0.15), False: (0.4, 0.2, 0.05)},
    "jpeg": {True: (80, 58, 40), False: (25, 15, 7)},
}
"""For small images, and for larger ones: standard deviation as a share of white, standard deviation in pixels, factor,
factor, quality."""


@dataclass(frozen=True)
class Corruption:
    """A kind, one of `KINDS`, at a strength, one of `STRENGTHS`."""

    kind: CorruptionKind
    strength: int

    @property
    def name(self) -> str:
        """Such as noise-1."""
        return f"{self.kind}-{self.strength}"

    def __call__(self, image: Tensor, draw: int) -> Tensor:
        """An image (uint8, C x H x W, grey or RGB), corrupted; `draw` seeds what is random."""
        side = min(image.shape[-2:])
        small = side <= SMALL
        severity = SEVERITIES[self.kind][small][self.strength - 1]
        if self.kind == "blur":
            # Below 32 pixels less would be no blur at all.
            return _blur(image, severity * (max(1.0, side / SIDES[small]) if small else side / SIDES[small]))
        if self.kind == "noise":
            # torch.manual_seed would also queue a seeding of every GPU, once per image.
            torch.default_generator.manual_seed(draw)
        return _APPLY[self.kind](image, severity)


def corruptions(setting: bool | Sequence[CorruptionKind]) -> list[Corruption]:
    """Those of `eval.corruptions`, in the order of `KINDS`."""
    kinds = KINDS if setting is True else setting or ()
    return [Corruption(kind, strength) for kind in KINDS if kind in kinds for strength in STRENGTHS]


class CorruptedSamples:
    """Images as transforms make them, each corrupted by itself: what is beside it in a batch does not matter.

    Args:
        samples: uint8 images.
        corruption: of all.
        seed: of the run. What is drawn depends on this, the corruption and the sample only.
    """

    def __init__(self, samples: Samples, corruption: Corruption, seed: int) -> None:
        self._samples = samples
        self._corruption = corruption
        self._seed = mix(seed, KINDS.index(corruption.kind), corruption.strength)

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, tokens: Sequence[Token]) -> Batch:
        """See `Samples`.

        Raises:
            ConfigError: the images are not uint8 with 1 or 3 channels.
        """
        images, labels = self._samples.batch(tokens)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            told = f"{images.dtype}, {tuple(images.shape[1:])}" if isinstance(images, Tensor) else "none"
            raise ConfigError(
                f"eval.corruptions: takes uint8 images with 1 or 3 channels, and data.eval_transforms give {told}; "
                "leave out ConvertImageDtype and Normalize, as data.mean and data.std do the same, or the corruptions"
            )
        state = torch.get_rng_state()
        draws = [mix(self._seed, index) for _, index in tokens]
        corrupted = [self._corruption(image, draw) for image, draw in zip(images, draws, strict=True)]
        torch.set_rng_state(state)
        return torch.stack(corrupted), labels


def _noise(image: Tensor, sigma: float) -> Tensor:
    return cast(Tensor, F.gaussian_noise(image, sigma=sigma))


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Rows, then columns, which is the same as both at once and takes far less; rounded once."""
    height, width = image.shape[-2:]
    # The edge is mirrored, so that a kernel reaches no further than the image.
    high, wide = (2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in (height, width))
    rows = F.gaussian_blur(image.float(), [wide, 1], [sigma, sigma])
    return cast(Tensor, F.gaussian_blur(rows, [1, high], [sigma, sigma])).round_().to(torch.uint8)


def _brightness(image: Tensor, factor: float) -> Tensor:
    return cast(Tensor, F.adjust_brightness(image, factor))


def _contrast(image: Tensor, factor: float) -> Tensor:
    return cast(Tensor, F.adjust_contrast(image, factor))


def _jpeg(image: Tensor, quality: float) -> Tensor:
    """By Pillow, as in the paper: torchvision is about to give up its own."""
    file = io.BytesIO()
    Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()).save(
        file, "JPEG", quality=int(quality)
    )
    with Image.open(file) as opened:
        pixels = torch.from_numpy(np.array(opened))
    return pixels[None] if len(image) == 1 else pixels.permute(2, 0, 1).contiguous()


_APPLY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "noise": _noise,
    "brightness": _brightness,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
