"""`Pruner`: prunes a model while it trains, in anybody's loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distprune.pruning import masks as mask_ops
from distprune.pruning.agreement import Copies, MaskMismatchError, checksum
from distprune.pruning.allocation import Allocation, GlobalAllocation, LampAllocation
from distprune.pruning.collectives import Ranks
from distprune.pruning.limits import Bounds, bounds_of, make_limits
from distprune.pruning.patterns import Pattern
from distprune.pruning.prunable import Prunable, find_prunable
from distprune.pruning.schedule import Schedule
from distprune.pruning.scorer import Scorer
from distprune.pruning.scores import Score, magnitude
from distprune.pruning.shards import flat, local
from distprune.pruning.threshold import NOTHING, NonFiniteError, Search, Threshold

GLOBAL = GlobalAllocation()


@dataclass(frozen=True)
class LayerSparsity:
    """Zeros of one pruned tensor."""

    shape: tuple[int, ...]
    zeros: int
    sparsity: float


@dataclass(frozen=True)
class PruneReport:
    """What one update of the masks did.

    Attributes:
        step: the update's step in the schedule, in completed optimizer steps.
        target_sparsity: what the schedule asked for, a fraction of the prunable weights.
        sparsity: what was reached, `zeros / weights`.
        zeros: pruned weights, exactly round(target_sparsity * weights); with a pattern of blocks what fits into that.
        weights: prunable weights.
        newly_pruned: weights pruned by this update.
        threshold: a score that parts what was pruned from what stays; of tensors that are cut by themselves the
            highest; 0.0 where nothing was cut.
        held: names of the tensors that are down to `min_weights`, and stay there.
        seconds: wall time of the update.
    """

    step: int
    target_sparsity: float
    sparsity: float
    zeros: int
    weights: int
    newly_pruned: int
    threshold: float
    held: tuple[str, ...]
    seconds: float


class Pruner:
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
        self._ranks = Ranks(group)
        unfit = None if pattern is None else pattern.unfit
        selection = find_prunable(model, include, exclude, embeddings, self._ranks, unfit)
        self.tensors: tuple[Prunable, ...] = selection.tensors
        self.left_out: dict[str, str] = selection.left_out
        self.weights: int = selection.numel
        self.zeros: int = 0
        self.schedule = schedule
        self.masks: dict[str, Tensor] = {t.name: torch.ones_like(t.local, dtype=torch.bool) for t in self.tensors}
        """By tensor name, True where a weight is kept; of sharded tensors the part on this rank."""
        self.mask_digest: str = ""
        """A fingerprint of all masks (16 hex digits), the same on every rank and topology. New with each update."""
        self._kept = {t.name: t.numel for t in self.tensors}
        self._copies = Copies([t.name for t in self.tensors], [t.part for t in self.tensors], self._ranks)
        self._verified: Tensor | None = None
        self._scorer = Scorer(score, self.tensors)
        self._allocation = allocation
        self._bounds = bounds_of(self.tensors, bounds)
        if pattern is not None:
            self._bounds = [pattern.within(t.name, b) for t, b in zip(self.tensors, self._bounds, strict=True)]
        self._min_weights = min_weights
        self._pattern = pattern
        self._units = [1 if pattern is None else pattern.unit(t.weight.shape) for t in self.tensors]
        self._check_budget()
        self._steps_done = 0
        self._steps_seen = -1
        self._asked = 0
        self._optimizer = _bare(optimizer)
        self._check_optimizer()
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_optimizer_step),
            self._optimizer.register_step_post_hook(self._after_optimizer_step),
            self._optimizer.register_load_state_dict_post_hook(lambda _: self._mask_optimizer_state()),
        ]

    @property
    def steps_done(self) -> int:
        """Optimizer steps completed since the Pruner was made; steps that a gradient scaler skipped do not count."""
        return self._steps_done

    @property
    def sparsity(self) -> float:
        """The fraction of prunable weights that is pruned now."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def is_final(self) -> bool:
        """Whether as much was asked for as the schedule ends with."""
        return self._asked == round(self.schedule.final * self.weights)

    def layers(self) -> dict[str, LayerSparsity]:
        """Zeros per pruned tensor, by name."""
        return {t.name: self._layer(t) for t in self.tensors}

    def step(self) -> PruneReport | None:
        """Update the masks if the schedule says so for the steps done since the last call; else do nothing.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing has changed.
            MaskMismatchError: ranks disagree on the new masks.
            ValueError: the schedule asks for less than is pruned already, or for what bounds do not allow; or the score
                has seen no gradient yet. Nothing has changed.
        """
        due = [s for s in range(self._steps_seen + 1, self._steps_done + 1) if self.schedule.is_update(s)]
        report = self._update(due[-1]) if due else None
        self._steps_seen = self._steps_done
        return report

    def mask_gradients(self) -> None:
        """Set gradients at pruned places to 0. Runs by itself before each optimizer step; call it before clipping."""
        if self.zeros:
            for tensor in self.tensors:
                if tensor.weight.grad is not None:
                    mask_ops.apply(self.masks[tensor.name], local(tensor.weight.grad))

    def mask_weights(self) -> None:
        """Set weights at pruned places to 0. Runs after each optimizer step; call it after loading weights."""
        if self.zeros:
            for tensor in self.tensors:
                mask_ops.apply(self.masks[tensor.name], tensor.local)

    def verify(self) -> None:
        """Count zeros and fingerprint the masks over all ranks, and compare those of ranks that hold the same part.

        A mask that has changed since this was last done, other than by an update, is found too. One collective, four
        integers for each tensor; call it on all ranks.

        Raises:
            MaskMismatchError: a rank differs; the message names it, the tensor and the step.
        """
        self._verify(self._changed())

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

    def close(self) -> None:
        """Take the hooks off the optimizer. Masks stay readable; pruned weights are no longer held at 0."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

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

    def _checksums(self) -> Tensor:
        return torch.stack([checksum(self.masks[t.name]) for t in self.tensors])

    def _changed(self) -> Tensor:
        """Which masks on this rank are not as they were when last verified (int64, 1 or 0 for each tensor)."""
        now = self._checksums()
        return torch.zeros_like(now) if self._verified is None else (now != self._verified).long()

    def _verify(self, changed: Tensor) -> None:
        prints = torch.stack([mask_ops.digest(self.masks[t.name], t.part) for t in self.tensors])
        kept = torch.stack([torch.count_nonzero(self.masks[t.name]) for t in self.tensors])
        digests, (kept, changed_anywhere), differs = self._copies.add_up(prints, self._copies.first(kept), changed)
        when = f"at step {self._steps_done}"
        if changed_anywhere.any():
            raise MaskMismatchError(f"masks have changed between updates, found {when}: {self._copies.whose(changed)}")
        if any(differs):
            raise MaskMismatchError(f"masks differ between ranks {when}: {self._copies.who_differs(prints, differs)}")
        self._kept = {t.name: count for t, count in zip(self.tensors, kept.tolist(), strict=True)}
        self.zeros = self.weights - sum(self._kept.values())
        self.mask_digest = mask_ops.combine(dict(zip(self._kept, digests.tolist(), strict=True)))
        self._verified = self._checksums()

    def _check_optimizer(self) -> None:
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        strange = [t.name for t in self.tensors if id(t.weight) not in known]
        if strange:
            raise ValueError(
                f"the optimizer does not train {', '.join(strange[:8])}: make the Pruner with the optimizer of this "
                "model, after wrapping and sharding it, or exclude them"
            )

    def _check_budget(self) -> None:
        """Refuse what cannot be met at the end of the schedule, before anything is pruned."""
        if isinstance(self._allocation, LampAllocation):
            if not self._scorer.is_magnitude:
                raise ValueError("allocation: lamp scales magnitudes; it takes the score magnitude")
            if self._pattern is not None:
                raise ValueError("allocation: lamp weighs a layer as a whole, and a pattern its groups; take another")
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"{type(self.schedule).__name__} is no schedule: it needs `final`, `sparsity(step)`, `is_update(step)`"
            )
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
        self.mask_weights()
        pruned = [t.numel - self._kept[t.name] for t in self.tensors]
        final = max(k, round(self.schedule.final * self.weights))
        limits = make_limits(self.tensors, self._bounds, self._min_weights, pruned, k, final, self._units)
        make_search = Search if self._pattern is None else self._pattern.search
        try:
            search = make_search(self.tensors, list(self.masks.values()), pruned, self._scorer, self._ranks)
            cuts = self._allocation.thresholds(search, k, limits)
        except NonFiniteError as error:
            what = "weights" if self._scorer.is_magnitude else "scores"
            raise NonFiniteError(f"{what} are NaN or infinite at step {step}: {error}; nothing was pruned") from None
        for number, (tensor, threshold) in enumerate(zip(self.tensors, cuts, strict=True)):
            mask, weight = flat(self.masks[tensor.name]), flat(tensor.local)
            for begin, end, keep in search.keeps(threshold, number):
                mask[begin:end] &= keep
                del keep  # an update's memory is counted
                mask_ops.apply(mask[begin:end], weight[begin:end])
        return cuts

    def _held(self) -> tuple[str, ...]:
        least = self._min_weights
        return tuple(
            t.name
            for t, unit in zip(self.tensors, self._units, strict=True)
            if least < t.numel and 0 < self._kept[t.name] < least + unit
        )

    def _lay_out_masks(self) -> None:
        """Follow weights that were moved to another device or memory format since the last update."""
        for tensor in self.tensors:
            mask, weight = self.masks[tensor.name], tensor.local
            if mask.device != weight.device or mask.stride() != weight.stride():
                self.masks[tensor.name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)

    def _before_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.mask_gradients()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            if self._scorer.watches and not _is_skipped(optimizer):
                self._scorer.observe(getattr(optimizer, "grad_scale", None))
            return None
        calls = 0

        def masked_closure() -> Any:
            nonlocal calls
            loss = closure()
            self.mask_gradients()
            if (calls := calls + 1) == 1:
                self._scorer.observe()
            return loss

        return args[:1], {**kwargs, "closure": masked_closure}

    def _after_optimizer_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.mask_weights()
        if not _is_skipped(optimizer):
            self._steps_done += 1

    def _mask_optimizer_state(self) -> None:
        for tensor in self.tensors:
            for value in self._optimizer.state.get(tensor.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == tensor.weight.shape and value.is_floating_point():
                    mask_ops.apply(self.masks[tensor.name], local(value))

    def _layer(self, tensor: Prunable) -> LayerSparsity:
        zeros = tensor.numel - self._kept[tensor.name]
        return LayerSparsity(tuple(tensor.weight.shape), zeros, zeros / tensor.numel if tensor.numel else 0.0)


def _bare(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper, whose hooks are the ones that run."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _is_skipped(optimizer: Optimizer) -> bool:
    """A gradient scaler calls fused optimizers also for a step that they are to skip, and tells them so."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _sharded_alike(packed: Tensor, tensor: Prunable) -> Tensor:
    """Packed bits of this rank's part as a DTensor with the placements of the weight, where both are cut by rows."""
    weight = tensor.weight
    if not isinstance(weight, DTensor) or not tensor.part.is_rows:
        return packed
    shape = mask_ops.packed_shape(weight.shape)
    return DTensor.from_local(
        packed, weight.device_mesh, weight.placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
