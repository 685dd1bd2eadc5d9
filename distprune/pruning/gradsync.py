"""Gradients of pruned weights stay at home: all ranks hold the same masks, so that those of the weights that are left
can be sent in one piece without saying which they are."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distprune.pruning.holder import MaskHolder
from distprune.pruning.shards import flat

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

logger = logging.getLogger(__name__)

MOST_KEPT = 0.9
"""Where more than this share of all gradients is left, packing them is not tried."""
TRIALS = 3
"""Steps of each way that are timed before one is chosen."""
AGAIN = 0.8
"""What was found too slow is tried again when so much of what was left then is left."""


class GradientSync:
    """Averages the gradients of a model wrapped in DistributedDataParallel, without those of pruned weights.

    Make it after model and pruner, before the first backward; it registers itself as the model's communication hook.
    Gradients of pruned weights are 0 afterwards, on every rank; the others are what DDP makes of them, to the bit on
    two ranks (on more, libraries add up in an order that depends on where in a message a number lies).

    Args:
        pruner: of the model; its masks are read when they have changed.
        model: wrapped.
        packed: whether to pack; None measures both ways in the first steps after masks have changed, and packs from
            then on if exchanges end earlier so, on all ranks alike. On GPUs None does not pack, since nothing was
            measured on them yet.

    Raises:
        ValueError: the pruner is of another model.
    """

    def __init__(self, pruner: MaskHolder, model: DistributedDataParallel, packed: bool | None = None) -> None:
        masked = {id(tensor.weight): tensor.name for tensor in pruner.tensors}
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        trained = set(map(id, weights))
        if strange := [name for weight, name in masked.items() if weight not in trained]:
            raise ValueError(f"the pruner is of another model: {', '.join(strange[:4])} is no parameter of this one")
        self.is_packed = bool(packed)
        """Whether gradients are packed now."""
        self._pruner = pruner
        self._names = masked
        self._group = model.process_group
        self._world_size = dist.get_world_size(self._group)
        self._numel = sum(weight.numel() for weight in weights)
        self._is_settled = packed is not None or weights[0].device.type != "cpu"
        self._trial: _Trial | None = None
        self._tried_at = 1.0
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._digest = ""
        self._pruned = 0
        model.register_comm_hook(None, lambda _, bucket: self._exchange(bucket))

    def _exchange(self, bucket: GradBucket) -> Future[Tensor]:
        """Called by DDP on every rank for the same buckets in the same order."""
        if bucket.index() == 0:
            self._begin()
        buffer, is_last = bucket.buffer(), bucket.is_last()
        places = self._places_of(bucket) if self.is_packed and self._pruned else None
        if self._trial is not None and bucket.index() == 0:
            self._trial.began = time.perf_counter()
        # As DDP does it by itself: gradients times 1 / ranks are added up.
        part = (buffer if places is None else buffer.index_select(0, places)).mul_(1 / self._world_size)
        if len(part):
            work = dist.all_reduce(part, group=self._group, async_op=True)
            assert work is not None
            future = work.get_future()
        else:
            future = Future[Any]()
            future.set_result([part])
        return future.then(lambda done: self._unpack(buffer, part, places, is_last, done))

    def _unpack(self, buffer: Tensor, part: Tensor, places: Tensor | None, is_last: bool, done: Future[Any]) -> Tensor:
        done.value()  # raises what went wrong
        if places is not None:
            buffer.zero_().index_copy_(0, places, part)
        if self._trial is not None and is_last:
            self._trial.seconds[self.is_packed].append(time.perf_counter() - self._trial.began)
        return buffer

    def _begin(self) -> None:
        """Look, before a step's first bucket, what to do with all of them."""
        if (digest := self._pruner.mask_digest) != self._digest:
            self._digest = digest
            self._pruned = sum(layer.zeros for layer in self._pruner.layers().values())  # without what was removed
            self._places.clear()
        if self._is_settled:
            return
        if self._trial is None:
            left = 1 - self._pruned / self._numel
            if left > MOST_KEPT or (self._tried_at < 1 and left > AGAIN * self._tried_at):
                return
            self._tried_at, self._trial = left, _Trial()
        dense, packed = self._trial.seconds
        if len(dense) < TRIALS or len(packed) < TRIALS:
            self.is_packed = len(packed) <= len(dense)
            return
        # The first of each is not counted; the slowest rank is who all wait for.
        times = torch.tensor([min(dense[1:]), min(packed[1:])], dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX, group=self._group)
        self.is_packed = self._is_settled = bool(times[1] < times[0])
        self._trial = None
        dense_ms, packed_ms = (1e3 * times).tolist()
        way = "packed" if self.is_packed else "dense"
        logger.info(f"gradients take {dense_ms:.3g} ms a step dense, {packed_ms:.3g} ms packed: {way} from now on")

    def _places_of(self, bucket: GradBucket) -> Tensor:
        """Where in a bucket gradients are left (int64); kept until masks change or buckets are filled otherwise."""
        weights = bucket.parameters()
        key = tuple(map(id, weights))
        if key not in self._places:
            masks = [self._mask(weight) for weight in weights]
            self._places[key] = torch.cat(masks).nonzero()[:, 0]
        return self._places[key]

    def _mask(self, weight: Tensor) -> Tensor:
        """Which elements are left, in memory order, as they lie in a bucket."""
        name = self._names.get(id(weight))
        if name is None:
            return torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        return flat(self._pruner.masks[name])


@dataclass
class _Trial:
    """Seconds from the first bucket of a step to the end of its last, of steps not packed and packed, in turns."""

    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    began: float = 0.0
