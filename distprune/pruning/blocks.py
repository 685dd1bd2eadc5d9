"""Whole blocks, rows and columns of zeros."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distprune.pruning.collectives import Ranks
from distprune.pruning.exact import factors
from distprune.pruning.limits import Bounds
from distprune.pruning.patterns import Pattern
from distprune.pruning.prunable import Prunable
from distprune.pruning.scorer import Scorer
from distprune.pruning.shards import Part, chunks, sum_at
from distprune.pruning.threshold import Search, Threshold


class BlockPattern(Pattern):
    """Weights go in blocks, each as a whole, those with the lowest mean scores first; of equal ones the later.

    The mean of a block's scores is summed up exactly and rounded once, to the type in which scores are compared, so
    blocks of different sizes compete fairly and no order of ranks or elements matters. Scores below 2^-62 of the
    tensor's largest times the size of a block count as 0.

    Any sparsity goes. As many blocks are pruned as fit into the budget, up to the first that does not: so where all
    tensors compete, zeros fall short of it by less than one block, and where each is cut by itself, by less than one
    block of each. The most that bounds and `min_weights` allow is rounded down to whole blocks, the least up.
    """

    @abstractmethod
    def extents(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a block of a tensor that fits."""

    def unit(self, shape: Sequence[int]) -> int:
        return math.prod(self.extents(shape))

    def within(self, name: str, bounds: Bounds) -> Bounds:
        return bounds

    def check(self, tensors: Sequence[Prunable], final: float) -> None:
        """Refuse a sparsity that no block fits into."""
        weights, smallest = sum(t.numel for t in tensors), min(self.unit(t.weight.shape) for t in tensors)
        if 0 < round(final * weights) < smallest:
            raise ValueError(
                f"a sparsity of {final:g} is {round(final * weights)} of {weights} weights, and the smallest block of "
                f"the pattern {self} has {smallest}; prune more, or smaller blocks"
            )

    def search(
        self,
        tensors: Sequence[Prunable],
        masks: Sequence[Tensor],
        pruned: Sequence[int],
        scorer: Scorer,
        ranks: Ranks,
    ) -> Search:
        return _BlockSearch(self, tensors, masks, pruned, scorer, ranks)


@dataclass(frozen=True)
class Blocks(BlockPattern):
    """Blocks of so many outputs by so many inputs (dimensions 0 and 1); of convolutions at one place of the kernel.

    That is how block-sparse matrix products cut their weights (Gray et al. 2017, "GPU kernels for block-sparse
    weights"; cuSPARSE's BSR), and those of a convolution whose input lies channels last. Tensors of fewer than two
    dimensions, or that a block does not divide, stay dense, as do those of transposed convolutions.

    Args:
        outputs, inputs: of a block, at least 1 and not both.

    Raises:
        ValueError: a block is smaller than two weights.
    """

    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        if min(self.outputs, self.inputs) < 1 or self.outputs * self.inputs < 2:
            raise ValueError(f"a block must have two weights or more, got {self}; 4x4 has 16")

    @staticmethod
    def parse(text: str) -> Blocks:
        """From a text such as 4x4.

        Raises:
            ValueError: it is none.
        """
        if (found := re.fullmatch(r"(\d+)x(\d+)", text)) is None:
            raise ValueError(f"{text!r} is no block such as 4x4")
        return Blocks(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}"

    def extents(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (self.outputs, self.inputs, *(1 for _ in shape[2:]))

    def unfit(self, shape: torch.Size, transposed: bool) -> str | None:
        if (why := super().unfit(shape, transposed)) is not None:
            return why
        for kind, length, extent in zip(("output", "input"), shape, (self.outputs, self.inputs), strict=False):
            if length % extent:
                return f"its {kind} dimension {length} is no multiple of {extent}"
        return None


@dataclass(frozen=True)
class Rows(BlockPattern):
    """All weights of one output (an index of dimension 0): of a convolution, a filter.

    The output's bias, and what comes behind it, stay as they are.
    """

    def __str__(self) -> str:
        return "rows"

    def extents(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (1, *shape[1:])


@dataclass(frozen=True)
class Columns(BlockPattern):
    """All weights of one input (an index of dimension 1): of a convolution, an input channel at all kernel places."""

    def __str__(self) -> str:
        return "columns"

    def extents(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], 1, *shape[2:])


@dataclass(frozen=True)
class _Grid(Prunable):
    """Some blocks of a tensor, and what they are worth: a rectangle of the grid of all its blocks.

    Attributes:
        extent: the shape of a block.
        blocks: which of the grid they are.
        keys: of each, of shape `blocks.shape`; 0 where it is pruned.
        kept: whether it is not.
    """

    extent: tuple[int, ...]
    blocks: Part
    keys: Tensor
    kept: Tensor

    @property
    def unit(self) -> int:
        return math.prod(self.extent)

    @property
    def held(self) -> int:
        return self.keys.numel()

    def indices(self, begin: int, end: int) -> Tensor:
        """Global indices, as if the weights of a block lay together and blocks followed each other row-major."""
        return self.blocks.indices(self.keys, begin, end).mul_(self.unit).add_(self.offset)

    def within(self, start: Sequence[int], stop: Sequence[int]) -> _Grid:
        """Those of its blocks from `start` to before `stop` in each dimension."""
        inner = tuple(
            slice(low - first, high - first) for low, high, first in zip(start, stop, self.blocks.start, strict=True)
        )
        keys, kept = self.keys[inner].contiguous(), self.kept[inner].contiguous()
        return replace(
            self, blocks=replace(self.blocks, start=tuple(start), shape=tuple(keys.shape)), keys=keys, kept=kept
        )


class _Cut:
    """How a tensor is cut into blocks, and which of them this rank's part touches.

    Attributes:
        unit: weights of a block.
    """

    def __init__(self, tensor: Prunable, extent: tuple[int, ...]) -> None:
        self._tensor = tensor
        self._extent = extent
        self.unit = math.prod(extent)
        part, weight = tensor.part, tensor.local
        ends = [start + length for start, length in zip(part.start, part.shape, strict=True)]
        self._whole = self._down(part.whole)
        self._start, self._stop = self._down(part.start), self._up(ends)
        self._shape = tuple(
            high - low if length else 0 for low, high, length in zip(self._start, self._stop, part.shape, strict=True)
        )
        outer, *inner = sorted(range(weight.dim()), key=weight.stride, reverse=True)
        self._outer = self._steps(outer, weight.device)
        self._inner = torch.zeros(1, dtype=torch.int64, device=weight.device)
        for dim in inner:
            self._inner = (self._inner[:, None] + self._steps(dim, weight.device)).view(-1)

    def numbers(self, begin: int, end: int) -> Tensor:
        """In which of the blocks that are touched weights lie (int64), those at `begin` to `end` in memory order."""
        length = len(self._inner)
        first, last = begin // length, -(-end // length)
        begin, end = begin - first * length, end - first * length
        if last - first == 1:
            return self._inner[begin:end] + self._outer[first]
        return (self._outer[first:last, None] + self._inner).view(-1)[begin:end]

    def scored(self, weights: Search, number: int, factor: float) -> _Grid:
        """The blocks that are touched; called on all ranks.

        Args:
            weights: scores them.
            number: of the tensor.
            factor: by which scores are multiplied to make integers of them.
        """
        tensor, part = self._tensor, self._tensor.part
        sums = torch.zeros(math.prod(self._shape), dtype=torch.int64, device=tensor.local.device)
        kept = torch.zeros_like(sums, dtype=torch.bool)
        for begin, end in chunks(0, tensor.held):
            scores, mask = weights.scores(number, begin, end)
            numbers = self.numbers(begin, end)
            sums.index_add_(0, numbers, (scores * factor).round_().long())
            kept[numbers] = mask
        sums = self._put_together(sums.view(self._shape), weights.ranks)
        keys = weights.format.keys(sums.double() / self.unit / factor)
        kept = kept.view(self._shape)
        blocks = Part(self._whole, self._start, self._shape, part.copies, part.copy, part.layout)
        return _Grid(tensor.name, tensor.weight, tensor.offset, part, self._extent, blocks, keys * kept, kept)

    def owned(self, grid: _Grid) -> _Grid:
        """Of the blocks that are touched those whose first weight this rank has, so that each is counted once."""
        part = self._tensor.part
        start = self._up(part.start)
        return grid.within(
            start,
            [
                max(low, high) if length else low
                for low, high, length in zip(start, self._stop, part.shape, strict=True)
            ],
        )

    def _put_together(self, sums: Tensor, ranks: Ranks) -> Tensor:
        """Add up what ranks have summed of blocks that lie on several of them."""
        part = self._tensor.part
        cut = [
            sorted({place // extent for place in part.cuts(dim) if place % extent})
            for dim, extent in enumerate(self._extent)
        ]
        wanted: list[Sequence[int]] = [range(length) for length in self._whole]
        for dim, numbers in enumerate(cut):
            if numbers:
                places = [*wanted[:dim], numbers, *wanted[dim + 1 :]]
                whole, spans = sum_at(sums, self._start, places, part, ranks)
                own = [
                    torch.tensor(places[d][span], dtype=torch.int64, device=sums.device) - self._start[d]
                    for d, span in enumerate(spans)
                ]
                sums[torch.meshgrid(*own, indexing="ij")] = whole[spans]
                wanted[dim] = [other for other in wanted[dim] if other not in set(numbers)]
        return sums

    def _steps(self, dim: int, device: torch.device) -> Tensor:
        """How far the indices of a dimension lead in the numbers of blocks."""
        part = self._tensor.part
        places = torch.arange(part.start[dim], part.start[dim] + part.shape[dim], device=device)
        return (places // self._extent[dim] - self._start[dim]) * math.prod(self._shape[dim + 1 :])

    def _down(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(place // extent for place, extent in zip(places, self._extent, strict=True))

    def _up(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-place // extent) for place, extent in zip(places, self._extent, strict=True))


class _BlockSearch(Search):
    """Looks for thresholds among blocks. The sums of those on several ranks are exchanged, and of no others."""

    def __init__(
        self,
        pattern: BlockPattern,
        tensors: Sequence[Prunable],
        masks: Sequence[Tensor],
        pruned: Sequence[int],
        scorer: Scorer,
        ranks: Ranks,
    ) -> None:
        self._weights = Search(tensors, masks, pruned, scorer, ranks)
        largest = self._weights.largest()
        if largest.isinf().any():
            self._weights.refuse_nonfinite()
        self._cuts = [_Cut(tensor, pattern.extents(tensor.weight.shape)) for tensor in tensors]
        scales = factors(largest, [cut.unit for cut in self._cuts])
        self._touched = [
            cut.scored(self._weights, number, scale)
            for number, (cut, scale) in enumerate(zip(self._cuts, scales, strict=True))
        ]
        self._owned = [cut.owned(grid) for cut, grid in zip(self._cuts, self._touched, strict=True)]
        super().__init__(self._owned, [grid.kept for grid in self._owned], pruned, scorer, ranks)

    def keys(self, number: int, begin: int, end: int) -> Tensor:
        return self._owned[number].keys.view(-1)[begin:end]

    def keeps(self, threshold: Threshold, number: int) -> Iterator[tuple[int, int, Tensor]]:
        grid, cut = self._touched[number], self._cuts[number]
        keep = threshold.keeps(grid, grid.keys.view(-1), 0)
        for begin, end in chunks(0, self._weights.tensors[number].held):
            yield begin, end, keep[cut.numbers(begin, end)]

    def refuse_nonfinite(self) -> None:
        self._weights.refuse_nonfinite()
