"""How sparse each layer should be, so that none costs more loss than another.

In the spirit of the thresholds that Han et al. 2015 (arXiv:1506.02626) set by the sensitivity of each layer: one loss
increase is allowed to every layer pruned alone, and is raised until the layers meet the budget together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

HALVINGS = 200


@dataclass(frozen=True)
class Curve:
    """What it costs to prune one layer alone.

    Args:
        weights: of the layer.
        sparsities: at which it was measured, rising, above 0 and below 1.
        increases: of the loss over that of the dense model, at each.
    """

    weights: int
    sparsities: Sequence[float]
    increases: Sequence[float]


@dataclass(frozen=True)
class Allocation:
    """A sparsity for each layer, and the loss increase that every one may reach."""

    sparsities: dict[str, float]
    increase: float


class UnreachableError(ValueError):
    """Even with every layer as sparse as was measured, the budget is not met.

    Args:
        most: the sparsity over all weights that is reached.
    """

    def __init__(self, most: float) -> None:
        super().__init__(f"at most {most:.6g} is reached")
        self.most = most


def allocate(curves: Mapping[str, Curve], sparsity: float) -> Allocation:
    """Share `sparsity`, a fraction of all weights, out to the layers at equal loss increase.

    A loss that falls as a layer gets sparser counts as one that stays. Between what was measured the increase is linear
    in the logarithm of the density. Where many shares meet the budget at the same increase, layers go equally far along
    the stretches over which theirs stays.

    Raises:
        UnreachableError: no layer is pruned further than was measured, and that is too little.
    """
    lines = {name: _line(curve) for name, curve in curves.items()}
    total = sum(curve.weights for curve in curves.values())

    def over_all(depths: Mapping[str, float]) -> float:
        return math.fsum(curves[name].weights * -math.expm1(-depth) for name, depth in depths.items()) / total

    def within(increase: float) -> dict[str, float]:
        return {name: _deepest(depths, increases, increase) for name, (depths, increases) in lines.items()}

    most = within(math.inf)
    if over_all(most) < sparsity * (1 - 1e-12):
        raise UnreachableError(over_all(most))
    low, high = 0.0, max((increases[-1] for _, increases in lines.values()), default=0.0)
    if over_all(within(low)) >= sparsity:
        below, above, high = dict.fromkeys(lines, 0.0), within(low), low
    else:
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if over_all(within(middle)) >= sparsity else (middle, high)
        below, above = within(low), within(high)
    # Nearly alike, but for layers whose increase stays the same over a stretch: these are cut together.
    begin, end = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (begin + end) / 2
        begin, end = (begin, middle) if over_all(_between(below, above, middle)) >= sparsity else (middle, end)
    return Allocation({name: -math.expm1(-depth) for name, depth in _between(below, above, end).items()}, high)


def _line(curve: Curve) -> tuple[list[float], list[float]]:
    """Depths, -log of the density, and the increases there, which do not fall; from the dense layer on."""
    depths = [-math.log1p(-sparsity) for sparsity in curve.sparsities]
    return [0.0, *depths], list(accumulate([0.0, *curve.increases], max))


def _deepest(depths: Sequence[float], increases: Sequence[float], increase: float) -> float:
    """The greatest depth at which the increase is not above `increase`, 0 or more."""
    place = bisect_right(increases, increase)
    if place == len(increases):
        return depths[-1]
    part = (increase - increases[place - 1]) / (increases[place] - increases[place - 1])
    return depths[place - 1] + part * (depths[place] - depths[place - 1])


def _between(below: Mapping[str, float], above: Mapping[str, float], part: float) -> dict[str, float]:
    return {name: below[name] + part * (above[name] - below[name]) for name in below}
