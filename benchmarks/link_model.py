"""How long a training step takes between hosts: a model fitted to what `scaling.py` measured over several links.

    python benchmarks/link_model.py --weights 25.6e6 --sparsity 0.9 --nodes 4 --gbit 10 --compute-ms 300

    step = compute + wire * 2 (n - 1) / n * 32 bits * kept / rate + each * kept + all * weights, the last where pruned

`kept` are the weights that are left, of which the gradients are sent in float32 around a ring of n nodes; `compute` is
what a step takes without an exchange; `wire` says how much longer than its bits a transfer takes; `each` is what gloo
and unpacking take for each gradient sent, and `all` what packing takes for each weight there is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import RESULTS

MS_PER_GBIT = 1e3 / 1e9


@dataclass(frozen=True)
class Sample:
    """One measured step: nodes, rate in Gbit/s, sparsity, weights, and milliseconds."""

    nodes: int
    gbit: float
    sparsity: float
    weights: float
    ms: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """The model. Milliseconds; `each` and `all` for a million."""

    compute: float
    wire: float
    each: float
    all: float

    def __call__(self, at: Sample, compute: float | None = None) -> float:
        """Milliseconds of a step; `compute` is another model's, or another machine's."""
        _, *factors = _row(at)
        measured = self.wire, self.each, self.all
        return (self.compute if compute is None else compute) + sum(
            a * b for a, b in zip(factors, measured, strict=True)
        )


def _row(at: Sample) -> list[float]:
    kept = at.weights * (1 - at.sparsity)
    bits = 2 * (at.nodes - 1) / at.nodes * 32 * kept
    return [1.0, bits / at.gbit * MS_PER_GBIT, kept / 1e6, at.weights / 1e6 if at.sparsity else 0.0]


def fit(samples: Sequence[Sample]) -> StepTime:
    """The model that is closest in relative error, by least squares."""
    rows = torch.tensor([_row(one) for one in samples], dtype=torch.float64)
    ms = torch.tensor([one.ms for one in samples], dtype=torch.float64)
    found = torch.linalg.lstsq(rows / ms[:, None], torch.ones(len(ms), 1, dtype=torch.float64)).solution
    return StepTime(*found[:, 0].tolist())


def samples(found: dict[str, Any]) -> list[Sample]:
    """What `scaling.py` measured, of its part `links`."""
    rates = {rate: float(rate.removesuffix("mbit")) / 1e3 if "mbit" in rate else float(rate[:-4]) for rate in found}
    return [
        Sample(2, rates[rate], float(sparsity), one["weights"], ways["packed"]["step_ms"])
        for rate, one in found.items()
        for sparsity, ways in one["sparsities"].items()
    ]


def errors(measured: Sequence[Sample]) -> dict[float, float]:
    """For each rate the largest relative error, by a model that was fitted to the others alone."""
    found = {}
    for rate in sorted({one.gbit for one in measured}):
        model = fit([one for one in measured if one.gbit != rate])
        found[rate] = max(abs(model(one) / one.ms - 1) for one in measured if one.gbit == rate)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, required=True, help="of the model")
    parser.add_argument("--sparsity", type=float, default=0.9, help="default: 0.9")
    parser.add_argument("--nodes", type=int, default=2, help="with one link each (default: 2)")
    parser.add_argument("--gbit", type=float, default=1.0, help="Gbit/s of a link (default: 1)")
    parser.add_argument("--compute-ms", type=float, required=True, help="of a step on one node alone")
    words = parser.parse_args()
    measured = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))["parts"]["links"]
    model = fit(samples(measured))
    for sparsity in (0.0, words.sparsity):
        at = Sample(words.nodes, words.gbit, sparsity, words.weights)
        print(f"sparsity {sparsity:g}: {model(at, words.compute_ms):.0f} ms a step")


if __name__ == "__main__":
    main()
