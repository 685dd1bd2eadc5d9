"""Figures as words and cells."""

from __future__ import annotations

from distprune.report.parts import Cell, Column

SMALL_DROP = 0.1
"""Points of accuracy that are called none."""


def column(label: str) -> Column:
    """Of words."""
    return Column(label, number=False)


def text(value: object) -> Cell:
    """Words."""
    return Cell(str(value), str(value))


def number(value: float | None, form: str = ",d", unit: str = "", share: float | None = None) -> Cell:
    """A number; a dash where it is not known."""
    return Cell("-", None) if value is None else Cell(f"{value:{form}}{unit}", value, share)


def percent(value: float | None) -> Cell:
    """A percentage that is one already."""
    return number(value, ".2f", " %")


def points(value: float | None, share: float | None = None) -> Cell:
    """Percentage points."""
    return number(None if value is None else plain(value), "+.2f", "", share)


def plain(value: float) -> float:
    """Without a sign where two decimals are 0."""
    return value if round(value, 2) else 0.0


def difference(now: float | None, before: float | None) -> float | None:
    """How much more it is now, if both are known."""
    return None if now is None or before is None else now - before


def accuracy(now: float | None, dense: float | None) -> str:
    """In percent, before and after."""
    if now is None:
        return "-"
    return f"{now:.2f}\u00a0%" if dense is None else f"{dense:.2f} → {now:.2f}\u00a0%"


def many(count: float) -> str:
    """A large count in few digits."""
    for factor, unit in ((1e12, "\u00a0T"), (1e9, "\u00a0G"), (1e6, "\u00a0M")):
        if abs(count) >= factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:,.0f}"
