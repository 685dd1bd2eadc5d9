"""Pruning in the Trainer of Lightning: `lightning.pytorch`, or `pytorch_lightning` where that is not installed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from distprune.integrations.base import CallbackBase
from distprune.integrations.whole_state import whole_state


class PruningCallback(CallbackBase, Callback):  # type: ignore[misc]
    """Prunes what a Lightning `Trainer` fits with one optimizer, on one device, under DDP and under FSDP2
    (`ModelParallelStrategy`); settings are those of `CallbackBase`.

    - Masks are updated when an optimizer step is complete, whatever the accumulation of gradients.
    - Gradients of pruned weights are set to 0 before Lightning clips them. In manual optimization, call
      `callback.pruner.mask_gradients()` before you clip.
    - The loggers get `prune/sparsity` and others; names of checkpoint files may have them too.
    - The masks are part of Lightning's checkpoints. Training goes on from them exactly, on as many ranks or others.
    - `ModelCheckpoint(monitor=...)` and `EarlyStopping` compare models of different sparsity; training begins with a
      warning if there is one.
    """

    _saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the Pruner; see `Callback`.

        Raises:
            ValueError: there is not one optimizer; training goes on without masks; or see `CallbackBase._start`.
        """
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"configure_optimizers returns {len(trainer.optimizers)} optimizers, and PruningCallback prunes what "
                "one trains: make them parameter groups of one, or make a distprune.Pruner for each in your module"
            )
        saved = self._saved if trainer.ckpt_path else None
        self._saved = None
        if trainer.global_step and saved is None:
            source = trainer.ckpt_path or "this Trainer"
            raise ValueError(
                f"training goes on from step {trainer.global_step}, but {source} has no masks of it: go on from a "
                "checkpoint written with PruningCallback, fit(..., ckpt_path=...), or load the model alone and start "
                "anew with another Trainer"
            )
        steps = trainer.estimated_stepping_batches
        known = math.isfinite(steps) and steps > 0
        self._start(pl_module, next(iter(trainer.optimizers), None), int(steps) if known else None, saved)
        watching = sorted({type(c).__name__ for c in trainer.callbacks if getattr(c, "monitor", None) is not None})
        if watching and trainer.is_global_zero:
            warnings.warn(
                f"{' and '.join(watching)} may prefer a model from before the last update of the masks, which is less "
                "sparse; prune/sparsity says how sparse each is",
                stacklevel=2,
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask gradients before they are clipped; see `Callback`."""
        assert self.pruner is not None
        self.pruner.mask_gradients()

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the masks if that is due, and log; see `Callback`."""
        self._advance()
        self.log_dict(self._figures())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizer; see `Callback`."""
        if (problem := self._finish()) and trainer.is_global_zero:
            warnings.warn(problem, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Masks as packed bits, whole on every rank, and the place in the schedule; see `Callback`."""
        return {} if self.pruner is None else whole_state(self.pruner)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the Pruner is made; see `Callback`."""
        self._saved = state_dict
