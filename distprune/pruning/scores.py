"""What a weight is worth. The lowest scores are pruned first.

A score is a function of a `Piece` of weights that gives one float for each. One that looks at gradients too is an
object with `observe`, whose values are added up from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from distprune.pruning.hashing import scramble
from distprune.pruning.prunable import Prunable


@dataclass(frozen=True)
class Piece:
    """A stretch of what this rank holds of a tensor, in memory order.

    Attributes:
        tensor: the whole it is a piece of; `tensor.name` is its name.
        begin: where the piece begins in this rank's part.
        weight: the weights, 1-D; pruned ones are 0.
        observed: what a score with `observe` has seen of them, 1-D, float32; None for others.
    """

    tensor: Prunable
    begin: int
    weight: Tensor
    observed: Tensor | None = None

    @property
    def indices(self) -> Tensor:
        """The global index of each weight (int64), the same on any number of ranks."""
        return self.tensor.indices(self.begin, self.begin + len(self.weight))


Score = Callable[[Piece], Tensor]
"""A score takes a piece and returns a float tensor, 1-D, one for each weight. It may not talk to other ranks: they hold
other pieces."""


@runtime_checkable
class GradientScore(Protocol):
    """A score that is also told of the gradient before each optimizer step.

    Attributes:
        forgets: whether what was observed is averaged over the steps since the last update, and then forgotten; else it
            is added up from the first step on.
    """

    forgets: bool

    def observe(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What one step says of each weight; `weight` and `gradient` are this rank's, of one shape and dtype."""
        ...

    def __call__(self, piece: Piece) -> Tensor:
        """The score, from `piece.observed`."""
        ...


def magnitude(piece: Piece) -> Tensor:
    """|w|: small weights go first (Han et al. 2015, arXiv:1506.02626)."""
    return piece.weight.abs()


@dataclass(frozen=True)
class Taylor:
    """|w dL/dw|, how much the loss would change to first order, averaged over the steps since the last update
    (Molchanov et al. 2017, arXiv:1611.06440). Gradients are those the optimizer gets, all-reduced."""

    forgets: ClassVar[bool] = True

    def observe(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).abs()

    def __call__(self, piece: Piece) -> Tensor:
        assert piece.observed is not None
        return piece.observed


@dataclass(frozen=True)
class Movement:
    """-w dL/dw added up over all steps: weights that move towards 0 go first (Sanh et al. 2020, arXiv:2005.07683).

    Here pruned weights stay pruned; in the paper they may come back.
    """

    forgets: ClassVar[bool] = False

    def observe(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return -(weight * gradient)

    def __call__(self, piece: Piece) -> Tensor:
        assert piece.observed is not None
        return piece.observed


@dataclass(frozen=True)
class Random:
    """A number in [0, 1) drawn for each weight from `seed` and its global index: a baseline, alike on all ranks."""

    seed: int = 0

    def __call__(self, piece: Piece) -> Tensor:
        drawn = scramble(scramble(piece.indices) ^ self.seed)
        return (drawn >> 8 & 0xFF_FFFF).float() / 0x100_0000


@dataclass(frozen=True)
class KeyFormat:
    """Scores as integers >= 0 in the same order.

    The bits of a non-negative float, read as an integer, sort as the float does; bfloat16 and float16
    fit into float32 exactly.

    Attributes:
        float_dtype: the float type in which all scores are compared.
        int_dtype: the integer type of the same width.
        bits: how many the keys have.
        infinite: the key of +inf; no finite score has a higher one.
    """

    float_dtype: torch.dtype
    int_dtype: torch.dtype
    bits: int
    infinite: int

    def keys(self, scores: Tensor) -> Tensor:
        """Keys of scores >= 0, of `int_dtype` and the same shape; NaNs lie above `infinite`."""
        return scores.to(self.float_dtype).view(self.int_dtype)

    def values(self, keys: Tensor) -> Tensor:
        """The scores that `keys` stand for, float64."""
        return keys.to(self.int_dtype).view(self.float_dtype).double()


@dataclass(frozen=True)
class SignedFormat(KeyFormat):
    """The same for scores of either sign. Key 0 is that of no score; what is not finite has the key `infinite`."""

    def keys(self, scores: Tensor) -> Tensor:
        scores = scores.to(self.float_dtype)
        finite = torch.where(scores.isfinite(), scores + 0.0, torch.inf)  # + 0.0, since -0.0 is 0.0
        return _mirror(finite.view(self.int_dtype)).long() + _HALF

    def values(self, keys: Tensor) -> Tensor:
        return _mirror((keys - _HALF).to(self.int_dtype)).view(self.float_dtype).double()


def _mirror(bits: Tensor) -> Tensor:
    """Turn the order of negative floats' bits round; its own inverse."""
    return bits ^ (bits >> 31 & 0x7FFF_FFFF)


_HALF = 1 << 31
SINGLE = KeyFormat(torch.float32, torch.int32, 31, 0x7F80_0000)
DOUBLE = KeyFormat(torch.float64, torch.int64, 63, 0x7FF0_0000_0000_0000)
SIGNED = SignedFormat(torch.float32, torch.int32, 32, _HALF + 0x7F80_0000)
