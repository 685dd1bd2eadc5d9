"""What part of a tensor this rank holds, and who else holds the same."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from distprune.pruning.collectives import Ranks

CHUNK = 1 << 18
"""Elements that are looked at at once on a CPU: what is made of them stays in its cache."""
ON_GPU = 1 << 21
"""The same on a GPU, to which each look is a few calls."""
INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, detached, on the same memory; all of it where it is not sharded."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


def flat(tensor: Tensor) -> Tensor:
    """All elements of a local tensor in memory order as a 1-D view, whatever the memory format."""
    by_stride = () if tensor.is_contiguous() else sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    memory = (tensor.permute(by_stride) if by_stride else tensor).view(-1)
    # Where there is no next element any stride may be left, with which it could not be viewed as another type.
    return memory if len(memory) > 1 else memory.as_strided(memory.shape, (1,))


def chunks(start: int, stop: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Bounds that cut `start` to `stop` into stretches of at most `size` elements."""
    for begin in range(start, stop, size):
        yield begin, min(begin + size, stop)


def at_once(device: torch.device) -> int:
    """How many elements are looked at at once on a device."""
    return CHUNK if device.type == "cpu" else ON_GPU


@dataclass(frozen=True)
class Part:
    """A rectangular part of a tensor of shape `whole`: `shape[d]` indices of dimension d, from `start[d]` on.

    `copies` ranks hold this same part, of which this rank is number `copy`. Parts with equal `layout` are held by the
    same sets of ranks, in the same order. `splits` says how the whole was cut: (dimension, into how many), in order.
    """

    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    copies: int
    copy: int
    layout: Hashable
    splits: tuple[tuple[int, int], ...] = ()

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
        replicated, splits = [], []
        for dim, (placement, place) in enumerate(zip(tensor.placements, coordinate, strict=True)):
            size = mesh.size(dim)
            if type(placement) is Replicate:
                copies, copy = copies * size, copy * size + place
                replicated.append(dim)
            elif type(placement) is Shard:
                cut = placement.dim
                start[cut], shape[cut] = _stretch(start[cut], shape[cut], size, place)
                splits.append((cut, size))
            else:
                raise ValueError(f"placement {placement} cannot be pruned; Shard and Replicate can")
        if tuple(shape) != tuple(tensor.to_local().shape):
            raise ValueError(
                f"its local shape is {tuple(tensor.to_local().shape)}, not {tuple(shape)} as sharding gives"
            )
        return Part(whole, tuple(start), tuple(shape), copies, copy, (mesh, tuple(replicated)), tuple(splits))

    @property
    def is_rows(self) -> bool:
        """Whether the part is whole rows: cut in the first dimension at most."""
        return self.shape[1:] == self.whole[1:]

    def cuts(self, dim: int) -> list[int]:
        """Between which indices of dimension `dim` parts of any rank end: each the first of the part behind."""
        stretches = [(0, self.whole[dim])]
        for cut, size in self.splits:
            if cut == dim:
                stretches = [_stretch(*stretch, size, place) for stretch in stretches for place in range(size)]
        return sorted({start for start, length in stretches if start and length})

    def indices(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """Row-major positions in the whole (int64, 1-D) of the elements of the local `tensor` from `begin` to `end` in
        memory order."""
        return self.indices_at(tensor, torch.arange(begin, end, device=tensor.device))

    def indices_at(self, tensor: Tensor, places: Tensor) -> Tensor:
        """The same of its elements at `places` (int64, 1-D, overwritten) in memory order."""
        row_major = [math.prod(self.whole[dim + 1 :]) for dim in range(len(self.whole))]
        first = sum(start * step for start, step in zip(self.start, row_major, strict=True))
        rest = places
        if self.is_rows and tensor.is_contiguous():
            return rest.add_(first)
        index = torch.full_like(rest, first)
        for dim in sorted(range(tensor.dim()), key=tensor.stride):
            index += (rest % tensor.shape[dim]).mul_(row_major[dim])
            rest.floor_divide_(tensor.shape[dim])
        return index


def sum_at(
    values: Tensor, start: Sequence[int], wanted: Sequence[Sequence[int]], part: Part, ranks: Ranks
) -> tuple[Tensor, tuple[slice, ...]]:
    """Add up over all ranks what they hold at some places, each part counted once. One collective, of these alone.

    Args:
        values: this rank's rectangle of something.
        start: where that begins, in each dimension.
        wanted: of each dimension some indices, ascending; the places are all their combinations.
        part: of which it belongs to; ranks that hold the same have the same values.
        ranks: who adds up.

    Returns:
        The sums, of shape [len(w) for w in wanted], the same on every rank; and where in them this rank's places are.
    """
    sums = values.new_zeros([len(indices) for indices in wanted])
    mine = values
    spans = []
    for dim, (indices, first, length) in enumerate(zip(wanted, start, values.shape, strict=True)):
        spans.append(slice(bisect_left(indices, first), bisect_left(indices, first + length)))
        places = torch.tensor(indices[spans[dim]], dtype=torch.int64, device=values.device) - first
        mine = mine.index_select(dim, places)
    if part.copy == 0:
        sums[tuple(spans)] = mine
    return ranks.sum(sums), tuple(spans)


def _stretch(start: int, length: int, size: int, place: int) -> tuple[int, int]:
    """Start and length of what sharding gives the `place`-th of `size` ranks of a stretch, as `torch.chunk` cuts it."""
    each = -(-length // size)
    begin = min(each * place, length)
    return start + begin, min(each, length - begin)
