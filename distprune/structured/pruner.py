"""`ChannelPruner`: removes whole channels and attention heads while a model trains."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distprune.pruning import LayerSparsity, NonFiniteError, Prunable, PruneReport, Schedule, Score, magnitude
from distprune.pruning import masks as mask_ops
from distprune.pruning.collectives import Ranks
from distprune.pruning.holder import MaskHolder
from distprune.pruning.prunable import reshard, unwrap
from distprune.pruning.scorer import Scorer
from distprune.pruning.shards import Part, local
from distprune.structured.channels import Channels
from distprune.structured.selection import Limits, Norm, along, choose, mean_size, rank_units, unit_scores
from distprune.structured.shrink import Kept, composed, kept_of, note_kept, positions, resize, select

Budget = Literal["channels", "params", "macs"]


class ChannelPruner(MaskHolder):
    """Prunes channels and heads of `model` along `schedule`, the same on every rank, and removes them when told to.

    Use it as `Pruner`: call `step()` after each `optimizer.step()`. A unit that goes has all its weights set to 0 and
    held there, so the model computes what it will without it; `shrink()` then takes it out of parameters, buffers and
    optimizer state. Ranks hold replicas, or shards, of which nothing is removed before they are whole again.

    Args:
        model: bare, sharded, or wrapped in DDP or `torch.compile`.
        optimizer: its optimizer, bare or wrapped by accelerate.
        schedule: which fraction of the budget is gone at which step.
        channels: of the model, found before it was wrapped; see `find_channels`.
        budget: what the schedule counts: units, parameters of the whole model, or its multiply-accumulates. It is met
            as closely as whole units and limits allow.
        score: what a weight is worth; that of a unit is the sum over the weights of all layers that make or take it and
            the factors of its normalisations, without biases.
        norm: of magnitudes: l2 sums squares, l1 absolute values.
        compare: global compares units with each other, each divided by the mean of its group (as Torch-Pruning does);
            uniform takes the same share of every group.
        multiple: of so many channels is what is left of a group. Some hardware likes 8.
        min_width: so many channels stay in every group that has more.
        most: by name of a group, the largest share of it that may go.
        group: the process group whose ranks prune together; None takes the default group.

    Raises:
        ValueError: the channels are of another model, the optimizer does not train what is to be pruned, a setting lies
            outside its range, or limits do not allow what the schedule ends with.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        channels: Channels,
        *,
        budget: Budget = "macs",
        score: Score = magnitude,
        norm: Norm = "l2",
        compare: Literal["global", "uniform"] = "global",
        multiple: int = 1,
        min_width: int = 1,
        most: Mapping[str, float] = MappingProxyType({}),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_fit(model, channels)
        _check(channels, multiple, min_width, most)
        ranks = Ranks(group)
        reshard(model)
        tensors = _tensors(model, channels, ranks)
        super().__init__(tensors, dict(channels.left_out), optimizer, schedule, score, ranks)
        self.channels = channels
        self.kept = torch.ones(channels.units, dtype=torch.bool)
        """Which units are left (bool, one for each, on the CPU)."""
        self.present = self.kept.clone()
        """Which are in the model, at 0 or not; `shrink` leaves those that are kept."""
        self.budget = budget
        self._model = unwrap(model)
        self._score = score
        self._norm: Norm = norm
        self._compare = compare
        self._limits = Limits(channels, min_width, multiple, most)
        self._made_as: Kept = kept_of(self._model)
        self._dense = self.cost(self.kept)
        self._target = 0.0
        self._parts: list[tuple[Prunable, int, Tensor]] = []
        self._check_budget()
        self._attach()

    def cost(self, kept: Tensor) -> int:
        """What the model costs in terms of the budget with the units `kept`."""
        count = {
            "channels": self.channels.count_units,
            "params": self.channels.count_parameters,
            "macs": self.channels.count_macs,
        }
        return count[self.budget](kept)

    @property
    def sparsity(self) -> float:
        """The fraction of the budget that is gone."""
        return 1 - self.cost(self.kept) / self._dense

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold shards, from which nothing can be removed."""
        return any(isinstance(tensor.weight, DTensor) for tensor in self.tensors)

    @property
    def is_final(self) -> bool:
        """Whether the last update of the schedule is done."""
        return self._target == self.schedule.final

    def layers(self) -> dict[str, LayerSparsity]:
        """By name of a group: how many units it had, and how many are gone."""
        layers = {}
        for group in self.channels.groups:
            gone = group.size - int(self.kept[group.units].sum())
            layers[group.name] = LayerSparsity((group.size,), gone, gone / group.size)
        return layers

    def scored_parts(self) -> list[tuple[Prunable, int, Tensor]]:
        """What says what units are worth: tensors, dimensions, and the unit of each index on this rank (int64, on its
        device, -1 for none)."""
        if not self._parts or self._parts[0][2].device != self.tensors[0].local.device:
            self._parts = [
                (tensor, dim, self._owner(tensor, dim))
                for tensor in self.tensors
                for dim in self.channels.owners[tensor.name]
                if (tensor.name, dim) in self.channels.scored
            ]
        return self._parts

    @torch.no_grad()
    def unit_norms(self) -> Tensor:
        """The L2 norm of all scored weights of each unit (float32, the same on every rank)."""
        squares = torch.zeros(self.channels.units + 1, device=self.tensors[0].local.device)
        for tensor, dim, owner in self.scored_parts():
            if tensor.part.copy == 0:
                squares.index_add_(0, owner % len(squares), along(tensor.local.float().square(), dim))
        return self._ranks.sum(squares)[:-1].sqrt()

    def shrink(self) -> bool:
        """Remove what is pruned from parameters, buffers and optimizer state; whether there was anything to remove.

        Every parameter becomes a new one: wrap the model anew (DDP), and compile it again.

        Raises:
            ValueError: the model is sharded.
        """
        return self.reshape(self.kept)

    def reshape(self, present: Tensor) -> bool:
        """Let exactly the units `present` be in the model; whether that changes anything.

        Those that were removed come back as zeros: going back to an earlier state, that fills them.

        Raises:
            ValueError: the model is sharded.
        """
        if torch.equal(present, self.present):
            return False
        if self.is_sharded:
            raise ValueError("shards cannot shrink; remove channels from the whole weights")
        where = positions(self.channels, self.present, present)
        resize(self._model, where, self._optimizer)
        self.present = present.clone()
        note_kept(self._model, self._left(present))
        self.kept &= present
        tensors = _tensors(self._model, self.channels, self._ranks)
        observed, observations = self._scorer.observed, self._scorer.observations
        self._scorer = Scorer(self._score, tensors)
        self._scorer.load({n: select(seen, where[n]) for n, seen in observed.items()}, observations)
        self._hold(tensors)
        self._parts = []
        self._lay_masks()
        self._verify(self._changed())
        return True

    def cut(self) -> tuple[Kept, Kept]:
        """Which indices of the tensors in the model are to be left of them, without what is pruned, and which these are
        in the model as it was made; for whole weights that were sharded."""
        return positions(self.channels, self.present, self.kept), self._left(self.kept)

    def state_dict(self) -> dict[str, Any]:
        """Which units are kept, as packed bits of each group, the place in the schedule, and what the score has
        observed; tensors and ints only. What is in the model, `present`, is not part of it."""
        return {
            "steps_done": self._steps_done,
            "steps_seen": self._steps_seen,
            "target_bits": struct.unpack("<q", struct.pack("<d", self._target))[0],
            "observations": self._scorer.observations,
            "masks": {g.name: mask_ops.pack(self.kept[g.units][None]) for g in self.channels.groups},
            "observed": dict(self._scorer.observed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take units and step from `state_dict()` and hold the others at 0, on all ranks.

        Raises:
            ValueError: the state is of other groups; nothing has changed.
            MaskMismatchError: see `verify`.
        """
        kept = unpack_units(self.channels, {name: local(bits).cpu() for name, bits in state["masks"].items()})
        if bool((kept & ~self.present).any()):
            raise ValueError("channels that are kept were removed from the model; bring them back first, see `reshape`")
        self._scorer.load(state["observed"], state["observations"])
        self._steps_done, self._steps_seen = state["steps_done"], state["steps_seen"]
        (self._target,) = struct.unpack("<d", struct.pack("<q", state["target_bits"]))
        self.kept = kept
        self._lay_masks()
        self._verified = None
        self.verify()
        self.mask_weights()
        self._mask_optimizer_state()

    @torch.no_grad()
    def _update(self, step: int) -> PruneReport:
        began = time.perf_counter()
        target = self.schedule.sparsity(step)
        if target < self._target:
            raise ValueError(
                f"the schedule asks for {target:.6f} at step {step}, but {self._target:.6f} is pruned already and what "
                "is pruned stays pruned"
            )
        before, threshold, changed = self.zeros, 0.0, self._changed()
        if target > self._target:
            threshold = self._prune(target, step)
        self._target = target
        self._scorer.forget()
        self._verify(changed)
        return PruneReport(
            step=step,
            target_sparsity=target,
            sparsity=self.sparsity,
            zeros=self.zeros,
            weights=self.weights,
            newly_pruned=self.zeros - before,
            threshold=threshold,
            held=self._limits.held(self.kept),
            seconds=time.perf_counter() - began,
        )

    def _prune(self, target: float, step: int) -> float:
        """Let units go until `target` is met; the highest score of those that went, of the mean of its group."""
        self._scorer.refuse_unobserved(step)
        self._lay_out_masks()
        self._scorer.lay_out()
        self.mask_weights()
        try:
            scores = unit_scores(self._scorer, self.scored_parts(), self.channels.units, self._norm, self._ranks)
        except NonFiniteError as error:
            what = "weights are" if self._scorer.is_magnitude else "scores are"
            raise NonFiniteError(f"{what} NaN or infinite at step {step}: {error}; nothing was pruned") from None
        order = rank_units(self.channels, scores, self.kept, self._compare)
        before = self.kept
        self.kept, taken = choose(order, before, self._limits, self.cost, (1 - target) * self._dense)
        self._lay_masks()
        self._zero_weights()
        self._mask_optimizer_state()
        if not taken:
            return 0.0
        last = int(order[taken - 1])
        group = next(g for g in self.channels.groups if g.begin <= last < g.begin + g.size)
        return scores[last] / mean_size(scores, [u for u in range(group.begin, group.begin + group.size) if before[u]])

    def _left(self, units: Tensor) -> Kept:
        return composed(self._made_as, positions(self.channels, torch.ones_like(units), units))

    def _owner(self, tensor: Prunable, dim: int) -> Tensor:
        there = self.channels.along(tensor.name, dim, self.present)
        begin, length = tensor.part.start[dim], tensor.part.shape[dim]
        return self.channels.owners[tensor.name][dim][there][begin : begin + length].to(tensor.local.device)

    def _lay_masks(self) -> None:
        """Make the masks of weights out of which units are kept."""
        for tensor in self.tensors:
            mask = self.masks[tensor.name].fill_(True)
            for dim in self.channels.owners[tensor.name]:
                there = self.channels.along(tensor.name, dim, self.present)
                left = self.channels.along(tensor.name, dim, self.kept)[there]
                begin, length = tensor.part.start[dim], tensor.part.shape[dim]
                shape = [length if d == dim else 1 for d in range(mask.dim())]
                mask &= left[begin : begin + length].to(mask.device).view(shape)

    def _check_budget(self) -> None:
        """Refuse what limits do not allow, before anything is pruned."""
        order = torch.arange(self.channels.units)
        most = 1 - self.cost(self._limits.apply(order, len(order), self.kept)) / self._dense
        if most < self.schedule.final - 1e-9:
            raise ValueError(
                f"at most {most:.4f} of the {self.budget} can go with the channels that may be removed and what stays "
                f"of each group, but {self.schedule.final:g} is asked for; `left_out` says what stays dense, and why"
            )


def unpack_units(channels: Channels, packed: Mapping[str, Tensor]) -> Tensor:
    """Which units are kept (bool, one for each), out of the bits of each group; see `ChannelPruner.state_dict`.

    Raises:
        ValueError: the bits are of other groups.
    """
    if packed.keys() != (names := {group.name for group in channels.groups}):
        raise ValueError(
            f"channels are of other groups: missing {sorted(names - packed.keys())}, unexpected "
            f"{sorted(packed.keys() - names)}"
        )
    kept = torch.ones(channels.units, dtype=torch.bool)
    for group in channels.groups:
        bits = kept[group.units][None]
        mask_ops.check_packed(packed[group.name], bits, group.name)
        mask_ops.unpack(packed[group.name], bits)
    return kept


def _tensors(model: nn.Module, channels: Channels, ranks: Ranks) -> list[Prunable]:
    """The parameters on which units hang, as they are."""
    tensors, offset = [], 0
    for name, weight in unwrap(model).named_parameters():
        if name in channels.owners:
            tensors.append(Prunable(name, weight, offset, Part.of(weight, ranks)))
            offset += weight.numel()
    return tensors


def _check_fit(model: nn.Module, channels: Channels) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in unwrap(model).named_parameters()}
    for name in sorted(channels.parameters):
        if shapes.get(name) != channels.shapes[name]:
            raise ValueError(
                f"the channels are of another model, in which {name} has shape {channels.shapes[name]}, not "
                f"{shapes.get(name)}: find those of this one"
            )


def _check(channels: Channels, multiple: int, min_width: int, most: Mapping[str, float]) -> None:
    if multiple < 1 or min_width < 1:
        raise ValueError(f"multiple and min_width must be at least 1 channel, got {multiple} and {min_width}")
    names = {group.name for group in channels.groups}
    for name, share in most.items():
        if name not in names:
            raise ValueError(f"most: there is no group {name!r}; there are {', '.join(sorted(names)[:8])}")
        if not 0 <= share <= 1:
            raise ValueError(f"most: the share of {name} must lie in [0, 1], got {share}")
