"""Patterns of zeros that hardware can make use of."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.pruning.collectives import Ranks
from distprune.pruning.limits import Bounds
from distprune.pruning.prunable import Prunable
from distprune.pruning.scorer import Scorer
from distprune.pruning.shards import Part, chunks, flat, sum_at
from distprune.pruning.threshold import Search


class Pattern(ABC):
    """Says where zeros may be."""

    def unfit(self, shape: torch.Size, transposed: bool) -> str | None:
        """Why a tensor stays dense, that of a transposed convolution or another; None where it does not."""
        if transposed:
            return "of a transposed convolution, whose input dimension is the first"
        if len(shape) < 2:
            return f"of {len(shape)} dimension, and the pattern {self} takes two"
        return None

    @abstractmethod
    def unit(self, shape: Sequence[int]) -> int:
        """How many weights of a tensor that fits go at once."""

    @abstractmethod
    def within(self, name: str, bounds: Bounds) -> Bounds:
        """Bounds of the tensor `name` that the pattern cannot exceed.

        Raises:
            ValueError: it is to be sparser than the pattern.
        """

    @abstractmethod
    def check(self, tensors: Sequence[Prunable], final: float) -> None:
        """Refuse a final sparsity that the pattern does not end with.

        Raises:
            ValueError: names both sparsities.
        """

    @abstractmethod
    def search(
        self,
        tensors: Sequence[Prunable],
        masks: Sequence[Tensor],
        pruned: Sequence[int],
        scorer: Scorer,
        ranks: Ranks,
    ) -> Search:
        """A search among what the pattern lets go now, see `Search`; called on all ranks.

        Raises:
            NonFiniteError: a score is NaN or infinite. Not every pattern has to look.
        """


@dataclass(frozen=True)
class NM(Pattern):
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

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """At the end."""
        return (self.m - self.n) / self.m

    def zeros(self, numel: int) -> int:
        """At the end, of a tensor of so many weights."""
        return numel // self.m * (self.m - self.n)

    def unfit(self, shape: torch.Size, transposed: bool) -> str | None:
        if (why := super().unfit(shape, transposed)) is not None:
            return why
        if shape[1] % self.m:
            return f"its input dimension {shape[1]} is no multiple of {self.m}"
        return None

    def unit(self, shape: Sequence[int]) -> int:
        return 1

    def within(self, name: str, bounds: Bounds) -> Bounds:
        if bounds.min > self.sparsity:
            raise ValueError(
                f"bounds: {name} is to have at least {bounds.min} sparsity, and {self} gives it {self.sparsity:g}"
            )
        return Bounds(bounds.min, min(bounds.max, self.sparsity))

    def check(self, tensors: Sequence[Prunable], final: float) -> None:
        weights, full = sum(t.numel for t in tensors), sum(self.zeros(t.numel) for t in tensors)
        if round(final * weights) != full:
            raise ValueError(
                f"the pattern {self} makes {full} of {weights} weights zero, a sparsity of "
                f"{full / weights:g}; the schedule ends with {final:g}"
            )

    def search(
        self,
        tensors: Sequence[Prunable],
        masks: Sequence[Tensor],
        pruned: Sequence[int],
        scorer: Scorer,
        ranks: Ranks,
    ) -> Search:
        return _GroupSearch(self, tensors, masks, pruned, scorer, ranks)

    def barred(self, keys: Tensor, mask: Tensor, part: Part, ranks: Ranks) -> Tensor:
        """Which kept weights may not go now (bool, shaped and laid out as `mask`): all but the M - N lowest of a group.

        Of equal keys the later goes first. What is pruned already counts among the lowest. Of groups that lie on
        several ranks the keys are exchanged, and of no others; called on all ranks, one collective where there are any.

        Args:
            keys: of the weights, an integer each, of the shape of `mask`.
            mask: True where a weight is kept.
            part: what of the whole they are.
            ranks: who holds the rest.
        """
        # One more than the key: kept weights that are 0 have the key of pruned ones.
        ranked = torch.where(mask, keys.long() + 1, 0)
        before, after = self._beside(ranked, part, ranks)
        high = self._high(torch.cat([before, ranked, after], 1)).narrow(1, before.shape[1], mask.shape[1])
        return torch.empty_like(mask).copy_(high) & mask

    def _beside(self, ranked: Tensor, part: Part, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """What other ranks hold of the groups in which this rank's part begins and ends, along dimension 1."""
        groups = sorted({cut // self.m for cut in part.cuts(1) if cut % self.m})
        if not groups:
            return ranked[:, :0], ranked[:, :0]
        columns = [group * self.m + place for group in groups for place in range(self.m)]
        wanted = [range(length) for length in part.whole]
        shared, spans = sum_at(ranked, part.start, [wanted[0], columns, *wanted[2:]], part, ranks)
        if not part.shape[1]:
            return ranked, ranked
        own = shared[tuple(span if dim != 1 else slice(None) for dim, span in enumerate(spans))]
        start, stop = part.start[1], part.start[1] + part.shape[1]

        def between(low: int, high: int) -> Tensor:
            return own[:, bisect_left(columns, low) : bisect_left(columns, high)]

        return between(start - start % self.m, start), between(stop, stop + -stop % self.m)

    def _high(self, ranked: Tensor) -> Tensor:
        """Which are not among the M - N lowest of their group; `ranked` is made of whole groups."""
        by_input = ranked.movedim(1, -1)
        groups = by_input.reshape(*by_input.shape[:-1], by_input.shape[-1] // self.m, self.m)
        below = torch.zeros_like(groups, dtype=torch.int16)
        for one in range(self.m):
            for other in range(self.m):
                if other < one:
                    below[..., one] += groups[..., other] < groups[..., one]
                elif other > one:
                    below[..., one] += groups[..., other] <= groups[..., one]
        return (below >= self.m - self.n).flatten(-2).movedim(-1, 1)


class _GroupSearch(Search):
    """Weights that N:M bars from going have the highest keys of all that are finite."""

    def __init__(
        self,
        pattern: NM,
        tensors: Sequence[Prunable],
        masks: Sequence[Tensor],
        pruned: Sequence[int],
        scorer: Scorer,
        ranks: Ranks,
    ) -> None:
        super().__init__(tensors, masks, pruned, scorer, ranks)
        self._barred: list[Tensor] = []
        for number, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
            keys = torch.empty_like(mask, dtype=torch.int64)
            for begin, end in chunks(0, mask.numel()):
                flat(keys)[begin:end] = super().keys(number, begin, end)
            self._barred.append(flat(pattern.barred(keys, mask, tensor.part, ranks)))

    def keys(self, number: int, begin: int, end: int) -> Tensor:
        keys = super().keys(number, begin, end)
        highest, finite = self.format.infinite - 1, keys < self.format.infinite
        barred = self._barred[number][begin:end]
        return torch.where(finite, torch.where(barred, highest, keys.clamp(max=highest - 1)), keys)
