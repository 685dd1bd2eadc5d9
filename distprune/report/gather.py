"""What a report shows of a run, read from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from distprune.config import dump_config
from distprune.config.schema import Data
from distprune.errors import ConfigError
from distprune.report.weights import Histogram, Kernel, counted_histograms, first_kernels, logged_histograms
from distprune.training.finished import FinishedRun

Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Run:
    """A run that is done. Figures that are not finite are None.

    Attributes:
        name: by which it is told from others on the page.
        path: its folder.
        config: as the run had it, and `config_text` as YAML.
        summary: figures of the end.
        rows: figures by step, in order.
        analysis: of `distprune analyze`; None where that has not been run.
        validation: of `distprune validate`; None where that has not been run.
        exports: by format: bytes on disk, and what its figures.json says.
        histograms: by layer, of the weights before and after.
        kernels: of the first convolution; none where there is no convolution, or no dense model.
        bytes_on_disk: of the weights, by form.
    """

    name: str
    path: Path
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    analysis: dict[str, Any] | None
    validation: dict[str, Any] | None
    exports: dict[str, tuple[int, dict[str, Any]]]
    histograms: dict[str, Histogram]
    kernels: list[Kernel]
    bytes_on_disk: dict[str, int]

    def points(self, figure: str) -> Points:
        """Step and value wherever `figure` was logged."""
        return [(row["trainer/step"], row[figure]) for row in self.rows if figure in row]

    def held(self, figure: str, final: float | None) -> Points:
        """The same for a figure that is logged when it changes, and is `final` to the end."""
        found = self.points(figure)
        return [*found, (self.end, final)] if found else []

    def figures(self, prefix: str) -> list[str]:
        """Names of the logged figures that begin so, in the order they came up."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix)))

    @property
    def has_channels(self) -> bool:
        """Whether whole channels were pruned."""
        return "prune/budget" in self.summary

    @property
    def end(self) -> float:
        """The last step that was logged."""
        return float(max((row["trainer/step"] for row in self.rows), default=1))

    @property
    def pruning(self) -> tuple[float, float] | None:
        """The steps of the first and of the last update that pruned something."""
        steps = [row["trainer/step"] for row in self.rows if row.get("prune/newly_pruned")]
        return (steps[0], steps[-1]) if steps else None


def gather(paths: Sequence[str]) -> list[Run]:
    """Read run folders.

    Raises:
        ConfigError: one is no run folder, its run is not done, or a file in it cannot be read.
    """
    found = [FinishedRun(path) for path in paths]
    for run in found:
        if run.folder.summary() is None:
            state = (run.folder.status() or {}).get("state", "unknown")
            raise ConfigError(f"{run.folder.path} has no summary.json (its run is {state}); run it to its end first")
    return [_read(run, name) for run, name in zip(found, _names([run.folder.path for run in found]), strict=True)]


def _read(run: FinishedRun, name: str) -> Run:
    folder = run.folder
    summary = finite(run.summary)
    layers = list(summary["prune/layers"])
    try:
        histograms = logged_histograms(folder.histograms)
        if not histograms and folder.dense.exists():
            histograms = counted_histograms(folder.dense, folder.model, layers)
        kernels = _kernels(run, layers)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"the weights or histograms of {folder.path} cannot be read: {error}") from None
    return Run(
        name=name,
        path=folder.path,
        config=run.config.model_dump(mode="json"),
        config_text=dump_config(run.config),
        summary=summary,
        rows=finite(run.rows),
        analysis=_optional(folder.path / "analysis.json"),
        validation=_optional(folder.path / "validation.json"),
        exports=_exports(folder.path / "export"),
        histograms=histograms,
        kernels=kernels,
        bytes_on_disk={
            form: file.stat().st_size
            for form, file in (("dense", folder.dense), ("pruned", folder.model))
            if file.exists()
        },
    )


def _kernels(run: FinishedRun, layers: list[str]) -> list[Kernel]:
    data = run.config.data
    if not isinstance(data, Data) or not run.folder.dense.exists():
        return []
    return first_kernels(run.folder.dense, run.folder.model, layers, len(data.mean))


def finite(value: Any) -> Any:
    """JSON values with None for what is NaN or infinite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _optional(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; delete it, or have it written again") from None
    content: dict[str, Any] = finite(found)
    return content


def _exports(folder: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    found = {}
    for figures in sorted(folder.glob("[!.]*/figures.json")):  # one that begins with a dot is not whole
        told = _optional(figures) or {}
        found[figures.parent.name] = (told.get("bytes", 0), told)
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of folders, or as much of their paths as it takes to tell them apart."""
    whole = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]).replace("//", "/") for parts in whole]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("report: the same run folder is named twice; name each once")
