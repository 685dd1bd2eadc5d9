"""What a weight is worth, and scores as integers that sort alike. The lowest scores are pruned first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|, of the same shape and dtype: small weights go first (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs()


@dataclass(frozen=True)
class KeyFormat:
    """Scores of one model as integers in the same order.

    The bits of a non-negative float, read as an integer, sort as the float does; bfloat16 and float16
    fit into float32 exactly. A model with any float64 weight is compared in float64.

    Attributes:
        float_dtype: the float type in which all scores are compared.
        int_dtype: the integer type of the keys, of the same width.
        digits: widths in bits of the digits that a radix select looks at, the highest first.
        infinite: the key of +inf; NaNs lie above it.
    """

    float_dtype: torch.dtype
    int_dtype: torch.dtype
    digits: tuple[int, ...]
    infinite: int

    @staticmethod
    def of(dtypes: set[torch.dtype]) -> KeyFormat:
        """The narrowest format that holds every one of `dtypes` exactly."""
        return DOUBLE if torch.float64 in dtypes else SINGLE

    def keys(self, weight: Tensor) -> Tensor:
        """Magnitudes of `weight` as integers >= 0 of `int_dtype`, same shape."""
        return magnitude(weight.to(self.float_dtype)).view(self.int_dtype)

    def value(self, key: int) -> float:
        """The score that `key` stands for."""
        return torch.tensor(key, dtype=self.int_dtype).view(self.float_dtype).item()


SINGLE = KeyFormat(torch.float32, torch.int32, (16, 15), 0x7F80_0000)
DOUBLE = KeyFormat(torch.float64, torch.int64, (16, 16, 16, 15), 0x7FF0_0000_0000_0000)
