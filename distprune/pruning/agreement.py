"""Do ranks that hold the same part of a tensor hold the same bits? Found out from fingerprints, without gathering."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import INT_OF_SIZE, Part, chunks, flat, local


class MaskMismatchError(RuntimeError):
    """Masks are not what ranks have agreed on. Raised on every rank; the message names rank, tensor and step."""


class WeightMismatchError(RuntimeError):
    """Replicas hold different weights. Raised on every rank; the message names tensor, step and, of more than two
    replicas, the rank."""


class Copies:
    """The parts of some tensors that this rank holds; other ranks may hold copies of the same.

    Args:
        names: of the tensors, the same on every rank.
        parts: what this rank holds of each.
        ranks: who holds the rest, and the copies.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[Part], ranks: Ranks) -> None:
        self._names = names
        self._parts = parts
        self._ranks = ranks

    def first(self, values: Tensor) -> Tensor:
        """`values` (one a tensor) where this rank holds the first copy, else 0: summed, each part counts once."""
        return values * torch.tensor([part.copy == 0 for part in self._parts], device=values.device)

    def add_up(self, prints: Tensor, *counts: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
        """Sum fingerprints over parts and `counts` over ranks; one collective.

        Args:
            prints: int64, one fingerprint for each tensor; of its parts they add up to that of the whole.
            counts: int64, one for each tensor, added up over ranks as they are.

        Returns:
            The fingerprints of whole tensors, the summed counts, and for which tensors copies differ.
        """
        summed = self._ranks.sum(torch.stack([prints, self.first(prints), *counts]))
        copies = torch.tensor([part.copies for part in self._parts], device=prints.device)
        # Where all copies agree, their sum (modulo 2^64) is that of the first copies times their number.
        return summed[1], summed[2:], (summed[0] != summed[1] * copies).tolist()

    def who_differs(self, prints: Tensor, differs: list[bool]) -> str:
        """Name the ranks that do not hold what most with the same part hold; called on all ranks."""
        starts = [hash(part.start + part.shape) for part in self._parts]
        table = self._ranks.gather(torch.stack([prints, torch.tensor(starts, device=prints.device)])).tolist()
        found = []
        for column, name in enumerate(self._names):
            votes = Counter((row[1][column], row[0][column]) for row in table)
            for rank, row in enumerate(table):
                own = (row[1][column], row[0][column])
                most = max(count for (start, _), count in votes.items() if start == own[0])
                if differs[column] and votes[own] < most:
                    found.append(f"rank {rank}: {name}")
        names = [name for name, differ in zip(self._names, differs, strict=True) if differ]
        return ", ".join(found) or f"{', '.join(names)}, with no majority"

    def whose(self, flags: Tensor) -> str:
        """Name the ranks and tensors whose flag is not 0; called on all ranks."""
        table = self._ranks.gather(flags).tolist()
        return ", ".join(
            f"rank {rank}: {name}"
            for rank, row in enumerate(table)
            for name, flag in zip(self._names, row, strict=True)
            if flag
        )


def compare_replicas(tensors: Mapping[str, Tensor], step: int, group: dist.ProcessGroup | None = None) -> bool:
    """Compare the bits of `tensors` between the ranks that hold the same part of them; called on all ranks.

    One collective, two integers for each tensor.

    Args:
        tensors: by name, plain (every rank holds all of them) or DTensors.
        step: for the message.
        group: whose ranks; None takes the default group.

    Returns:
        Whether there was anything to compare: of shards without replicas there is nothing.

    Raises:
        WeightMismatchError: they differ.
    """
    ranks = Ranks(group)
    parts = [Part.of(tensor, ranks) for tensor in tensors.values()]
    copies = Copies(list(tensors), parts, ranks)
    prints = torch.stack([_fingerprint(local(tensor)) for tensor in tensors.values()])
    _, _, differs = copies.add_up(prints)
    if any(differs):
        raise WeightMismatchError(f"weights differ between ranks at step {step}: {copies.who_differs(prints, differs)}")
    return any(part.copies > 1 for part in parts)


def _fingerprint(tensor: Tensor) -> Tensor:
    """An int64 scalar that depends on every bit of a local tensor and on where it is in memory."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    memory = flat(tensor).view(INT_OF_SIZE[tensor.element_size()])
    for begin, end in chunks(0, len(memory)):
        total += (memory[begin:end].long() * torch.arange(2 * begin + 1, 2 * end, 2, device=tensor.device)).sum()
    return total
