"""Sums of floats that are the same in any order: of integers, by which they are scaled and rounded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

BITS = 62


def factors(largest: Tensor, terms: Sequence[int]) -> list[float]:
    """Powers of two that make integers of numbers, as precise as sums below 2^62 allow.

    Args:
        largest: float64, 1-D, finite: no number is larger than this, of either sign.
        terms: for each of `largest`, how many numbers are added up at most.
    """
    exponents = largest.frexp().exponent.tolist()
    return [
        2.0 ** min(BITS - exponent - count.bit_length(), 1000) for exponent, count in zip(exponents, terms, strict=True)
    ]
