"""What reordering channels before 2:4 is worth: magnitude that is kept, in results/permutation.json and .md.

    python benchmarks/permutation.py [--weights FOLDER]

Of small matrices, next to the best of all ways to group their columns; of ResNet-50 with weights drawn in several ways;
and of trained CIFAR ResNets, where FOLDER holds their files (resnet20-*.th and so on).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import RESULTS, commit, machine, write
from torch import Tensor, nn

from distprune.models import build_model, load_weights
from distprune.pruning import NM, permute_channels
from distprune.pruning.permutation import find_permutation, kept

PATTERN = NM(2, 4)
SMALL = ((4, 8), (6, 12), (16, 12))
DRAWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="where resnet20-*.th, resnet32-*.th and resnet56-*.th lie")
    words = parser.parse_args()
    torch.manual_seed(0)
    small = [against_the_best(*shape) for shape in SMALL]
    models = [of_model(f"ResNet-50, {how}", drawn(draw), 64) for how, draw in WAYS.items()]
    for file in sorted(words.weights.glob("resnet*.th")) if words.weights else ():
        name = file.name.partition("-")[0]
        model = build_model(name, {}, 10)
        load_weights(model, str(file))
        models.append(of_model(f"{name}, trained on CIFAR-10", model, 32))
    result = {"pattern": "2:4", "small": small, "models": models, "machine": machine(), "commit": commit()}
    print(write("permutation", {**result, "versions": {"torch": torch.__version__}}))
    (RESULTS / "permutation.md").write_text(table(small, models), encoding="utf-8")


def against_the_best(rows: int, columns: int) -> dict[str, Any]:
    """Kept of normal weights, by the search and by the best of all partitions."""
    ratios, before = [], []
    for seed in range(DRAWS):
        magnitudes = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).abs()
        best = best_kept(magnitudes)
        order = find_permutation(magnitudes, PATTERN)
        ratios.append(kept(magnitudes[:, order], PATTERN) / best)
        before.append(kept(magnitudes, PATTERN) / best)
    return {
        "shape": [rows, columns], "draws": DRAWS, "unpermuted": sum(before) / DRAWS,
        "mean": sum(ratios) / DRAWS, "lowest": min(ratios),
    }  # fmt: skip


def best_kept(magnitudes: Tensor) -> float:
    """What 2:4 keeps with the best partition of the columns into groups."""
    columns = range(magnitudes.shape[1])
    of = {group: kept(magnitudes[:, group], PATTERN) for group in itertools.combinations(columns, PATTERN.m)}

    def best(left: tuple[int, ...]) -> float:
        if not left:
            return 0.0
        groups = ((left[0], *others) for others in itertools.combinations(left[1:], PATTERN.m - 1))
        return max(of[group] + best(tuple(c for c in left if c not in group)) for group in groups)

    return best(tuple(columns))


def scaled(weight: Tensor) -> Tensor:
    """Normal, with a scale for each input channel, log-normal with sigma 0.5."""
    scales = torch.randn(weight.shape[1]).mul(0.5).exp()
    return torch.randn_like(weight) * scales.view(1, -1, *[1] * (weight.dim() - 2))


def heavy(weight: Tensor) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return torch.distributions.StudentT(3.0).sample(weight.shape)


WAYS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "as torchvision draws it": None,
    "input channels of different scales": scaled,
    "heavy tails": heavy,
}


def drawn(draw: Callable[[Tensor], Tensor] | None) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50()
    with torch.no_grad():
        for module in model.modules():
            if draw is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = draw(module.weight)
                module.weight.copy_(weight / weight.square().sum() ** 0.5 * module.weight.square().sum() ** 0.5)
    return model


def of_model(name: str, model: nn.Module, size: int) -> dict[str, Any]:
    inputs = torch.randn(2, 3, size, size)
    model.eval()
    with torch.no_grad():
        before = model(inputs)
        began = time.perf_counter()
        found = permute_channels(model, PATTERN, (inputs,))
        seconds = time.perf_counter() - began
        change = float((model(inputs) - before).abs().max() / before.abs().max())
    print(f"{name}: {found.before:.4f} -> {found.after:.4f} in {seconds:.0f} s", flush=True)
    return {
        "name": name, "unpermuted": found.before, "permuted": found.after, "chains": len(found.found),
        "left_out": found.left_out, "change": change, "seconds": round(seconds, 1),
    }  # fmt: skip


def table(small: list[dict[str, Any]], models: list[dict[str, Any]]) -> str:
    lines = [
        "# Channels reordered before 2:4",
        "",
        f"Made by `python benchmarks/permutation.py --weights FOLDER` ({commit()}), on one CPU thread.",
        "",
        "Kept is the share of all magnitude of weights that fit 2:4; lost is what pruning takes.",
        "",
        "| model | kept | kept, reordered | less lost | chains | weights left | outputs change by | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in models:
        less = 1 - (1 - m["permuted"]) / (1 - m["unpermuted"])
        lines.append(
            f"| {m['name']} | {m['unpermuted']:.4f} | {m['permuted']:.4f} | {less:.1%} | {m['chains']} | "
            f"{len(m['left_out'])} | {m['change']:.0e} | {m['seconds']:.0f} |"
        )
    lines += [
        "",
        f"Of what the best grouping of columns keeps, over {DRAWS} draws of normal weights:",
        "",
        "| matrix | unpermuted | search, mean | search, lowest |",
        "|---|---|---|---|",
    ]
    for s in small:
        rows, columns = s["shape"]
        lines.append(f"| {rows} x {columns} | {s['unpermuted']:.4f} | {s['mean']:.4f} | {s['lowest']:.4f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
