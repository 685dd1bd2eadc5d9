"""`distprune report`: the page, from what was gathered to the file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from distprune import __version__
from distprune.errors import ConfigError
from distprune.report.bundle import vega
from distprune.report.compare import comparison
from distprune.report.gather import Run, gather
from distprune.report.parts import Figure, Item, Page
from distprune.report.sections import run_page
from distprune.training.folder import Folder

NAME = "report.html"


class _Out(Folder):
    key: ClassVar[str] = "--out"


def write_report(paths: Sequence[str], out: str | None = None) -> Path:
    """Write the report of one run or several.

    Args:
        paths: run folders.
        out: the file; if None, report.html in the folder of a single run, else in the current folder.

    Returns:
        the file.

    Raises:
        ConfigError: a folder holds no run that is done, or the file cannot be written.
    """
    target = Path(out).expanduser() if out else (Path(paths[0]) if len(paths) == 1 else Path()) / NAME
    if target.is_dir():
        raise ConfigError(f"--out: {target} is a folder; name a file, such as {target / NAME}")
    folder = _Out(target.parent)
    runs = gather(paths)
    if (fault := folder.unwritable()) is not None:
        raise ConfigError(fault)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_text(target.name, render(page(runs)))
    return target


def print_report(paths: Sequence[str], out: str | None = None) -> None:
    """Write a report and print where it is.

    Raises:
        ConfigError: as `write_report`.
    """
    print(write_report(paths, out))


def page(runs: list[Run]) -> Page:
    """All that is shown of some runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return Page(title, comparison(runs) if len(runs) > 1 else [], [run_page(run) for run in runs])


def render(content: Page) -> str:
    """The page as HTML that needs nothing else."""
    environment = Environment(
        loader=PackageLoader("distprune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    here = files("distprune.report")
    return environment.get_template("page.html.jinja").render(
        page=content,
        lots=_lots,
        version=__version__,
        css=here.joinpath("page.css").read_text(encoding="utf-8"),
        js=here.joinpath("page.js").read_text(encoding="utf-8"),
        vega=vega(),
    )


def _lots(items: Sequence[Item]) -> list[tuple[bool, list[Any]]]:
    """Items, small figures that follow each other together."""
    return [(small, list(lot)) for small, lot in groupby(items, lambda item: isinstance(item, Figure) and item.small)]
