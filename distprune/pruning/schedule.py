"""How sparse at which optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """What `Pruner` asks of a schedule. Steps count completed optimizer steps, from 0."""

    def sparsity(self, step: int) -> float:
        """The fraction of prunable weights that are zero once `step` steps are done, in [0, 1)."""
        ...

    def is_update(self, step: int) -> bool:
        """Whether masks are computed anew after `step` steps."""
        ...


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity rises fast at first and levels off, as a cubic (Zhu and Gupta 2017, arXiv:1710.01878).

    s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))^3 between `begin` and `end`,
    0 before, `final` after. Masks are updated at `begin`, `begin + every`, ... and always at `end`,
    also where `every` does not divide the span. `begin == end` prunes in one shot.

    Args:
        final: sparsity at `end`, a fraction in [0, 1).
        begin: optimizer step of the first update.
        end: optimizer step of the last update.
        every: optimizer steps between updates.
        initial: sparsity at `begin`, a fraction in [0, final].

    Raises:
        ValueError: a value lies outside its range; the message names it.
    """

    final: float
    begin: int
    end: int
    every: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.final < 1.0:
            raise ValueError(f"final sparsity must lie in [0, 1), got {self.final}; 0.9 prunes 90 % of the weights")
        if not 0.0 <= self.initial <= self.final:
            raise ValueError(
                f"initial sparsity must lie in [0, final={self.final}], got {self.initial}; pruned weights stay pruned"
            )
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"steps must satisfy 0 <= begin <= end, got begin={self.begin}, end={self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")

    def sparsity(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        left = 1.0 - (step - self.begin) / (self.end - self.begin)
        # Rounding must not undercut what is pruned at `begin`.
        return max(self.initial, self.final + (self.initial - self.final) * left**3)

    def is_update(self, step: int) -> bool:
        if step == self.end:
            return True
        return self.begin <= step < self.end and (step - self.begin) % self.every == 0
