"""The model that is pruned, bare and as wrapped for training, which is done anew when it has shrunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Student:
    """Called as the model that it wraps.

    Args:
        bare: the user's model.
        wrapped: as the accelerator has prepared it.
        accelerator: that has.
        compiled: whether the bare model is to be compiled.
        rehearse: runs a wrapped model forward and backward once, see `rehearse`.

    Attributes:
        bare: stays the same object.
        wrapped: is replaced by `wrap_anew`.
    """

    def __init__(
        self,
        bare: nn.Module,
        wrapped: nn.Module,
        accelerator: Accelerator,
        compiled: bool,
        rehearse: Callable[[nn.Module], None],
    ) -> None:
        self.bare = bare
        self.wrapped = wrapped
        self._accelerator = accelerator
        self._compiled = compiled
        self._rehearse = rehearse
        self._sync: Callable[[DistributedDataParallel], object] = lambda wrapped: None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The outputs of the wrapped model."""
        return self.wrapped(*inputs, **named)

    def prepare(self) -> None:
        """Rehearse, and compile on request; before the first step and whenever the model is another."""
        self._rehearse(self.wrapped)
        if self._compiled:
            self.bare.compile()

    def sync_gradients(self, sync: Callable[[DistributedDataParallel], object]) -> None:
        """Call `sync` with the model where it is wrapped in DDP, now and whenever it is wrapped anew."""
        self._sync = sync
        if isinstance(self.wrapped, DistributedDataParallel):
            sync(self.wrapped)

    def wrap_anew(self) -> None:
        """Wrap the bare model, whose parameters are new ones, as it was wrapped before."""
        old = self.wrapped
        if self._compiled:
            # What was compiled for the old parameters is of no use, and counts against the limit of recompilations.
            torch.compiler.reset()
            self.bare._compiled_call_impl = None
        if isinstance(old, DistributedDataParallel):
            self.wrapped = DistributedDataParallel(
                self.bare, old.device_ids, old.output_device, gradient_as_bucket_view=old.gradient_as_bucket_view
            )
            models = self._accelerator._models
            models[:] = [self.wrapped if model is old else model for model in models]
            self.wrapped.training = old.training
        self.prepare()
        self.sync_gradients(self._sync)
