"""What was found about the layers of a model, as files and as a table on the terminal."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from distprune.analysis.sensitivity_folder import SensitivityFolder
from distprune.training.evaluation import EvalResult

DECIMALS = 12


@dataclass(frozen=True)
class Layer:
    """What a layer of `shape` costs alone at each sparsity, the sparsity that it should get, and its zeros before."""

    shape: tuple[int, ...]
    results: dict[float, EvalResult]
    allocated: float
    zeros: int

    @property
    def weights(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Sensitivity:
    """All layers, the dense model, the sparsity over all weights, and the loss increase that each layer alone may have.

    All layers were measured at the same sparsities.
    """

    dense: EvalResult
    layers: dict[str, Layer]
    target: float
    increase: float

    @property
    def levels(self) -> list[float]:
        """The sparsities, rising."""
        return list(next(iter(self.layers.values())).results)

    @property
    def weights(self) -> int:
        """Of all layers."""
        return sum(layer.weights for layer in self.layers.values())

    def drop(self, layer: Layer, level: float) -> float:
        """Percentage points of top-1 that are lost."""
        return self.dense.top1 - layer.results[level].top1


def write_figures(found: Sensitivity, folder: SensitivityFolder) -> None:
    """Write sensitivity.json; a loss that is not finite is null."""
    layers = {
        name: {
            "shape": list(layer.shape),
            "weights": layer.weights,
            "allocated": round(layer.allocated, DECIMALS),
            "pruned": [
                {
                    "sparsity": level,
                    "zeros": max(layer.zeros, round(level * layer.weights)),
                    "loss": result.loss if math.isfinite(result.loss) else None,
                    "top1": result.top1,
                    "drop": found.drop(layer, level),
                }
                for level, result in layer.results.items()
            ],
        }
        for name, layer in found.layers.items()
    }
    dense = {"loss": found.dense.loss, "top1": found.dense.top1, "samples": found.dense.samples}
    figures = {"dense": dense, "target_sparsity": found.target, "loss_increase": found.increase, "layers": layers}
    folder.write_json(folder.figures.name, figures)


def write_allocation(found: Sensitivity, folder: SensitivityFolder, config: str) -> None:
    """Write allocation-SPARSITY.yaml for prune.allocation: layer -> sparsity."""
    head = [
        f"Sparsity of each layer, {found.target:g} over all {found.weights:,} weights, by distprune sensitivity for",
        f"{config}. Pruned alone, by magnitude and without training, each layer raises the loss by",
        f"{found.increase:.4g} (dense {found.dense.loss:.4g}, on {found.dense.samples:,} samples), or less where it",
        f"was measured no further. All figures are in {folder.figures.name}.",
    ]
    sparsities = {name: round(layer.allocated, DECIMALS) for name, layer in found.layers.items()}
    text = "".join(f"# {line}\n" for line in head) + yaml.safe_dump(sparsities, sort_keys=False, width=1000)
    folder.write_text(folder.allocation(found.target).name, text)


def shown(name: str) -> str:
    """A parameter's name, or that of its module, which says as much in less room."""
    return name.removesuffix(".weight")


def print_table(found: Sensitivity, folder: SensitivityFolder, words: Sequence[str]) -> None:
    """Print the accuracy that each layer costs, the files, and what to do next with the configuration of `words`."""
    console = Console(highlight=False)
    columns = {
        f"{level:g}": [f"{found.drop(layer, level):.2f}" for layer in found.layers.values()] for level in found.levels
    }
    columns["gets"] = [f"{layer.allocated:.4f}" for layer in found.layers.values()]
    title = f"Points of top-1 lost by each layer pruned alone; dense: {found.dense.top1:.2f} %"
    for heads in _that_fit(columns, [shown(name) for name in found.layers], console.width):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
        table.add_column("layer", overflow="fold")
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for name, *cells in zip(found.layers, *(columns[head] for head in heads), strict=True):
            table.add_row(shown(name), *cells)
        console.print(table)
        title = ""
    console.print(
        f"gets: {found.target:g} over all {found.weights:,} weights, where no layer alone raises the loss by more than "
        f"{found.increase:.4g} (dense: {found.dense.loss:.4g})"
    )
    allocation = folder.allocation(found.target)
    for path in (folder.figures, folder.heat_map, allocation):
        console.print(f"  {path}", soft_wrap=True, markup=False)
    console.print("\nNext:")
    kept = [word for word in words if not word.startswith(("run.dir=", "data.workers=", "data.eval_split="))]
    folder_of_run = f"{str(folder.path).removesuffix('-sensitivity')}-allocated"
    command = ["accelerate", "launch", "-m", "distprune.train", *kept]
    command += [f"prune.allocation={allocation}", f"run.dir={folder_of_run}"]
    console.print(f"  {shlex.join(command)}", soft_wrap=True, markup=False)


def _that_fit(columns: Mapping[str, Sequence[str]], names: Sequence[str], width: int) -> Iterator[list[str]]:
    """The heads of columns in lots that fit beside the names into so many characters."""
    edges, between = 2, 2
    room = width - min(max(map(len, ("layer", *names))), width // 2) - edges
    lot, taken = list[str](), 0
    for head, cells in columns.items():
        needed = between + max(len(head), *map(len, cells))
        if lot and taken + needed > room:
            yield lot
            lot, taken = [], 0
        lot.append(head)
        taken += needed
    yield lot
