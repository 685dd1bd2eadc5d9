"""NaN and infinity in losses, gradients and weights: whose they were, steps left out for them, saves refused."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import local
from distprune.training.buffers import copy_buffers, set_back_buffers


class DivergedError(RuntimeError):
    """The loss, every gradient, or what is to be saved is NaN or infinite."""


class LossWatch:
    """Watches the losses of this rank without waiting for the device.

    Args:
        model: whose buffers are set back, and whose gradients are looked at, where steps are skipped.
        device: of the losses.
        skip: whether a step whose loss or gradients are not finite is to be left out. Costs a copy of the buffers, a
            pass over the gradients, one small collective and one wait for the device in each step.
        gradients: look at gradients too; needless under a gradient scaler, which does so itself.
    """

    def __init__(self, model: nn.Module, device: torch.device, skip: bool, gradients: bool) -> None:
        self._model = model
        self._skip = skip
        self._gradients = gradients
        self._ranks = Ranks()
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._buffers: list[Tensor] = []

    def begin(self) -> None:
        """A step begins."""
        if self._skip:
            self._bad = torch.zeros_like(self._bad)
            self._buffers = copy_buffers(self._model)

    def add(self, loss: Tensor, step: int) -> None:
        """Take the loss of a micro-batch of the step that will be number `step`."""
        bad = ~torch.isfinite(loss.detach())
        if self._skip:
            self._bad = self._bad | bad
        else:
            self._first = torch.where(bad & (self._first < 0), step, self._first)

    def to_skip(self) -> str | None:
        """What is not finite and on which ranks, the same on all, if the step is to be left out for it.

        Buffers are then as they were when the step began.
        """
        if not self._skip:
            return None
        bad = torch.stack([self._bad, self._bad_gradients()]).long()
        losses, gradients = self._ranks.gather(bad).T.tolist()
        if not any(losses + gradients):
            return None
        set_back_buffers(self._model, self._buffers)
        # The gradient of a loss that is not finite reaches every rank, so the loss tells more.
        what, flags = ("the loss", losses) if any(losses) else ("a gradient", gradients)
        return f"{what} is NaN or infinite on {_on(flags)}"

    def where(self) -> str:
        """Where the loss was first not finite, ranks and step; "" if it never was in a step that was not left out.

        Called on all ranks.
        """
        firsts = self._ranks.gather(self._first.view(1)).view(-1).tolist()
        seen = [first for first in firsts if first >= 0]
        if not seen:
            return ""
        return f", first at step {min(seen)} on {_on([first == min(seen) for first in firsts])}"

    def _bad_gradients(self) -> Tensor:
        gradients = [local(p.grad) for p in self._model.parameters() if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        if not self._gradients or not gradients:
            return torch.zeros_like(self._bad)
        return ~torch.isfinite(torch.stack(torch._foreach_norm(gradients, torch.inf))).all()


def refuse_nonfinite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Refuse tensors with NaN or infinity in them; called on all ranks. One small collective.

    Raises:
        DivergedError: names tensors and ranks.
    """
    floats = {name: local(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    device = next(iter(floats.values())).device
    bad = torch.stack([~torch.isfinite(tensor).all().to(device) for tensor in floats.values()])
    table = Ranks().gather(bad.long()).T.tolist()
    found = [f"{name} on {_on(flags)}" for name, flags in zip(floats, table, strict=True) if any(flags)]
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise DivergedError(
            f"NaN or infinite at step {step}: {'; '.join(found[:3])}{more}. Nothing was saved; earlier checkpoints are "
            "whole"
        )


def _on(flags: list[int] | list[bool]) -> str:
    ranks = [rank for rank, flag in enumerate(flags) if flag]
    if len(ranks) == len(flags):
        return "all ranks" if len(flags) > 1 else "rank 0"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
