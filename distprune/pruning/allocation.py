"""How the budget of zeros is shared by the tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distprune.pruning.joint import ByLamp, ByScore, share_jointly
from distprune.pruning.limits import Limits, fill, some
from distprune.pruning.prunable import Prunable, matching
from distprune.pruning.threshold import Search, Threshold

TABLE_TOLERANCE = 0.005


class Allocation(ABC):
    """Decides how much of each tensor is pruned."""

    def check(self, tensors: Sequence[Prunable], final: float) -> None:  # noqa: B027
        """Refuse tensors that it has no answer for, before anything is pruned; here none.

        Args:
            tensors: what is pruned.
            final: the sparsity that the schedule ends with.

        Raises:
            ValueError: says what is missing or does not fit.
        """

    @abstractmethod
    def thresholds(self, search: Search, k: int, limits: Limits) -> list[Threshold]:
        """Where to cut each tensor so that `k` weights are pruned in all; called on all ranks.

        Args:
            search: finds thresholds among the weights as they are.
            k: weights to prune, those pruned already among them.
            limits: how many of each tensor may be; `k` lies between their sums.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """


@dataclass(frozen=True)
class GlobalAllocation(Allocation):
    """One threshold for all tensors: the lowest scores of the model go, wherever they are.

    Where that would prune more or less of a tensor than its limits allow, it is held there, and the others make up for
    that: no weight that stays and could go scores below one that went and could have stayed.
    """

    def thresholds(self, search: Search, k: int, limits: Limits) -> list[Threshold]:
        threshold = search.together(k)
        if limits.stop_nothing(search.pruned, [tensor.numel for tensor in search.tensors]):
            return [threshold] * len(search.tensors)
        if search.obeys(threshold, limits):
            return [threshold] * len(search.tensors)
        return search.each(share_jointly(search, k, limits, ByScore()))


@dataclass(frozen=True)
class LampAllocation(Allocation):
    """Magnitudes scaled for each tensor by LAMP's rule compete with each other (Lee et al. 2021, arXiv:2010.07611).

    Within a tensor the smallest go first; how much of it, LAMP's score decides: w^2 over the sum of squares of the
    weights of the tensor that are not smaller. It takes the score `magnitude`.
    """

    def thresholds(self, search: Search, k: int, limits: Limits) -> list[Threshold]:
        return search.each(share_jointly(search, k, limits, ByLamp(search.format)))


class _ByDensity(Allocation):
    """Of each tensor a share is left in proportion to its density; which weights, their scores decide."""

    @abstractmethod
    def densities(self, tensors: Sequence[Prunable]) -> list[float]:
        """What is left of each tensor is in proportion to this, as far as limits allow."""

    def thresholds(self, search: Search, k: int, limits: Limits) -> list[Threshold]:
        sizes = [tensor.numel for tensor in search.tensors]
        return search.each(fill(k, sizes, self.densities(search.tensors), limits))


@dataclass(frozen=True)
class UniformAllocation(_ByDensity):
    """Every tensor has the same sparsity."""

    def densities(self, tensors: Sequence[Prunable]) -> list[float]:
        """1 for each."""
        return [1.0] * len(tensors)


@dataclass(frozen=True)
class ErdosRenyiKernel(_ByDensity):
    """Densities in proportion to the sum of a tensor's dimensions over their product (Evci et al. 2020,
    arXiv:1911.11134).

    A tensor whose share would be more than all of it is left dense, and the others are pruned further to make up for
    that.
    """

    def densities(self, tensors: Sequence[Prunable]) -> list[float]:
        """(n_in + n_out + height + width) / (n_in n_out height width), for linear weights without height and width."""
        return [sum(t.weight.shape) / t.numel if t.numel else 0.0 for t in tensors]


@dataclass(frozen=True)
class TableAllocation(_ByDensity):
    """Every tensor has a final sparsity of its own.

    While sparsity rises, what is left of the tensors is in proportion to what will be left at the end.

    Args:
        sparsities: by pattern (see `find_prunable`), fractions in [0, 1]; the first pattern that matches counts.
    """

    sparsities: Mapping[str, float]

    def __post_init__(self) -> None:
        for pattern, sparsity in self.sparsities.items():
            if not 0 <= sparsity <= 1:
                raise ValueError(f"allocation: the sparsity of {pattern} must lie in [0, 1], got {sparsity}")

    def check(self, tensors: Sequence[Prunable], final: float) -> None:
        """Refuse a table without a figure for a tensor, or whose figures come to another sparsity than `final`."""
        weights = sum(t.numel for t in tensors)
        left = sum(t.numel * density for t, density in zip(tensors, self.densities(tensors), strict=True))
        if abs((total := 1 - left / weights) - final) > TABLE_TOLERANCE:
            raise ValueError(
                f"allocation: the figures of the table come to a sparsity of {total:.4f} of all weights, but "
                f"{final:.4f} is asked for; they may differ by half a point"
            )

    def densities(self, tensors: Sequence[Prunable]) -> list[float]:
        """1 - sparsity, of the first pattern that matches."""
        names = [t.name for t in tensors]
        found: dict[str, float] = {}
        for pattern, sparsity in self.sparsities.items():
            for name in matching([pattern], names, names):
                found.setdefault(name, 1 - sparsity)
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"allocation: the table has no figure for {some(missing)}; give one, such as '*': 0.9, or exclude them"
            )
        return [found[name] for name in names]
