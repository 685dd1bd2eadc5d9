"""What selection has to give, the slow way; and the small parts that several tests share."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from distprune.pruning import Prunable
from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import Part


def prune_by_sort(weights: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> list[list[bool]]:
    """Which weights stay, row-major per tensor, when `k` are pruned, those that `masks` prune among them."""
    scores = [abs(x) for w in weights for x in w.detach().double().flatten().tolist()]
    keep = [x for m in masks for x in m.flatten().tolist()]
    from_the_end = sorted(range(len(scores)), reverse=True)
    for i in sorted(from_the_end, key=lambda i: (keep[i], scores[i]))[:k]:
        keep[i] = False
    flags = iter(keep)
    return [[next(flags) for _ in range(w.numel())] for w in weights]


class Bag(nn.Module):
    """A model that is nothing but its weights, named `tensors.0`, `tensors.1`, ...; prune it with include=["*"]."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(t) for t in tensors)


def prunable(name: str, weight: nn.Parameter, offset: int = 0, ranks: Ranks | None = None) -> Prunable:
    """A prunable tensor that every rank holds whole."""
    return Prunable(name, weight, offset, Part.of(weight, ranks or Ranks()))


@dataclass
class Levels:
    """A schedule of our own: `levels[step]` after `step` steps, the last one for ever, an update at each step."""

    levels: Sequence[float]

    @property
    def final(self) -> float:
        return self.levels[-1]

    def sparsity(self, step: int) -> float:
        return self.levels[min(step, len(self.levels) - 1)]

    def is_update(self, step: int) -> bool:
        return True
