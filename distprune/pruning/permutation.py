"""Which order of input channels keeps the most magnitude under N:M.

After Pool and Yu 2021, "Channel Permutations for N:M Sparsity" (NeurIPS): channels of two groups are exchanged as long
as that keeps more, the best exchange first; where none does any more, some are exchanged at random, and what that leads
to is taken if it is better. Which groups there are matters, and neither their order nor that within a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.pruning.patterns import NM

PIECE = 1 << 22
"""Elements that are compared at once."""
ESCAPES = 10
"""How often in a row it is tried to get out of a state from which no exchange leads to a better one."""
GAIN = 1e-7
"""The smallest gain that counts, a fraction of what is kept; smaller ones may be rounding."""


def kept(magnitudes: Tensor, pattern: NM) -> float:
    """What N:M keeps at best, summed up.

    Args:
        magnitudes: shape (rows, channels), >= 0; groups are M channels in a row.
        pattern: N:M; M divides the channels.
    """
    groups = magnitudes.view(len(magnitudes), -1, pattern.m)
    return float(groups.topk(pattern.n, 2).values.sum(dtype=torch.float64))


def find_permutation(magnitudes: Tensor, pattern: NM, escapes: int = ESCAPES, seed: int = 0) -> Tensor:
    """An order of channels (int64, 1-D) in which N:M keeps at least as much as in that given, and mostly more.

    Channel `order[i]` comes to place i. The same weights on the same machine give the same order.

    Args:
        magnitudes: see `kept`.
        pattern: see `kept`.
        escapes: how many attempts in a row to get on from the best may fail.
        seed: of what is exchanged at random.
    """
    channels = magnitudes.shape[1]
    generator = torch.Generator().manual_seed(seed)
    state = _Groups(magnitudes, pattern)
    state.climb()
    best, most, failed = state.members.clone(), state.kept, 0
    while failed < escapes and len(best) > 1:
        for _ in range(2):
            state.exchange(torch.randint(channels, (2, 1), generator=generator))
        state.climb()
        if state.kept > most * (1 + GAIN):
            best, most, failed = state.members.clone(), state.kept, 0
        else:
            state.go_back(best)
            failed += 1
    return best.sort(1).values.view(-1)


class _Groups:
    """Which channels are together, and what each exchange of two of them would add to what is kept.

    Where b comes for a, a group keeps of a row what it keeps of the others, and by how much b is above the N-th largest
    of these. That a group with b for a keeps so much does not depend on where b was, so after an exchange only what
    concerns two groups is to be found anew.

    Attributes:
        members: channels by group, int64 of shape (groups, M).
    """

    def __init__(self, magnitudes: Tensor, pattern: NM) -> None:
        self._magnitudes = magnitudes
        self._n = pattern.n
        channels = magnitudes.shape[1]
        self.members = torch.arange(channels, device=magnitudes.device).view(-1, pattern.m)
        self._group = torch.empty_like(self.members.view(-1))
        self._kept = magnitudes.new_zeros(len(self.members))
        self._with = magnitudes.new_zeros(channels, channels)
        """[a, b]: what the group of a keeps when b comes for a."""
        places = range(pattern.m)
        self._others = torch.tensor([[p for p in places if p != place] for place in places], device=magnitudes.device)
        self._look_at(torch.arange(len(self.members), device=magnitudes.device))

    @property
    def kept(self) -> float:
        """What is kept in all."""
        return float(self._kept.sum(dtype=torch.float64))

    def climb(self) -> None:
        """Exchange, the best first, until nothing is better; those at once that do not concern the same groups."""
        least = GAIN * self.kept
        for _ in range(10 * len(self._group)):
            kept = self._kept[self._group]
            gains = (self._with + self._with.T).sub_(kept).sub_(kept[:, None])
            most, partner = gains.masked_fill_(self._group[:, None] == self._group, 0).max(1)
            pairs, touched = [], set[int]()
            for first in most.argsort(descending=True, stable=True)[: int((most > least).sum())].tolist():
                second = int(partner[first])
                groups = {int(self._group[first]), int(self._group[second])}
                if not groups & touched:
                    pairs.append((first, second))
                    touched |= groups
            if not pairs:
                return
            self.exchange(torch.tensor(pairs).T)

    def exchange(self, pairs: Tensor) -> None:
        """Exchange channels, each of `pairs[0]` (int64, 1-D) with that of `pairs[1]`; no two pairs share a group."""
        first, second = pairs.to(self._group.device)
        places = [(self.members == channel).nonzero()[0] for channel in torch.cat([first, second])]
        rows, columns = torch.stack(places).T
        self.members[rows, columns] = torch.cat([second, first])
        self._look_at(rows.unique())

    def go_back(self, members: Tensor) -> None:
        """Take groups of before."""
        changed = (self.members != members).any(1).nonzero()[:, 0]
        self.members[changed] = members[changed]
        self._look_at(changed)

    def _look_at(self, groups: Tensor) -> None:
        """Find what some groups keep, and would keep."""
        members = self.members[groups]
        leaving = members.view(-1)
        self._group[leaving] = groups.repeat_interleave(members.shape[1])
        kept = self._magnitudes.new_zeros(len(groups))
        found = self._magnitudes.new_zeros(len(leaving), len(self._group))
        rows = max(1, PIECE // max(1, found.numel()))
        for piece in torch.split(self._magnitudes, rows):
            values = piece[:, members]
            kept += values.topk(self._n, 2).values.sum((0, 2))
            left = values[:, :, self._others].topk(self._n, 3).values.flatten(1, 2)
            found += left.sum((0, 2))[:, None]
            found += (piece[:, None] - left[..., -1:]).clamp_(min=0).sum(0)
        self._kept[groups], self._with[leaving] = kept, found
