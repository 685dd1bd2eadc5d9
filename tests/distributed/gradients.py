"""What two gloo ranks have to show about gradients of pruned weights that are not sent; see `ranks.py`."""

import copy
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distprune.pruning import CubicSchedule, GradientSync, Pruner, Taylor, magnitude
from tests.distributed.ranks import from_all_ranks, run_checks

STEPS = 24
SCHEDULE = CubicSchedule(final=0.9, begin=2, end=12, every=2)


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 300),
        nn.ReLU(), nn.Linear(300, 10),
    )  # fmt: skip


def trained(make_sync, channels_last=False, view=False, score=magnitude, accumulate=1, clip=None, schedule=SCHEDULE):
    """The weights and momentum of each step of a training, and what `make_sync` has made."""
    model = network()
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view, bucket_cap_mb=0.2)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    pruner = Pruner(wrapped, optimizer, schedule, score=score)
    sync = make_sync(pruner, wrapped)
    torch.manual_seed(dist.get_rank())
    seen = []
    for _ in range(STEPS):
        for part in range(accumulate):
            images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
            with wrapped.no_sync() if part + 1 < accumulate else nullcontext():
                nn.functional.cross_entropy(wrapped(images), labels).backward()
        if clip is not None:
            pruner.mask_gradients()
            nn.utils.clip_grad_norm_(wrapped.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        state = [value["momentum_buffer"] for value in optimizer.state.values()]
        seen.append(copy.deepcopy([*model.state_dict().values(), *state]))
    assert abs(pruner.sparsity - schedule.final) < 1e-3
    return seen, sync


@contextmanager
def messages():
    """The sizes of all-reduced tensors, in elements."""
    sizes, reduce = [], dist.all_reduce

    def noted(tensor, *words, **more):
        sizes.append(tensor.numel())
        return reduce(tensor, *words, **more)

    with mock.patch("distprune.pruning.gradsync.dist.all_reduce", noted):
        yield sizes


def training_is_that_of_masked_dense_gradients_to_the_bit(own_group) -> None:
    for options in (
        {},
        {"channels_last": True},
        {"view": True},
        {"score": Taylor()},
        {"accumulate": 2, "clip": 0.5},
    ):
        expected, _ = trained(lambda pruner, model: None, **options)
        found, _ = trained(lambda pruner, model: GradientSync(pruner, model, packed=True), **options)
        for step, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (options, step)


def what_travels_falls_with_what_is_left(own_group) -> None:
    model = network()
    weights, all_weights = 0, sum(p.numel() for p in model.parameters())
    for layer in model:
        weights += layer.weight.numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
    with messages() as sizes:
        trained(lambda pruner, model: GradientSync(pruner, model, packed=True))
    left, last = all_weights - round(0.9 * weights), []
    while sum(last) < left:
        last.append(sizes.pop())
    assert sum(last) == left, (last, left)


def both_ways_are_measured_and_all_ranks_take_the_faster(own_group) -> None:
    reduce = dist.all_reduce

    def slow_link(tensor, *words, **more):
        time.sleep(tensor.numel() * 1e-6)
        return reduce(tensor, *words, **more)

    with mock.patch("distprune.pruning.gradsync.dist.all_reduce", slow_link):
        found, sync = trained(GradientSync)
    assert from_all_ranks(sync.is_packed) == [True] * dist.get_world_size()
    expected, _ = trained(lambda pruner, model: None)
    assert all(torch.equal(a, b) for a, b in zip(found[-1], expected[-1], strict=True)), "trials change nothing"

    unpack = GradientSync._unpack

    def slow_unpacking(self, buffer, part, places, *more):
        time.sleep(0.01 if places is not None and dist.get_rank() else 0)
        return unpack(self, buffer, part, places, *more)

    with mock.patch.object(GradientSync, "_unpack", slow_unpacking):
        _, sync = trained(GradientSync, schedule=CubicSchedule(final=0.5, begin=2, end=4, every=2))
    assert from_all_ranks(sync.is_packed) == [False] * dist.get_world_size()


def nothing_is_packed_while_nothing_is_pruned(own_group) -> None:
    late = CubicSchedule(final=0.05, begin=STEPS - 2, end=STEPS, every=1)
    with messages() as sizes:
        _, sync = trained(GradientSync, schedule=late)
    assert not sync.is_packed
    assert not sync._places
    assert sum(sizes) >= STEPS * sum(p.numel() for p in network().parameters())


def the_pruner_of_another_model_is_refused(own_group) -> None:
    model, other = network(), DistributedDataParallel(network())
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE)
    with pytest.raises(ValueError, match=r"0\.weight, 3\.weight"):
        GradientSync(pruner, other)


CHECKS = [
    training_is_that_of_masked_dense_gradients_to_the_bit,
    what_travels_falls_with_what_is_left,
    both_ways_are_measured_and_all_ranks_take_the_faster,
    nothing_is_packed_while_nothing_is_pruned,
    the_pruner_of_another_model_is_refused,
]

if __name__ == "__main__":
    run_checks(CHECKS, Path(sys.argv[1]))
