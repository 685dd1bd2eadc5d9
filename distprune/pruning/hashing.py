"""Integers scrambled: the same on every rank and device."""

from __future__ import annotations

from torch import Tensor


def scramble(x: Tensor) -> Tensor:
    """Scramble int64 counters (finaliser of SplitMix64, Steele et al. 2014, with arithmetic shifts)."""
    x = (x + 1) * -0x61C8_8646_80B5_83EB
    x = (x ^ (x >> 30)) * -0x40A7_B892_E31B_1A47
    x = (x ^ (x >> 27)) * -0x6B2F_B644_ECCE_EE15
    return x ^ (x >> 31)
