"""How many weights of each tensor may be pruned, and how a budget is shared within that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distprune.pruning.prunable import Prunable, matching


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest sparsity of a tensor, fractions in [0, 1]."""

    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max <= 1:
            raise ValueError(f"bounds must satisfy 0 <= min <= max <= 1, got min={self.min}, max={self.max}")


@dataclass(frozen=True)
class Limits:
    """For each tensor the fewest and the most weights that may be pruned."""

    lowest: tuple[int, ...]
    highest: tuple[int, ...]

    def stop_nothing(self, pruned: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether every count between what is pruned and all is within the limits."""
        return self.lowest == tuple(pruned) and self.highest == tuple(sizes)

    def clamp(self, counts: Sequence[int]) -> list[int]:
        """The nearest counts within the limits."""
        return [min(max(c, low), high) for c, low, high in zip(counts, self.lowest, self.highest, strict=True)]


def bounds_of(tensors: Sequence[Prunable], bounds: Mapping[str, Bounds]) -> list[Bounds]:
    """The bounds of each tensor; one that several patterns match keeps to all of them.

    Args:
        tensors: what is pruned.
        bounds: by pattern, see `find_prunable`.

    Raises:
        ValueError: a pattern matches nothing that is pruned, or those of one tensor contradict each other.
    """
    names = [t.name for t in tensors]
    lowest, highest = dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0)
    for pattern, bound in bounds.items():
        for name in matching([pattern], names, names):
            lowest[name], highest[name] = max(lowest[name], bound.min), min(highest[name], bound.max)
    for name in names:
        if lowest[name] > highest[name]:
            raise ValueError(f"bounds: {name} is to have at least {lowest[name]} and at most {highest[name]} sparsity")
    return [Bounds(lowest[name], highest[name]) for name in names]


def make_limits(
    tensors: Sequence[Prunable],
    bounds: Sequence[Bounds],
    min_weights: int,
    pruned: Sequence[int],
    k: int,
    final: int,
    units: Sequence[int],
) -> Limits:
    """What bounds mean for the next update.

    Least sparsities rise in proportion to `k`, and at all times so fast that they can still be met at the end.

    Args:
        tensors: what is pruned.
        bounds: of each.
        min_weights: how many weights stay of each that has more.
        pruned: how many are pruned of each; they stay pruned.
        k: how many weights are to be pruned in all.
        final: how many at the end.
        units: how many of each go at once; the most is rounded down to a multiple, and the least at the end up.

    Raises:
        ValueError: no counts within the limits add up to `k`, or at the end to `final`; the message says which stand
            against it.
    """
    sizes = [t.numel for t in tensors]
    most = [
        max(min(math.floor(b.max * n + 1e-9), n - min_weights), 0) // unit * unit
        for b, n, unit in zip(bounds, sizes, units, strict=True)
    ]
    highest = [max(high, before) for high, before in zip(most, pruned, strict=True)]
    least = [
        min(-(-math.ceil(b.min * n - 1e-9) // unit) * unit, high)
        for b, n, unit, high in zip(bounds, sizes, units, highest, strict=True)
    ]
    weights = sum(sizes)
    if sum(highest) < k:
        bounded = [math.floor(b.max * n + 1e-9) < n - min_weights for b, n in zip(bounds, sizes, strict=True)]
        tight = [t.name for t, tightly in zip(tensors, bounded, strict=True) if tightly]
        whose = f"prune.bounds of {some(tight)} and " if tight else ""
        raise ValueError(
            f"{whose}min_weights={min_weights} allow at most {sum(highest)} of {weights} weights to be pruned "
            f"(sparsity {sum(highest) / weights:.6f}), but {k} are asked for ({k / weights:.6f})"
        )
    needed = sum(max(low, before) for low, before in zip(least, pruned, strict=True))
    if needed > final:
        tight = [t.name for t, b in zip(tensors, bounds, strict=True) if b.min > 0]
        raise ValueError(
            f"the least sparsities of {some(tight)} take {needed} of {weights} weights ({needed / weights:.6f}), but "
            f"only {final} are to be pruned ({final / weights:.6f})"
        )
    return Limits(tuple(_rising(least, pruned, k, final)), tuple(highest))


def _rising(least: Sequence[int], pruned: Sequence[int], k: int, final: int) -> list[int]:
    """The fewest weights of each tensor when `k` are pruned, on the way to `least` at `final`.

    They are in proportion, as far as whole numbers allow without asking for more than `k`, or leaving more to do than
    can be done from `k` to `final`.
    """
    rises = [max(0, low * k // max(final, 1) - before) for low, before in zip(least, pruned, strict=True)]
    lacking = [max(0, low - before) for low, before in zip(least, pruned, strict=True)]
    most, fewest = k - sum(pruned), sum(lacking) - (final - k)
    while sum(rises) > most:
        rises[max(range(len(rises)), key=rises.__getitem__)] -= 1
    while sum(rises) < fewest:
        rises[max(range(len(rises)), key=lambda i: lacking[i] - rises[i])] += 1
    return [before + rise for before, rise in zip(pruned, rises, strict=True)]


def fill(k: int, sizes: Sequence[int], densities: Sequence[float], limits: Limits) -> list[int]:
    """Counts that add up to `k`, within limits, leaving of each tensor a share in proportion to `densities`.

    The factor of proportion is the same for all tensors that are not at a limit. Counts are rounded down, and what is
    then missing is pruned where most was rounded off; of equal ones the earlier first.

    Args:
        k: how many weights to prune, between the sums of the limits.
        sizes: weights of each tensor.
        densities: in proportion to these weights are left; >= 0.
        limits: of the counts.
    """

    def exact(factor: float) -> list[float]:
        free = (n * (1 - factor * d) for n, d in zip(sizes, densities, strict=True))
        return [min(max(c, low), high) for c, low, high in zip(free, limits.lowest, limits.highest, strict=True)]

    low, high = 0.0, 1.0
    while sum(exact(high)) > k and high < 1e30:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(exact(middle)) > k else (low, middle)
    shares = exact(high)
    counts = limits.clamp([math.floor(share + 1e-9) for share in shares])
    by_rest = sorted(range(len(counts)), key=lambda i: (counts[i] - shares[i], i))
    while (missing := k - sum(counts)) != 0:
        each = max(1, abs(missing) // len(counts))
        for i in by_rest if missing > 0 else reversed(by_rest):
            room = limits.highest[i] - counts[i] if missing > 0 else counts[i] - limits.lowest[i]
            taken = min(each, room, abs(k - sum(counts)))
            counts[i] += taken if missing > 0 else -taken
        assert k - sum(counts) != missing, "k lies between the sums of the limits"
    return counts


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of many names, and how many more there are, for messages."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
