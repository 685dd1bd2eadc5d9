"""Image transforms by name, and augmentation that depends on seed, epoch and sample only."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from distprune.data.augment import BATCHED, BatchRandomCrop, BatchRandomHorizontalFlip
from distprune.data.sampler import Draws, Token, mix_each
from distprune.errors import ConfigError

# Without a draw of their own, and alike for one image and a stack of them.
DETERMINISTIC = (v2.CenterCrop, v2.Grayscale, v2.Identity, v2.Pad, v2.Resize, v2.RGB, v2.ToDtype)
# Of these those that only move pixels.
ANYWHERE = (v2.CenterCrop, v2.Identity, v2.Pad)

Drawing = BatchRandomCrop | BatchRandomHorizontalFlip


class Transforms:
    """A chain of torchvision v2 transforms for uint8 images.

    What is drawn for a sample depends on (seed, epoch, index) and the place in the chain only, so a sample looks the
    same on whatever rank and worker it is loaded. Up to the last transform that cannot do whole batches, images go
    through the chain one by one; behind it all together.

    Args:
        steps: names or {name: arguments}, as in the configuration.
        seed: seed of the run.
        key: the configuration key, for messages.

    Raises:
        ConfigError: a name or an argument is unknown.
    """

    def __init__(self, steps: Sequence[str | dict[str, dict[str, Any]]], seed: int, key: str = "transforms") -> None:
        self.key = key
        self._chain = [_build(step, f"{key}.{i}") for i, step in enumerate(steps)]
        self._seed = seed
        self._singles = len(self._chain)
        while self._singles and isinstance(self._chain[self._singles - 1], (*DETERMINISTIC, Drawing)):
            self._singles -= 1

    @property
    def bound(self) -> str | None:
        """The first transform that is not known to do whole batches to the same bits on any device; None where all
        are."""
        named = (type(step).__name__ for step in self._chain if not isinstance(step, (*ANYWHERE, Drawing)))
        return next(named, None)

    def __call__(self, images: Tensor | Sequence[Tensor], tokens: Sequence[Token]) -> Tensor:
        """Transform `images` (C x H x W each, or stacked) into one batch, N x C x H x W, on their device."""
        same = isinstance(images, Tensor) or len({image.shape for image in images}) == 1
        singles = self._singles if same else len(self._chain)
        state = torch.get_rng_state()
        if singles:
            alone = [self._run(0, singles, image[None], [token]) for image, token in zip(images, tokens, strict=True)]
            batch = torch.cat(alone)
        else:
            batch = images if isinstance(images, Tensor) else torch.stack(list(images))
        batch = self._run(singles, len(self._chain), batch, tokens)
        torch.set_rng_state(state)
        return batch

    def _run(self, begin: int, end: int, images: Tensor, tokens: Sequence[Token]) -> Tensor:
        for place in range(begin, end):
            transform = self._chain[place]
            draws = mix_each(self._seed, tokens, place)
            try:
                images = _apply(transform, images, draws)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(f"{type(transform).__name__} fails: {error}") from error
        return images


def _apply(transform: nn.Module | Drawing, images: Tensor, draws: Draws) -> Tensor:
    if isinstance(transform, Drawing):
        return transform(images, draws)
    if not isinstance(transform, DETERMINISTIC):
        # torch.manual_seed would also queue a seeding of every GPU, once per image.
        torch.default_generator.manual_seed(int(draws[0]))
    transformed: Tensor = transform(images)
    return transformed


def _build(step: str | dict[str, dict[str, Any]], key: str) -> nn.Module | Drawing:
    if isinstance(step, dict) and len(step) != 1:
        raise ConfigError(f"{key}: {step} names {len(step)} transforms; write one per list entry")
    name, arguments = (step, {}) if isinstance(step, str) else next(iter(step.items()))
    known = [n for n, c in vars(v2).items() if inspect.isclass(c) and issubclass(c, v2.Transform)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        raise ConfigError(
            f"{key}: torchvision.transforms.v2 has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        transform: nn.Module = getattr(v2, name)(**arguments)
        # Ours know these arguments, as single numbers; torchvision's own does the rest.
        batched = BATCHED.get(name)
        if batched and arguments.keys() <= {f.name for f in fields(batched)}:
            if all(isinstance(value, (int, float)) for value in arguments.values()):
                return batched(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {name} does not take {arguments}: {error}") from None
    return transform
