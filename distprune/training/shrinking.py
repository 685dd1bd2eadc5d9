"""Channels that are pruned are removed from a run's model while it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distprune.config.schema import Channels
from distprune.data import Inputs
from distprune.errors import ConfigError
from distprune.pruning import MaskHolder
from distprune.pruning.collectives import Ranks
from distprune.structured import ChannelPruner, kept_of
from distprune.structured.shrink import select
from distprune.tracking.logs import logger
from distprune.training.buffers import sync_buffers
from distprune.training.logits import logits_of
from distprune.training.student import Student
from distprune.training.whole import metadata, plain_state

# Kernels of GPUs for other widths add up in other orders.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}


class ShrinkError(RuntimeError):
    """The model without channels does not compute what it did with their weights at 0."""


@dataclass(frozen=True)
class Shrunk:
    """One removal.

    Attributes:
        step: optimizer steps done.
        params, macs: of the model from then on.
        difference: the largest between outputs before and after.
        step_ms: what a step has taken since the removal before, or since the run began.
    """

    step: int
    params: int
    macs: int
    difference: float
    step_ms: float


class Shrinking:
    """Removes channels when it is time, and brings the model to the shape of a checkpoint. Runs on all ranks.

    Args:
        student: the model.
        pruner: its masks; nothing is done where it prunes weights.
        settings: when.
        at_end: not before the run ends, since rounds may have to go back, or since shards cannot shrink.
        inputs: some, on which outputs before and after are compared.
    """

    def __init__(
        self, student: Student, pruner: MaskHolder, settings: Channels, at_end: bool, inputs: Callable[[], Inputs]
    ) -> None:
        self._student = student
        self._pruner = pruner if isinstance(pruner, ChannelPruner) else None
        self._settings = settings
        self._at_end = at_end
        self._inputs = inputs
        self._updates = 0
        self._since = (0, 0.0)
        self.done: list[Shrunk] = []

    def after_update(self, step: int, seconds: float) -> bool:
        """Remove what an update has pruned, if it is time; whether the model is another now.

        Args:
            step: optimizer steps done.
            seconds: spent training so far.
        """
        pruner = self._pruner
        if pruner is None or self._at_end or not self.removes:
            return False
        self._updates += 1
        live = self._settings.shrink == "live" and self._updates % self._settings.shrink_every == 0
        return (live or pruner.is_final) and self._shrink(pruner, step, seconds)

    def at_end(self, step: int, seconds: float) -> None:
        """Remove what is still there of what is pruned, once all is done; shards keep it until they are written."""
        if self._pruner is not None and self.removes and not self._pruner.is_sharded:
            self._shrink(self._pruner, step, seconds)

    def figures(self) -> dict[str, float]:
        """What the model costs with the channels that are kept, under the names that trackers know."""
        if self._pruner is None:
            return {}
        channels, kept = self._pruner.channels, self._pruner.kept
        return {"params/left": channels.count_parameters(kept), "macs/left": channels.count_macs(kept)}

    @property
    def removes(self) -> bool:
        """Whether what is pruned is gone from the model that is saved."""
        return self._pruner is not None and self._settings.shrink != "never"

    def saved(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The weights to be saved, whole, on rank 0, and what must be known to read them."""
        bare = self._student.bare
        weights = plain_state(bare, dist.get_rank() if dist.is_initialized() else 0)
        if self._pruner is None or not self.removes or not self._pruner.is_sharded:
            return weights, metadata(kept_of(bare))
        where, kept = self._pruner.cut()
        return {name: select(tensor, where.get(name, {})) for name, tensor in weights.items()}, metadata(kept)

    def state(self) -> dict[str, Any] | None:
        """JSON values for `restore`: which units are in the model, and what was removed when."""
        if self._pruner is None:
            return None
        present = self._pruner.present.int().tolist()
        return {
            "channels": self._pruner.channels.digest,
            "present": "".join(map(str, present)),
            "updates": self._updates,
            "since": self._since,
            "done": [asdict(shrunk) for shrunk in self.done],
        }

    def refuse_others(self, state: dict[str, Any] | None) -> None:
        """Refuse a `state` of other channels than were found in the model now.

        Raises:
            ConfigError: it is.
        """
        if self._pruner is not None and state is not None and state["channels"] != self._pruner.channels.digest:
            raise ConfigError(
                "run.dir: its checkpoint was written where other channels were found in the same model; go on with the "
                "versions of distprune, torch and torch-pruning that it was begun with, or choose another run.dir"
            )

    def restore(self, state: dict[str, Any] | None) -> None:
        """Give the model the shape it had when `state` was taken; what is in it, a checkpoint must fill."""
        if self._pruner is None or state is None:
            return
        self._updates, self._since = state["updates"], tuple(state["since"])
        self.done = [Shrunk(**values) for values in state["done"]]
        if self._pruner.reshape(torch.tensor([mark == "1" for mark in state["present"]])):
            self._student.wrap_anew()

    def _shrink(self, pruner: ChannelPruner, step: int, seconds: float) -> bool:
        if torch.equal(pruner.kept, pruner.present):
            return False
        sync_buffers(self._student.bare)  # as wrapping anew does
        before = self._outputs()
        pruner.shrink()
        self._student.wrap_anew()
        after = self._outputs()
        difference, largest = Ranks().max(torch.stack([_largest(before - after), _largest(before)])).tolist()
        if not math.isfinite(difference) or difference > TOLERANCE[before.device.type] * max(1.0, largest):
            raise ShrinkError(f"channels were removed at step {step}, and outputs differ by {difference:.2g}")
        steps, then = self._since
        step_ms = 1000 * (seconds - then) / max(step - steps, 1)
        self._since = step, seconds
        channels = pruner.channels
        now = Shrunk(
            step, channels.count_parameters(pruner.present), channels.count_macs(pruner.present), difference, step_ms
        )
        self.done.append(now)
        logger.info(
            f"step {step}: the model shrinks to {now.params:,} parameters and {now.macs:,} multiply-accumulates; a "
            f"step took {step_ms:.1f} ms before; outputs differ by {difference:.1g}"
        )
        return True

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        """Of the bare model on some inputs, in float32."""
        bare, inputs = self._student.bare, self._inputs()
        was_training = bare.training
        bare.eval()
        exact = torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
        )
        with exact:
            forward = type(bare).forward  # without the autocast that accelerate has put around the instance's
            outputs: Tensor = logits_of(partial(forward, bare), inputs)
        bare.train(was_training)
        return outputs.float()


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude; infinity where one is NaN, which a maximum over ranks may lose."""
    return values.abs().nan_to_num(nan=math.inf, posinf=math.inf).max()
