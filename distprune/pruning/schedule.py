"""How sparse at which optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Schedule(Protocol):
    """What `Pruner` asks of a schedule. Steps count completed optimizer steps, from 0.

    Attributes:
        final: the sparsity it ends with, a fraction in [0, 1).
    """

    @property
    def final(self) -> float: ...

    def sparsity(self, step: int) -> float:
        """The fraction of prunable weights that are zero once `step` steps are done, in [0, 1)."""
        ...

    def is_update(self, step: int) -> bool:
        """Whether masks are computed anew after `step` steps."""
        ...


@dataclass(frozen=True)
class GradualSchedule(ABC):
    """Sparsity rises from `initial` to `final` along a curve.

    Masks are updated at `begin`, `begin + every`, ... and always at `end`, also where `every` does not divide the span.
    Before `begin` sparsity is 0. `begin == end` prunes in one shot.

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

    @abstractmethod
    def curve(self, done: float) -> float:
        """Sparsity once a fraction `done` of the span is done, 0 < done < 1; it does not fall."""

    def sparsity(self, step: int) -> float:
        """`curve` between `begin` and `end`, 0 before and `final` after."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        if step == self.begin:
            return self.initial
        # Rounding must not undercut what is pruned at `begin`, nor overshoot what is at `end`.
        return min(max(self.initial, self.curve((step - self.begin) / (self.end - self.begin))), self.final)

    def is_update(self, step: int) -> bool:
        """At `begin`, every so many steps from there, and at `end`."""
        if step == self.end:
            return True
        return self.begin <= step < self.end and (step - self.begin) % self.every == 0


@dataclass(frozen=True)
class PolynomialSchedule(GradualSchedule):
    """final + (initial - final) (1 - x)^power, x from 0 to 1 between `begin` and `end`.

    Args:
        power: above 0; the higher it is, the more is pruned early.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power must be above 0, got {self.power}")

    def curve(self, done: float) -> float:
        """See the class."""
        return self.final + (self.initial - self.final) * math.pow(1.0 - done, self.power)


@dataclass(frozen=True)
class CubicSchedule(GradualSchedule):
    """final + (initial - final) (1 - x)^3: fast at first, then levelling off (Zhu and Gupta 2017, arXiv:1710.01878)."""

    def curve(self, done: float) -> float:
        """See the class."""
        return self.final + (self.initial - self.final) * (1.0 - done) ** 3


@dataclass(frozen=True)
class LinearSchedule(GradualSchedule):
    """initial + (final - initial) x."""

    def curve(self, done: float) -> float:
        """See the class."""
        return self.initial + (self.final - self.initial) * done


@dataclass(frozen=True)
class CosineSchedule(GradualSchedule):
    """initial + (final - initial) (1 - cos(pi x)) / 2: slow at both ends."""

    def curve(self, done: float) -> float:
        """See the class."""
        return self.initial + (self.final - self.initial) * (1.0 - math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class ExponentialSchedule(GradualSchedule):
    """1 - (1 - initial) ((1 - final) / (1 - initial))^x: each update prunes the same share of what is left."""

    def curve(self, done: float) -> float:
        """See the class."""
        return 1.0 - (1.0 - self.initial) * math.pow((1.0 - self.final) / (1.0 - self.initial), done)


@dataclass(frozen=True)
class OneShotSchedule:
    """All at once, after `at` steps.

    Args:
        final: a fraction in [0, 1).
        at: optimizer step of the only update.

    Raises:
        ValueError: a value lies outside its range; the message names it.
    """

    final: float
    at: int = 0

    def __post_init__(self) -> None:
        CubicSchedule(self.final, self.at, self.at)  # checks both

    def sparsity(self, step: int) -> float:
        """`final` from `at` on."""
        return self.final if step >= self.at else 0.0

    def is_update(self, step: int) -> bool:
        """At `at`."""
        return step == self.at
