"""`Pruner`: prunes a model while it trains, in anybody's loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distprune.pruning import masks as mask_ops
from distprune.pruning.collectives import Ranks
from distprune.pruning.prunable import Prunable, find_prunable, flat
from distprune.pruning.schedule import Schedule
from distprune.pruning.scores import KeyFormat
from distprune.pruning.threshold import NonFiniteError, Threshold, chunks, find_threshold


class MaskMismatchError(RuntimeError):
    """Ranks hold different masks. Raised on every rank; the message names rank, tensor and step."""


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
        step: completed optimizer steps at the update.
        target_sparsity: what the schedule asked for, a fraction of the prunable weights.
        sparsity: what was reached, `zeros / weights`.
        zeros: pruned weights, exactly round(target_sparsity * weights).
        weights: prunable weights.
        newly_pruned: weights pruned by this update.
        threshold: a score that parts what was pruned from what stays; 0.0 where nothing was cut.
        seconds: wall time of the update.
    """

    step: int
    target_sparsity: float
    sparsity: float
    zeros: int
    weights: int
    newly_pruned: int
    threshold: float
    seconds: float


class Pruner:
    """Prunes `model` by global magnitude along `schedule`, the same on every rank.

    Call `step()` after each `optimizer.step()`. Between updates, hooks on the optimizer keep pruned weights at
    exactly 0: their gradients are zeroed before each optimizer step, and their optimizer state is zeroed when they
    are pruned, so neither momentum nor weight decay revives them. Call `mask_gradients()` before clipping gradients,
    so that the norm counts only weights that are left.

    Under `torch.distributed` every rank must hold the same weights (as DDP keeps them); ranks then share the counting.

    Args:
        model: the model, bare or wrapped in DDP or `torch.compile`.
        optimizer: its optimizer, bare or wrapped by accelerate.
        schedule: how sparse at which step; steps count completed optimizer steps since the Pruner was made.
        include, exclude, embeddings: what to prune, see `find_prunable`.
        group: the process group whose ranks hold replicas; None takes the default group.

    Raises:
        ValueError: see `find_prunable`.
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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        selection = find_prunable(model, include, exclude, embeddings)
        self.tensors: tuple[Prunable, ...] = selection.tensors
        self.left_out: dict[str, str] = selection.left_out
        self.weights: int = selection.numel
        self.zeros: int = 0
        self.schedule = schedule
        self.masks: dict[str, Tensor] = {
            t.name: torch.ones_like(t.weight, dtype=torch.bool, requires_grad=False) for t in self.tensors
        }
        self._kept = {t.name: t.numel for t in self.tensors}
        self._keys = KeyFormat.of({t.weight.dtype for t in self.tensors})
        self._ranks = Ranks(group)
        self._steps_done = 0
        self._steps_seen = -1
        self._optimizer = _bare(optimizer)
        self._hooks = [
            self._optimizer.register_step_pre_hook(lambda *_: self.mask_gradients()),
            self._optimizer.register_step_post_hook(lambda *_: self._count_step()),
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
    def mask_digest(self) -> str:
        """A fingerprint of all masks (16 hex digits), the same on every rank and topology."""
        return mask_ops.combine(self._digests())

    def layers(self) -> dict[str, LayerSparsity]:
        """Zeros per pruned tensor, by name."""
        return {t.name: self._layer(t) for t in self.tensors}

    def step(self) -> PruneReport | None:
        """Update the masks if the schedule says so for the steps done since the last call; else do nothing.

        Raises:
            NonFiniteError: a weight is NaN or infinite; nothing has changed.
            MaskMismatchError: ranks disagree on the new masks.
            ValueError: the schedule asks for less than is pruned already.
        """
        due = [s for s in range(self._steps_seen + 1, self._steps_done + 1) if self.schedule.is_update(s)]
        self._steps_seen = self._steps_done
        return self._update(due[-1]) if due else None

    def mask_gradients(self) -> None:
        """Set gradients at pruned places to 0. Runs by itself before each optimizer step; call it before clipping."""
        if self.zeros:
            for tensor in self.tensors:
                if tensor.weight.grad is not None:
                    mask_ops.apply(self.masks[tensor.name], tensor.weight.grad)

    def apply_masks(self) -> None:
        """Set weights and optimizer state at pruned places to 0, say after loading weights into the model."""
        for tensor in self.tensors:
            mask_ops.apply(self.masks[tensor.name], tensor.weight)
        self._mask_optimizer_state()

    def verify(self) -> None:
        """Compare masks and counts of zeros over all ranks; one collective.

        Raises:
            MaskMismatchError: a rank differs; the message names it, the tensor and the step.
        """
        digests = self._digests()
        whole = int(mask_ops.combine(digests), 16) - (1 << 63)
        mine = torch.tensor([whole, ~whole, self.zeros, ~self.zeros], device=self.tensors[0].weight.device)
        high = self._ranks.max(mine).tolist()
        if high[0] != ~high[1] or high[2] != ~high[3]:
            raise MaskMismatchError(self._who_differs(digests))

    def state_dict(self) -> dict[str, Any]:
        """Masks as packed bits (see `distprune.pruning.masks`) and the place in the schedule; tensors and ints only."""
        return {
            "steps_done": self._steps_done,
            "steps_seen": self._steps_seen,
            "masks": {name: mask_ops.pack(mask) for name, mask in self.masks.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take masks and step from `state_dict()` and apply the masks to weights and optimizer state.

        Raises:
            ValueError: the state is of other tensors; the message names them, and nothing has changed.
        """
        packed: dict[str, Tensor] = state["masks"]
        if packed.keys() != self.masks.keys():
            missing, extra = sorted(self.masks.keys() - packed), sorted(packed.keys() - self.masks)
            raise ValueError(f"masks are of other tensors: missing {missing}, unexpected {extra}")
        for tensor in self.tensors:
            if packed[tensor.name].shape != (-(-tensor.numel // 8),):
                size = len(packed[tensor.name])
                raise ValueError(f"the mask of {tensor.name} has {size} bytes, which does not fit {tensor.numel}")
        for tensor in self.tensors:
            mask_ops.unpack(packed[tensor.name].to(tensor.weight.device), self.masks[tensor.name])
        self._steps_done, self._steps_seen = state["steps_done"], state["steps_seen"]
        self._count()
        self.apply_masks()

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
        before, threshold = self.zeros, 0.0
        if k > before:
            cut = self._find_threshold(k, step)
            threshold = self._keys.value(cut.key)
            self._cut(cut)
            self._count()
        self.verify()
        return PruneReport(
            step=step,
            target_sparsity=target,
            sparsity=self.sparsity,
            zeros=self.zeros,
            weights=self.weights,
            newly_pruned=self.zeros - before,
            threshold=threshold,
            seconds=time.perf_counter() - began,
        )

    def _find_threshold(self, k: int, step: int) -> Threshold:
        if self.zeros:
            for tensor in self.tensors:
                mask_ops.apply(self.masks[tensor.name], tensor.weight)
        try:
            return find_threshold(self.tensors, list(self.masks.values()), self.zeros, k, self._keys, self._ranks)
        except NonFiniteError as error:
            raise NonFiniteError(f"weights are NaN or infinite at step {step}: {error}; nothing was pruned") from None

    def _cut(self, threshold: Threshold) -> None:
        """Shrink the masks to what the threshold keeps and zero the rest, in pieces that stay in the cache."""
        for tensor in self.tensors:
            mask, weight = flat(self.masks[tensor.name]), flat(tensor.weight)
            for begin, end in chunks(0, tensor.numel):
                keys = self._keys.keys(weight[begin:end])
                mask[begin:end] &= threshold.keeps(tensor, keys, begin)
                mask_ops.apply(mask[begin:end], weight[begin:end])
        self._mask_optimizer_state()

    def _count(self) -> None:
        self._kept = self._per_tensor(torch.sum)
        self.zeros = self.weights - sum(self._kept.values())

    def _count_step(self) -> None:
        self._steps_done += 1

    def _mask_optimizer_state(self) -> None:
        if self.zeros:
            for tensor in self.tensors:
                for value in self._optimizer.state.get(tensor.weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == tensor.weight.shape and value.is_floating_point():
                        mask_ops.apply(self.masks[tensor.name], value)

    def _layer(self, tensor: Prunable) -> LayerSparsity:
        zeros = tensor.numel - self._kept[tensor.name]
        return LayerSparsity(tuple(tensor.weight.shape), zeros, zeros / tensor.numel if tensor.numel else 0.0)

    def _digests(self) -> dict[str, int]:
        return self._per_tensor(mask_ops.digest)

    def _per_tensor(self, figure: Callable[[Tensor], Tensor]) -> dict[str, int]:
        """An integer figure of every mask, fetched from the device in one go."""
        figures = torch.stack([figure(mask) for mask in self.masks.values()])
        return dict(zip(self.masks, figures.tolist(), strict=True))

    def _who_differs(self, digests: dict[str, int]) -> str:
        table = self._ranks.gather(torch.tensor(list(digests.values()), device=self.tensors[0].weight.device))
        usual = table.mode(dim=0).values
        differing = [
            f"rank {rank}: {tensor.name}"
            for rank, row in enumerate(table)
            for tensor, same in zip(self.tensors, row == usual, strict=True)
            if not same
        ]
        return f"masks differ between ranks at step {self._steps_done}: {', '.join(differing)}"


def _bare(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper, whose hooks are the ones that run."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
