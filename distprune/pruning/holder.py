"""What holds pruned weights at zero while a model trains, whatever says which they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distprune.pruning import masks as mask_ops
from distprune.pruning.agreement import Copies, MaskMismatchError
from distprune.pruning.collectives import Ranks
from distprune.pruning.fingerprints import combine, digest, tally
from distprune.pruning.prunable import Prunable
from distprune.pruning.schedule import Schedule
from distprune.pruning.scorer import Scorer
from distprune.pruning.scores import Score
from distprune.pruning.shards import local


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


class MaskHolder(ABC):
    """Holds masks on weights between the updates that subclasses make, with hooks on the optimizer.

    A subclass calls `_attach` at the end of its constructor.

    Args:
        tensors: which are masked.
        left_out: tensors of a prunable kind that are not, with the reason.
        optimizer: of the model, bare or wrapped by accelerate.
        schedule: says at which steps masks are updated.
        score: what a weight is worth.
        ranks: who prunes together.

    Raises:
        ValueError: the schedule is none, or the optimizer does not train what is to be pruned.
    """

    def __init__(
        self,
        tensors: Sequence[Prunable],
        left_out: dict[str, str],
        optimizer: Optimizer,
        schedule: Schedule,
        score: Score,
        ranks: Ranks,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ValueError(
                f"{type(schedule).__name__} is no schedule: it needs `final`, `sparsity(step)`, `is_update(step)`"
            )
        self.schedule = schedule
        self.left_out = left_out
        self.weights: int = sum(t.numel for t in tensors)
        self._ranks = ranks
        self._optimizer = _bare(optimizer)
        self._scorer = Scorer(score, tensors)
        self._steps_done = 0
        self._steps_seen = -1
        self._hold(tensors)
        self._check_optimizer()
        self._hooks: list[RemovableHandle] = []

    def _attach(self) -> None:
        """Put the hooks on the optimizer, once nothing is left that could be refused."""
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_optimizer_step),
            self._optimizer.register_step_post_hook(self._after_optimizer_step),
            self._optimizer.register_load_state_dict_post_hook(lambda _: self._mask_optimizer_state()),
        ]

    def _hold(self, tensors: Sequence[Prunable]) -> None:
        """Begin with nothing pruned of `tensors`."""
        self.tensors: tuple[Prunable, ...] = tuple(tensors)
        self.zeros: int = self.weights - sum(t.numel for t in tensors)
        self.masks: dict[str, Tensor] = {t.name: torch.ones_like(t.local, dtype=torch.bool) for t in tensors}
        """By tensor name, True where a weight is kept; of sharded tensors the part on this rank."""
        self.mask_digest: str = ""
        """A fingerprint of all masks (16 hex digits), the same on every rank and topology. New with each update."""
        self._kept = {t.name: t.numel for t in tensors}
        self._copies = Copies([t.name for t in tensors], [t.part for t in tensors], self._ranks)
        self._verified: Tensor | None = None

    @property
    def steps_done(self) -> int:
        """Optimizer steps completed since the Pruner was made; steps that a gradient scaler skipped do not count."""
        return self._steps_done

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """How much is pruned now, as the schedule counts it."""

    @property
    @abstractmethod
    def is_final(self) -> bool:
        """Whether as much is pruned as the schedule ends with."""

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
            found = [(self.masks[t.name], local(t.weight.grad)) for t in self.tensors if t.weight.grad is not None]
            mask_ops.apply_all([mask for mask, _ in found], [gradient for _, gradient in found])

    def mask_weights(self) -> None:
        """Set weights at pruned places to 0. Runs after each optimizer step; call it after loading weights."""
        if self.zeros:
            self._zero_weights()

    def verify(self) -> None:
        """Count zeros and fingerprint the masks over all ranks, and compare those of ranks that hold the same part.

        A mask that has changed since this was last done, other than by an update, is found too. One collective, four
        integers for each tensor; call it on all ranks.

        Raises:
            MaskMismatchError: a rank differs; the message names it, the tensor and the step.
        """
        self._verify(self._changed())

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Masks, the place in the schedule, and what the score has observed; tensors and ints only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict()` gave, on all ranks."""

    def close(self) -> None:
        """Take the hooks off the optimizer. Masks stay readable; pruned weights are no longer held at 0."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @abstractmethod
    def _update(self, step: int) -> PruneReport:
        """Prune as much as the schedule asks for at `step`."""

    def _changed(self) -> Tensor:
        """Which masks on this rank are not as they were when last verified (int64, 1 or 0 for each tensor)."""
        _, now = tally(list(self.masks.values()))
        return torch.zeros_like(now) if self._verified is None else (now != self._verified).long()

    def _verify(self, changed: Tensor) -> None:
        masks = list(self.masks.values())
        prints = digest(masks, [t.part for t in self.tensors])
        kept, checksums = tally(masks)
        digests, (kept, changed_anywhere), differs = self._copies.add_up(
            prints, self._copies.first(kept), changed.to(prints.device)
        )
        when = f"at step {self._steps_done}"
        if changed_anywhere.any():
            raise MaskMismatchError(f"masks have changed between updates, found {when}: {self._copies.whose(changed)}")
        if any(differs):
            raise MaskMismatchError(f"masks differ between ranks {when}: {self._copies.who_differs(prints, differs)}")
        self._kept = {t.name: count for t, count in zip(self.tensors, kept.tolist(), strict=True)}
        self.zeros = self.weights - sum(self._kept.values())
        self.mask_digest = combine(dict(zip(self._kept, digests.tolist(), strict=True)))
        self._verified = checksums

    def _check_optimizer(self) -> None:
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        strange = [t.name for t in self.tensors if id(t.weight) not in known]
        if strange:
            raise ValueError(
                f"the optimizer does not train {', '.join(strange[:8])}: make the Pruner with the optimizer of this "
                "model, after wrapping and sharding it, or exclude them"
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

    def _zero_weights(self) -> None:
        mask_ops.apply_all([self.masks[t.name] for t in self.tensors], [t.local for t in self.tensors])

    def _mask_optimizer_state(self) -> None:
        masks, states = list[Tensor](), list[Tensor]()
        for tensor in self.tensors:
            for value in self._optimizer.state.get(tensor.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == tensor.weight.shape and value.is_floating_point():
                    masks.append(self.masks[tensor.name])
                    states.append(local(value))
        mask_ops.apply_all(masks, states)

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
