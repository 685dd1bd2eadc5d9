"""Numbers that change while a teacher teaches: weight and temperature of the distillation."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from distprune.config.schema import AlphaRamp, PhaseName, TemperatureRamp
from distprune.training.phases import Span


@dataclass(frozen=True)
class Ramp:
    """Goes from `begin` at optimizer step number `first` to `end` at number `last`, evenly or along half a cosine."""

    begin: float
    end: float
    shape: Literal["linear", "cosine"]
    first: int
    last: int

    def at(self, step: int) -> float:
        """The value at optimizer step number `step` of the run, from 0."""
        part = (step - self.first) / max(self.last - self.first, 1)
        left = 1 - part if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * part))
        return self.end + (self.begin - self.end) * left


def lay_out(value: float | AlphaRamp | TemperatureRamp, first: int, last: int) -> float | Ramp:
    """A number as the configuration has it, laid out over steps if it changes."""
    if isinstance(value, (int, float)):
        return value
    return Ramp(value.begin, value.end, value.shape, first, last)


def stretch(span: Span, spans: Sequence[Span], phases: Collection[PhaseName]) -> tuple[int, int]:
    """The numbers of the first and the last step over which a ramp goes that is used in `span`.

    It is the span alone in a round of iterative pruning; else from the first to the last of the spans of `phases`,
    whatever lies between.
    """
    taught = [span] if span.attempt is not None else [s for s in spans if s.name in phases and s.attempt is None]
    return taught[0].begin, taught[-1].end - 1
