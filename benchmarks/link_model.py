"""How long a training step takes between hosts: a model fitted to what `scaling.py` measured over several links.

    python benchmarks/link_model.py --weights 25.6e6 --sparsity 0.9 --nodes 4 --gbit 10 --compute-ms 300

    step = compute + max(wire * sent * 32 bits / rate,  each * sent + all * weights where pruned)
    sent = 2 (n - 1) / n * kept

`kept` are the weights that are left, of which the gradients are sent in float32 around a ring of n nodes; `compute` is
what a step takes without an exchange; `wire` says how much longer than its bits a transfer takes; `each` is what the
processor takes for each gradient sent, and `all` what packing takes for each weight there is. Buckets are packed while
others travel, so that the longer of the two counts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import RESULTS
from scipy.optimize import least_squares

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
        kept = at.weights * (1 - at.sparsity)
        around = 2 * (at.nodes - 1) / at.nodes
        bits = around * 32 * kept
        travels = self.wire * bits / at.gbit * MS_PER_GBIT
        handled = self.each * around * kept / 1e6 + (self.all * at.weights / 1e6 if at.sparsity else 0.0)
        return (self.compute if compute is None else compute) + max(travels, handled)


def fit(samples: Sequence[Sample]) -> StepTime:
    """The model that is closest in relative error, by least squares."""

    def errors_of(parameters: Sequence[float]) -> list[float]:
        model = StepTime(*parameters)
        return [model(one) / one.ms - 1 for one in samples]

    fastest = min(one.ms for one in samples)
    begin = (fastest / 2, 1.0, 1.0, fastest / samples[0].weights * 1e6 / 2)
    return StepTime(*least_squares(errors_of, begin, bounds=(0, math.inf)).x.tolist())


def samples(found: dict[str, Any]) -> list[Sample]:
    """What `scaling.py` measured, of its part `links`."""
    rates = {rate: float(rate.removesuffix("mbit")) / 1e3 if "mbit" in rate else float(rate[:-4]) for rate in found}
    return [
        Sample(2, rates[rate], float(sparsity), one["weights"], ways["packed"]["step_ms"])
        for rate, one in found.items()
        for sparsity, ways in one["sparsities"].items()
    ]


def errors(measured: Sequence[Sample]) -> list[float]:
    """The relative error at each sample of a model that was fitted to the others."""
    return [fit([other for other in measured if other is not one])(one) / one.ms - 1 for one in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, required=True, help="of the model")
    parser.add_argument("--sparsity", type=float, default=0.9, help="default: 0.9")
    parser.add_argument("--nodes", type=int, default=2, help="with one link each (default: 2)")
    parser.add_argument("--gbit", type=float, default=1.0, help="Gbit/s of a link (default: 1)")
    parser.add_argument("--compute-ms", type=float, required=True, help="of a step on one node alone")
    words = parser.parse_args()
    measured = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))["parts"]["links"]["figures"]
    model = fit(samples(measured))
    for sparsity in (0.0, words.sparsity):
        at = Sample(words.nodes, words.gbit, sparsity, words.weights)
        print(f"sparsity {sparsity:g}: {model(at, words.compute_ms):.0f} ms a step")


if __name__ == "__main__":
    main()
