"""The few calls through which ranks talk to each other while pruning."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes that prune together, or this one alone.

    Args:
        group: a process group; None takes the default group, or one process where none was initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._alone = not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.world_size = 1 if self._alone else dist.get_world_size(group)
        self.members = [0] if self._alone else dist.get_process_group_ranks(group)

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all ranks, in place; one collective, none for one rank."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self._group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest of `values` over all ranks, in place; one collective, none for one rank."""
        if self.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Stack equally shaped `values` of all ranks, shape (world_size, *values.shape). For error reports."""
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values, group=self._group)
        return torch.stack(rows)
