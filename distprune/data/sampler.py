"""The order of samples: a function of seed and step alone, cut up between however many ranks there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

Token = tuple[int, int]
"""Epoch and index of a sample: what its pixels and its augmentation depend on."""
Draws = npt.NDArray[np.uint64]
"""64 random bits for each sample."""


def mix(*numbers: int) -> int:
    """A 64-bit seed from several integers (SplitMix64, Steele et al. 2014, over their sequence)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def mix_each(seed: int, tokens: Sequence[Token], place: int) -> Draws:
    """`mix` of seed, token and place, of all tokens at once."""
    state = np.zeros(len(tokens), np.uint64)
    columns = np.array(tokens, np.int64).reshape(-1, 2).astype(np.uint64).T
    for number in (np.uint64(seed & 0xFFFFFFFFFFFFFFFF), *columns, np.uint64(place)):
        state = state + number + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


@lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(mix(seed, epoch)))


@dataclass(frozen=True)
class Order:
    """Which samples make up which optimizer step. The last, incomplete batch of an epoch is left out.

    Args:
        samples: size of the training set.
        batch_size: samples per step over all ranks, at most `samples`.
        seed: seeds the permutation of every epoch.
    """

    samples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    def batch(self, step: int) -> tuple[int, Tensor]:
        """The epoch, and the indices (int64, 1-D, `batch_size` of them), of step number `step` from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        begin = position * self.batch_size
        return epoch, _permutation(self.samples, self.seed, epoch)[begin : begin + self.batch_size]


class RankBatches(Sampler[list[Token]]):
    """One rank's micro-batches from step `begin` on, without end, `accumulate` of them for each step.

    All ranks' micro-batches of a step together are the step's batch, whatever their number; where the batch does
    not divide, some hold one sample more than others.
    """

    def __init__(self, order: Order, begin: int, rank: int, world_size: int, accumulate: int) -> None:
        self._order = order
        self._begin = begin
        self._parts = world_size * accumulate
        self._mine = range(rank * accumulate, (rank + 1) * accumulate)

    def __iter__(self) -> Iterator[list[Token]]:
        for step in count(self._begin):
            epoch, indices = self._order.batch(step)
            parts = indices.tensor_split(self._parts)
            for part in self._mine:
                yield [(epoch, index) for index in parts[part].tolist()]
