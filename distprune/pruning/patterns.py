"""Patterns of zeros that hardware can make use of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.pruning.limits import Bounds
from distprune.pruning.prunable import Prunable


@dataclass(frozen=True)
class NM:
    """N:M: of each M weights in a row along the input dimension (dimension 1), N are kept at the end.

    GPUs multiply 2:4 faster (Mishra et al. 2021, arXiv:2104.08378). On the way there a group never has more than M - N
    zeros, and the weights that go first are those with the lowest scores among all that may go: of each group the M - N
    lowest. Tensors of fewer than two dimensions, or whose input dimension M does not divide, stay dense, as do those of
    transposed convolutions, whose input dimension is another.

    Args:
        n: how many of each group are kept, at least 1.
        m: the size of a group, above `n`.

    Raises:
        ValueError: a value lies outside its range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"N:M must satisfy 1 <= N < M, got {self.n}:{self.m}; 2:4 keeps two of each four")

    @staticmethod
    def parse(text: str) -> NM:
        """From a text such as 2:4.

        Raises:
            ValueError: it is none.
        """
        if (found := re.fullmatch(r"(\d+):(\d+)", text)) is None:
            raise ValueError(f"{text!r} is no pattern N:M such as 2:4")
        return NM(int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float:
        """At the end."""
        return (self.m - self.n) / self.m

    def zeros(self, numel: int) -> int:
        """At the end, of a tensor of so many weights."""
        return numel // self.m * (self.m - self.n)

    def unfit(self, shape: torch.Size, transposed: bool) -> str | None:
        """Why a tensor stays dense, that of a transposed convolution or another; None where it does not."""
        if transposed:
            return "of a transposed convolution, whose input dimension is the first"
        if len(shape) < 2:
            return f"of {len(shape)} dimension, and {self.n}:{self.m} takes two"
        if shape[1] % self.m:
            return f"its input dimension {shape[1]} is no multiple of {self.m}"
        return None

    def within(self, name: str, bounds: Bounds) -> Bounds:
        """Bounds of the tensor `name` that no group can exceed.

        Raises:
            ValueError: it is to be sparser than the pattern.
        """
        if bounds.min > self.sparsity:
            raise ValueError(
                f"bounds: {name} is to have at least {bounds.min} sparsity, and {self.n}:{self.m} gives it "
                f"{self.sparsity:g}"
            )
        return Bounds(bounds.min, min(bounds.max, self.sparsity))

    def check(self, tensors: Sequence[Prunable], final: float) -> None:
        """Refuse shards that cut groups, and a final sparsity that is not that of the pattern in full.

        Raises:
            ValueError: names the tensor, or both sparsities.
        """
        for tensor in tensors:
            if tensor.part.start[1] % self.m or tensor.part.shape[1] % self.m:
                raise ValueError(
                    f"{tensor.name} is sharded along its input dimension, from {tensor.part.start[1]} on "
                    f"{tensor.part.shape[1]} of {tensor.part.whole[1]}, which cuts groups of {self.m}; shard it along "
                    "dimension 0, as FSDP2 does"
                )
        weights, full = sum(t.numel for t in tensors), sum(self.zeros(t.numel) for t in tensors)
        if round(final * weights) != full:
            raise ValueError(
                f"the pattern {self.n}:{self.m} makes {full} of {weights} weights zero, a sparsity of "
                f"{full / weights:g}; the schedule ends with {final:g}"
            )

    def barred(self, keys: Tensor, mask: Tensor) -> Tensor:
        """Which kept weights may not go now (bool, shaped and laid out as `mask`): all but the M - N lowest of a group.

        Of equal keys the later goes first. What is pruned already counts among the lowest.

        Args:
            keys: of the weights, an integer each, of the shape of `mask`.
            mask: True where a weight is kept.
        """
        # One more than the key: kept weights that are 0 have the key of pruned ones.
        ranked = torch.where(mask, keys.long() + 1, 0)
        by_input = ranked.movedim(1, -1)
        groups = by_input.reshape(*by_input.shape[:-1], by_input.shape[-1] // self.m, self.m)
        below = torch.zeros_like(groups, dtype=torch.int16)
        for one in range(self.m):
            for other in range(self.m):
                if other < one:
                    below[..., one] += groups[..., other] < groups[..., one]
                elif other > one:
                    below[..., one] += groups[..., other] <= groups[..., one]
        high = (below >= self.m - self.n).flatten(-2).movedim(-1, 1)
        return torch.empty_like(mask).copy_(high) & mask
