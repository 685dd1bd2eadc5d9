"""docs/benchmarks.md from benchmarks/results: what was measured, beside what was asked.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Scripts in `benchmarks/` put distprune and what else does the job side by side, in turns, in one run on one machine, and
write `benchmarks/results/*.json`; this page is made of those by `benchmarks/page.py`. Times say little about another
machine; ratios, medians of those within a round, say more.
"""


def main() -> None:
    parts = [HEAD, update(read("update")), gradients(read("gradients"))]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(PAGE)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    place = f"{machine['processor']}, {machine['cores']} cores{threads}"
    return f"{place}; torch {found['torch']}; commit {found['commit']}"


def update(found: dict[str, Any]) -> str:
    """An update of the masks."""
    lines = [
        "## An update of the masks\n",
        "`python benchmarks/update.py`: scores, the exact global threshold, masks, weights and one momentum buffer "
        "zeroed, masks counted\nand fingerprinted, by `Pruner.step()` in the last half of a cubic schedule to 90 %; "
        "the same sparsity by\n`torch.nn.utils.prune.global_unstructured`, and by concatenation and `kthvalue` written "
        "by hand.\n",
        f"{where(found)}.\n",
        "| model | form | ms | bytes a weight, beside masks | update is faster by |",
        "|---|---|---|---|---|",
    ]
    for name, model in found["models"].items():
        for form, one in model["forms"].items():
            ratio = model["ratios"][form]
            told = f"{ratio['median']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})"
            told = {"update": f"takes {told} reads", "read (sum)": ""}.get(form, told)
            lines.append(f"| {name} | {form} | {one['median_ms']:.1f} | {one['bytes_per_weight']:.2f} | {told} |")
    return "\n".join(lines) + "\n"


def gradients(found: dict[str, Any]) -> str:
    """What travels between ranks."""
    lines = [
        "## Gradients between two hosts\n",
        f"`python benchmarks/gradients.py`: two network namespaces with a link of {found['rate']}, a model of "
        f"{found['weights']:,} weights,\n{found['batch']} samples a rank. `ddp` is DistributedDataParallel by itself, "
        "the others are `GradientSync` ([pruning](pruning.md)). Bytes are\nthe link's.\n",
        f"{where(found)}.\n",
        "| sparsity | way | MB a step | step, ms | faster by | exchange, ms | faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for sparsity, ways in found["sparsities"].items():
        for way, one in ways.items():
            exchange = f"{one['exchange_ms']:.0f} | {one['exchange_ratio']:.2f}" if "exchange_ms" in one else "|"
            step = f"{one['step_ms']:.0f} | {one['step_ratio']:.2f}"
            lines.append(f"| {sparsity} | {way} | {one['mbytes']:.1f} | {step} | {exchange} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
