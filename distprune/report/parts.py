"""What a page is made of. Text in them is plain; the template escapes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from distprune.report.weights import Kernel

Spec = dict[str, Any]
"""A figure as Vega-Lite knows it (https://vega.github.io/vega-lite/docs/spec.html). Colours are CSS variables of the
page, so that one figure serves light and dark."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: what is drawn in a colour (a CSS variable, as `--c0`), dashed or not."""

    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        title: what it shows.
        finding: what is to be seen in it, in words, for those who do not see it.
        spec: the drawing.
        keys: its legend.
        note: below it.
        scale: words at both ends of a scale of shades, if it has one.
        small: whether many stand beside each other.
        wide: whether it takes all of the width.
    """

    kind: ClassVar[str] = "figure"
    title: str
    finding: str
    spec: Spec
    keys: tuple[Key, ...] = ()
    note: str = ""
    scale: tuple[str, str] | None = None
    small: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Column:
    """Of a table; numbers stand to the right."""

    label: str
    number: bool = True


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and what it is sorted by. `share` in [0, 1] shades it."""

    text: str
    value: float | str | None
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells, which readers may sort by any column. One that is not `wide` stands beside a figure."""

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[Cell, ...]]
    note: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Kernels:
    """Filters as small images."""

    kind: ClassVar[str] = "kernels"
    title: str
    finding: str
    kernels: list[Kernel]
    note: str = ""


@dataclass(frozen=True)
class Words:
    """A paragraph; `command` is what to type, `keys` the legend of what follows."""

    kind: ClassVar[str] = "words"
    text: str
    command: str = ""
    keys: tuple[Key, ...] = ()


Item = Figure | Table | Kernels | Words


@dataclass(frozen=True)
class Section:
    title: str
    items: list[Item]


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    label: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class RunPage:
    """What is said of one run."""

    name: str
    verdict: str
    tiles: list[Tile]
    sections: list[Section]
    config: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Page:
    """All of a report: what compares the runs, and each of them."""

    title: str
    comparison: list[Section] = field(default_factory=list)
    runs: list[RunPage] = field(default_factory=list)
