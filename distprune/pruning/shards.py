"""What part of a tensor this rank holds, and who else holds the same."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from distprune.pruning.collectives import Ranks

CHUNK = 1 << 18
INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, detached, on the same memory; all of it where it is not sharded."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


def flat(tensor: Tensor) -> Tensor:
    """All elements of a local tensor in memory order as a 1-D view, whatever the memory format."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).view(-1)


def chunks(start: int, stop: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Bounds that cut `start` to `stop` into stretches of at most `size` elements, which fit into a CPU's cache."""
    for begin in range(start, stop, size):
        yield begin, min(begin + size, stop)


@dataclass(frozen=True)
class Part:
    """A rectangular part of a tensor of shape `whole`: `shape[d]` indices of dimension d, from `start[d]` on.

    `copies` ranks hold this same part, of which this rank is number `copy`. Parts with equal `layout` are held by the
    same sets of ranks, in the same order.
    """

    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    copies: int
    copy: int
    layout: Hashable

    @staticmethod
    def of(tensor: Tensor, ranks: Ranks) -> Part:
        """The part of `tensor` on this rank.

        Raises:
            ValueError: a DTensor is placed on other ranks than `ranks`, or in a way that is not rectangular.
        """
        whole = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return Part(whole, (0,) * len(whole), whole, ranks.world_size, ranks.rank, None)
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate()
        placed = sorted(mesh.mesh.flatten().tolist())
        if coordinate is None or placed != sorted(ranks.members):
            raise ValueError(f"it is placed on ranks {placed}, but those that prune together are {ranks.members}")
        start, shape, copies, copy = [0] * len(whole), list(whole), 1, 0
        replicated = []
        for dim, (placement, place) in enumerate(zip(tensor.placements, coordinate, strict=True)):
            size = mesh.size(dim)
            if type(placement) is Replicate:
                copies, copy = copies * size, copy * size + place
                replicated.append(dim)
            elif type(placement) is Shard:
                length = -(-shape[placement.dim] // size)
                begin = min(length * place, shape[placement.dim])
                start[placement.dim] += begin
                shape[placement.dim] = min(length, shape[placement.dim] - begin)
            else:
                raise ValueError(f"placement {placement} cannot be pruned; Shard and Replicate can")
        if tuple(shape) != tuple(tensor.to_local().shape):
            raise ValueError(
                f"its local shape is {tuple(tensor.to_local().shape)}, not {tuple(shape)} as sharding gives"
            )
        return Part(whole, tuple(start), tuple(shape), copies, copy, (mesh, tuple(replicated)))

    @property
    def is_rows(self) -> bool:
        """Whether the part is whole rows: cut in the first dimension at most."""
        return self.shape[1:] == self.whole[1:]

    def indices(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """Row-major positions in the whole (int64, 1-D) of the elements of the local `tensor` from `begin` to `end` in
        memory order."""
        row_major = [math.prod(self.whole[dim + 1 :]) for dim in range(len(self.whole))]
        first = sum(start * step for start, step in zip(self.start, row_major, strict=True))
        rest = torch.arange(begin, end, device=tensor.device)
        if self.is_rows and tensor.is_contiguous():
            return rest.add_(first)
        index = torch.full_like(rest, first)
        for dim in sorted(range(tensor.dim()), key=tensor.stride):
            index += rest % tensor.shape[dim] * row_major[dim]
            rest = rest // tensor.shape[dim]
        return index
