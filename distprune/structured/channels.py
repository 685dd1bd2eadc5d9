"""The channels of a model: which may go, what hangs on each, and what the model costs without them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Owners = Mapping[str, Mapping[int, Tensor]]
"""By tensor and dimension: the unit that each index belongs to, -1 for none (int64, 1-D, on the CPU)."""


@dataclass(frozen=True)
class ChannelGroup:
    """Units that one layer makes. All of them have the same shape, so they can be compared with each other.

    Attributes:
        name: of the layer that makes them, or of an attention whose heads they are.
        begin: the number of the first unit among all.
        size: units.
        width: channels of that layer in a unit: 1, but for heads and for what grouped convolutions tie together.
        makers: the weights whose output they are.
    """

    name: str
    begin: int
    size: int
    width: int
    makers: tuple[str, ...]

    @property
    def units(self) -> slice:
        """Their place among all units."""
        return slice(self.begin, self.begin + self.size)


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one layer for one sample, in proportion to what is left of the dimensions of a tensor."""

    tensor: str
    dims: tuple[int, ...]
    macs: int


@dataclass(frozen=True)
class Channels:
    """The units of a model that can be removed, each with all that hangs on it.

    A unit is a channel, an attention head, or several channels that can only go together. Without it the model works on
    and computes what it would compute if all weights of the unit were 0.

    Attributes:
        groups: of units.
        owners: what belongs to which unit, for parameters and buffers.
        scored: tensors and dimensions whose weights say what a unit is worth: those of layers that make or take
            it, and factors of normalisations.
        shapes: of all parameters, and of the buffers in `owners`.
        parameters: names of the parameters; tied ones count once.
        work: of all layers.
        left_out: layers whose channels stay, with the reason.
    """

    groups: tuple[ChannelGroup, ...]
    owners: Owners
    scored: frozenset[tuple[str, int]]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    work: tuple[Work, ...]
    left_out: Mapping[str, str]

    @cached_property
    def units(self) -> int:
        """In all groups."""
        return sum(group.size for group in self.groups)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that differ where other units were found, or other indices belong to them."""
        found = hashlib.sha256(repr(self.groups).encode())
        for name in sorted(self.owners):
            for dim, owner in sorted(self.owners[name].items()):
                found.update(f"{name} {dim} {owner.tolist()}".encode())
        return found.hexdigest()[:16]

    def along(self, tensor: str, dim: int, kept: Tensor) -> Tensor:
        """Which indices of a dimension are left (bool) where the units `kept` are (bool, one for each)."""
        with_rest = torch.cat([kept, torch.ones(1, dtype=torch.bool)])  # what belongs to no unit stays
        return with_rest[self.owners[tensor][dim]]

    def count_parameters(self, kept: Tensor) -> int:
        """Of the whole model."""
        return sum(self._left(name, kept) for name in self.parameters)

    def count_macs(self, kept: Tensor) -> int:
        """Multiply-accumulates for one sample, of convolutions, linear layers and attention."""
        return round(sum(self._work_left(work, kept) for work in self.work))

    def count_units(self, kept: Tensor) -> int:
        """Those left."""
        return int(kept.sum())

    def _left(self, name: str, kept: Tensor) -> int:
        shape = list(self.shapes[name])
        for dim in self.owners.get(name, {}):
            shape[dim] = int(self.along(name, dim, kept).sum())
        return torch.Size(shape).numel()

    def _work_left(self, work: Work, kept: Tensor) -> float:
        macs = float(work.macs)
        for dim in work.dims:
            if dim in self.owners.get(work.tensor, {}):
                macs *= int(self.along(work.tensor, dim, kept).sum()) / self.shapes[work.tensor][dim]
        return macs
