"""`Pruner`: prunes a model while it trains, in anybody's loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distprune.pruning import masks as mask_ops
from distprune.pruning.agreement import MaskMismatchError
from distprune.pruning.allocation import Allocation, GlobalAllocation, LampAllocation
from distprune.pruning.bracket import MagnitudeSearch
from distprune.pruning.collectives import Ranks
from distprune.pruning.holder import MaskHolder, PruneReport
from distprune.pruning.limits import Bounds, bounds_of, make_limits
from distprune.pruning.patterns import Pattern
from distprune.pruning.prunable import Prunable, find_prunable
from distprune.pruning.schedule import Schedule
from distprune.pruning.scores import Score, magnitude
from distprune.pruning.shards import flat, local
from distprune.pruning.threshold import NOTHING, NonFiniteError, Search, Threshold

GLOBAL = GlobalAllocation()


class Pruner(MaskHolder):
    """Prunes `model` along `schedule`, by global magnitude unless told otherwise, the same on every rank.

    Call `step()` after each `optimizer.step()`. Between updates, hooks on the optimizer keep pruned weights at
    exactly 0: gradients are masked before each optimizer step and weights after it, and optimizer state is zeroed
    where weights are pruned, so neither momentum nor weight decay revives them. Call `mask_gradients()` before
    clipping gradients, so that the norm counts only weights that are left.

    Under `torch.distributed` ranks hold the same weights, as DDP keeps them, or shards of them (FSDP2's `fully_shard`,
    HSDP, any DTensor with Shard and Replicate placements). Each works on what it holds and nothing is gathered; ranks
    that hold the same share the counting. Make the Pruner after wrapping and sharding.

    Args:
        model: the model, bare, sharded, or wrapped in DDP or `torch.compile`.
        optimizer: its optimizer, bare or wrapped by accelerate.
        schedule: how sparse at which step; steps count completed optimizer steps since the Pruner was made.
        include, exclude, embeddings: what to prune, see `find_prunable`.
        score: what a weight is worth, see `distprune.pruning.scores`.
        allocation: how tensors share the budget, see `distprune.pruning.allocation`.
        bounds: the least and the greatest sparsity of tensors, by pattern as in `include`; met together with the
            budget. The least rises with the schedule, from 0 at sparsity 0.
        min_weights: so many weights stay in every tensor that has more, so that none is emptied.
        pattern: where zeros may be, see `distprune.pruning.patterns`; tensors that do not fit it are left out.
        group: the process group whose ranks prune together; None takes the default group.

    Raises:
        ValueError: see `find_prunable`; or the optimizer does not train what is to be pruned; or bounds and budget
            cannot be met together, or the schedule does not end with the pattern in full.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        embeddings: bool = False,
        score: Score = magnitude,
        allocation: Allocation = GLOBAL,
        bounds: Mapping[str, Bounds] = MappingProxyType({}),
        min_weights: int = 1,
        pattern: Pattern | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        ranks = Ranks(group)
        selection = find_prunable(
            model, include, exclude, embeddings, ranks, None if pattern is None else pattern.unfit
        )
        super().__init__(selection.tensors, selection.left_out, optimizer, schedule, score, ranks)
        self._allocation = allocation
        self._bounds = bounds_of(self.tensors, bounds)
        if pattern is not None:
            self._bounds = [pattern.within(t.name, b) for t, b in zip(self.tensors, self._bounds, strict=True)]
        self._min_weights = min_weights
        self._pattern = pattern
        self._units = [1 if pattern is None else pattern.unit(t.weight.shape) for t in self.tensors]
        self._check_budget()
        self._asked = 0
        self._attach()

    @property
    def sparsity(self) -> float:
        """The fraction of prunable weights that is pruned now."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def is_final(self) -> bool:
        """Whether as much was asked for as the schedule ends with."""
        return self._asked == round(self.schedule.final * self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Masks as packed bits (see `distprune.pruning.masks`), the place in the schedule, and what the score has
        observed; tensors and ints only.

        Of tensors that are sharded by rows the bits are DTensors sharded alike, so that `torch.distributed.checkpoint`
        brings them to any other topology; of those sharded in another way they are the part on this rank.
        """
        return {
            "steps_done": self._steps_done,
            "steps_seen": self._steps_seen,
            "asked": self._asked,
            "observations": self._scorer.observations,
            "masks": {t.name: _sharded_alike(mask_ops.pack(self.masks[t.name]), t) for t in self.tensors},
            "observed": dict(self._scorer.observed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take masks and step from `state_dict()` and apply the masks to weights and optimizer state, on all ranks.

        Raises:
            ValueError: the state is of other tensors; the message names them, and nothing has changed.
            MaskMismatchError: see `verify`.
        """
        packed: dict[str, Tensor] = {name: local(bits) for name, bits in state["masks"].items()}
        if packed.keys() != self.masks.keys():
            missing, extra = sorted(self.masks.keys() - packed), sorted(packed.keys() - self.masks)
            raise ValueError(f"masks are of other tensors: missing {missing}, unexpected {extra}")
        steps_done, steps_seen, asked = state["steps_done"], state["steps_seen"], state["asked"]
        for name, mask in self.masks.items():
            mask_ops.check_packed(packed[name], mask, name)
        self._scorer.load(state["observed"], state["observations"])
        for name, mask in self.masks.items():
            mask_ops.unpack(packed[name].to(mask.device), mask)
        self._steps_done, self._steps_seen, self._asked = steps_done, steps_seen, asked
        self._verified = None
        self.verify()
        self.mask_weights()
        self._mask_optimizer_state()

    @torch.no_grad()
    def _update(self, step: int) -> PruneReport:
        began = time.perf_counter()
        target = self.schedule.sparsity(step)
        k = round(target * self.weights)
        if k < self.zeros:
            raise ValueError(
                f"the schedule asks for {k} zeros (sparsity {target:.6f}) at step {step}, but {self.zeros} weights are "
                "pruned already and pruned weights stay pruned"
            )
        before, cuts, changed = self.zeros, list[Threshold](), self._changed()
        if k > before:
            cuts = self._cut(k, step)
            self._mask_optimizer_state()
        self._scorer.forget()
        self._verify(changed)
        self._asked = k
        # What is cut by itself may fall short by a part of a block.
        if not k - sum(unit - 1 for unit in self._units) <= self.zeros <= k:
            raise MaskMismatchError(f"{self.zeros} weights are masked at step {step}, not {k} as the schedule asks")
        return PruneReport(
            step=step,
            target_sparsity=target,
            sparsity=self.sparsity,
            zeros=self.zeros,
            weights=self.weights,
            newly_pruned=self.zeros - before,
            threshold=max((self._scorer.value(cut.key) for cut in cuts if cut is not NOTHING), default=0.0),
            held=self._held(),
            seconds=time.perf_counter() - began,
        )

    def _check_budget(self) -> None:
        """Refuse what cannot be met at the end of the schedule, before anything is pruned."""
        if isinstance(self._allocation, LampAllocation):
            if not self._scorer.is_magnitude:
                raise ValueError("allocation: lamp scales magnitudes; it takes the score magnitude")
            if self._pattern is not None:
                raise ValueError("allocation: lamp weighs a layer as a whole, and a pattern its groups; take another")
        final = self.schedule.final
        self._allocation.check(self.tensors, final)
        nothing = [0] * len(self.tensors)
        k = round(final * self.weights)
        if self._pattern is not None:
            self._pattern.check(self.tensors, final)
        make_limits(self.tensors, self._bounds, self._min_weights, nothing, k, k, self._units)

    def _cut(self, k: int, step: int) -> list[Threshold]:
        """Shrink the masks until `k` weights are pruned and zero the rest, in pieces that stay in the cache.

        Returns:
            Where each tensor was cut.
        """
        self._scorer.refuse_unobserved(step)
        self._lay_out_masks()
        self._scorer.lay_out()
        pruned = [t.numel - self._kept[t.name] for t in self.tensors]
        final = max(k, round(self.schedule.final * self.weights))
        limits = make_limits(self.tensors, self._bounds, self._min_weights, pruned, k, final, self._units)
        single = self._scorer.is_magnitude and {t.weight.dtype for t in self.tensors} == {torch.float32}
        make_search = Search if self._pattern is None else self._pattern.search
        if self._pattern is None and single:
            make_search = MagnitudeSearch
        else:
            self.mask_weights()
        try:
            search = make_search(self.tensors, list(self.masks.values()), pruned, self._scorer, self._ranks)
            cuts = self._allocation.thresholds(search, k, limits)
        except NonFiniteError as error:
            what = "weights" if self._scorer.is_magnitude else "scores"
            raise NonFiniteError(f"{what} are NaN or infinite at step {step}: {error}; nothing was pruned") from None
        for number, (tensor, threshold) in enumerate(zip(self.tensors, cuts, strict=True)):
            search.cut(threshold, number, flat(self.masks[tensor.name]), flat(tensor.local))
        return cuts

    def _held(self) -> tuple[str, ...]:
        least = self._min_weights
        return tuple(
            t.name
            for t, unit in zip(self.tensors, self._units, strict=True)
            if least < t.numel and 0 < self._kept[t.name] < least + unit
        )


def _sharded_alike(packed: Tensor, tensor: Prunable) -> Tensor:
    """Packed bits of this rank's part as a DTensor with the placements of the weight, where both are cut by rows."""
    weight = tensor.weight
    if not isinstance(weight, DTensor) or not tensor.part.is_rows:
        return packed
    shape = mask_ops.packed_shape(weight.shape)
    return DTensor.from_local(
        packed, weight.device_mesh, weight.placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
