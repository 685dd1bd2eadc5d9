"""What several gloo ranks have to show about allocations, bounds and scores, on replicas and shards; see `ranks.py`."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from distprune.pruning import (
    Bounds,
    ErdosRenyiKernel,
    LampAllocation,
    Movement,
    Pruner,
    Random,
    TableAllocation,
    Taylor,
    UniformAllocation,
)
from distprune.pruning.shards import local
from tests.distributed.ranks import MIB, Traffic, run_checks
from tests.distributed.same_masks import few_values, normal
from tests.distributed.sharded import assert_same, layouts, placed
from tests.pruning.reference import Bag, Levels

LEVELS = (0.3, 0.5, 0.85)
WAYS = {
    "global": {},
    "global, one layer would be emptied": {"min_weights": 3},
    "global with bounds": {
        "bounds": {"tensors.0": Bounds(max=0.7), "tensors.[23]": Bounds(min=0.85), "*": Bounds(max=0.97)}
    },
    "uniform": {"allocation": UniformAllocation()},
    "uniform with bounds": {"allocation": UniformAllocation(), "bounds": {"tensors.1": Bounds(max=0.75)}},
    "erk": {"allocation": ErdosRenyiKernel()},
    "lamp": {"allocation": LampAllocation()},
    "lamp with bounds": {"allocation": LampAllocation(), "bounds": {"tensors.1": Bounds(max=0.75)}},
    "table": {"allocation": TableAllocation({"*.0": 0.86, "*": 0.85})},
    "random": {"score": Random(7)},
    "own": {"score": lambda piece: piece.weight - 0.3, "allocation": UniformAllocation()},
}


def models() -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(4)
    return {
        "no ties": [normal(40, 30), normal(9, 11) * 1e-3, normal(8, 4, 3, 3), normal(300, 5)],
        "ties": [few_values(40, 30), few_values(9, 11), few_values(8, 4, 3, 3), few_values(300, 5)],
        "bfloat16": [normal(40, 30, dtype=torch.bfloat16), normal(9, 11), normal(8, 4, 3, 3), normal(300, 5)],
        "float64": [normal(40, 30, dtype=torch.float64), normal(9, 11), normal(8, 4, 3, 3), normal(300, 5)],
    }


def pruner_of(tensors, options, group=None):
    model = Bag(tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Pruner(model, optimizer, Levels(LEVELS), include=["*"], group=group, **options), optimizer


def every_allocation_gives_the_masks_of_one_process(alone):
    for layout, places in {"replicas": [None], **layouts()}.items():
        for name, tensors in models().items():
            if name != "no ties" and layout not in ("replicas", "dim 0", "mixed"):
                continue
            for way, options in WAYS.items():
                ours, optimizer = pruner_of(
                    [placed(t, places[i % len(places)]) for i, t in enumerate(tensors)], options
                )
                single, single_optimizer = pruner_of(copy.deepcopy(tensors), options, alone)
                for level in LEVELS:
                    where = f"{way}, {name}, {layout}, at {level}"
                    report, single_report = ours.step(), single.step()
                    assert ours.zeros == round(level * ours.weights), where
                    assert (report.threshold, report.held) == (single_report.threshold, single_report.held), where
                    assert_same(ours, single, where)
                    optimizer.step()
                    single_optimizer.step()


def an_update_never_gathers_and_what_travels_does_not_grow_with_the_weights(alone):
    for way, options in WAYS.items():
        sizes = []
        for rows in (100, 10_000):
            torch.manual_seed(5)
            tensors = [normal(rows, 12), normal(rows, 20) * 1e-3, normal(rows, 3, 3), normal(rows)]
            pruner, _ = pruner_of([placed(t, layouts()["dim 0"][0]) for t in tensors], options)
            with Traffic() as traffic:
                pruner.step()
            assert set(traffic.kinds) <= {"allreduce"}, (way, traffic.kinds)
            assert traffic.calls <= 16, (way, traffic.kinds)
            sizes.append(traffic.bytes)
        assert sizes[1] <= 2 * sizes[0] + MIB // 4, (way, sizes)
        assert sizes[1] <= 2 * MIB, (way, sizes)


def net() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(12, 30, bias=False), nn.Tanh(), nn.Linear(30, 9, bias=False))


def scores_by_gradients_are_those_of_one_process_on_the_whole_batch(alone):
    # Under DDP and FSDP gradients are means over ranks; the one process sees the whole batch.
    from torch.distributed.fsdp import fully_shard

    for score in (Taylor(), Movement()):
        for kind in ("ddp", "fsdp"):
            model, plain = net(), net()
            wrapped = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
            levels = Levels((0.0, 0.0, 0.0, 0.5, 0.5, 0.8))
            together = Pruner(wrapped, optimizers[0], levels, score=score)
            single = Pruner(plain, optimizers[1], levels, score=score, group=alone)
            for step in range(6):
                torch.manual_seed(step)
                batch = torch.randn(4 * dist.get_world_size(), 12)
                mine = batch.chunk(dist.get_world_size())[dist.get_rank()]
                wrapped(mine).square().mean().backward()
                plain(batch).square().mean().backward()
                for ours, theirs in zip(together.tensors, single.tensors, strict=True):
                    # Means are added up in another order; from the same gradients scores are the same bits.
                    gradient = ours.weight.grad
                    whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                    torch.testing.assert_close(theirs.weight.grad, whole)
                    theirs.weight.grad.copy_(whole)
                for optimizer, pruner in zip(optimizers, (together, single), strict=True):
                    optimizer.step()
                    pruner.step()
                    optimizer.zero_grad()
                assert_same(together, single, f"{type(score).__name__}, {kind}, step {step}")
                for name, seen in together.state_dict()["observed"].items():
                    whole = seen.full_tensor() if hasattr(seen, "full_tensor") else seen
                    assert torch.equal(whole, local(single.state_dict()["observed"][name])), (kind, step)
            assert together.zeros == round(0.8 * together.weights)


CHECKS = (
    every_allocation_gives_the_masks_of_one_process,
    an_update_never_gathers_and_what_travels_does_not_grow_with_the_weights,
    scores_by_gradients_are_those_of_one_process_on_the_whole_batch,
)

if __name__ == "__main__":
    run_checks(CHECKS, Path(sys.argv[1]))
