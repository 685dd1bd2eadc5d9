"""What several gloo ranks have to show about patterns, on replicas and shards; see `ranks.py`."""

import copy
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from distprune.pruning import (
    NM,
    Blocks,
    Bounds,
    Columns,
    GlobalAllocation,
    Pruner,
    Random,
    Rows,
    UniformAllocation,
)
from tests.distributed.ranks import Traffic, run_checks
from tests.distributed.same_masks import channels_last, few_values, normal
from tests.distributed.sharded import assert_same, layouts, placed
from tests.pruning.reference import Bag, Levels


def models() -> dict[str, list[torch.Tensor]]:
    """Widths that most shards cut in the middle of a group, or several times."""
    torch.manual_seed(8)
    wide = [normal(40, 32), few_values(9, 16), normal(8, 8, 3, 3), normal(300, 5), few_values(12, 8, 1, 1)]
    cut = [few_values(7, 12), normal(300, 5), few_values(5, 4, 3, 2), normal(1, 20), few_values(6, 40)]
    strided = [channels_last(few_values(7, 12, 3, 3)), normal(300, 5), few_values(20, 9).t()]
    return {"wide": wide, "cut": cut, "strided": strided}


def patterns_are_those_of_one_process(alone):
    options = {"pattern": NM(2, 4), "min_weights": 0, "include": ["*"]}
    for (layout, places), (name, whole) in product({"replicas": [None], **layouts()}.items(), models().items()):
        for allocation in (GlobalAllocation(), *[UniformAllocation()] * (name == "cut")):
            tensors = [placed(t, places[i % len(places)]) for i, t in enumerate(whole)]
            found = []
            for given, group in ((tensors, None), (copy.deepcopy(whole), alone)):
                model = Bag(given)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                schedule = Levels((0.2, 0.45, 0.5))
                pruner = Pruner(model, optimizer, schedule, allocation=allocation, group=group, **options)
                found.append((pruner, optimizer))
            (ours, optimizer), (single, single_optimizer) = found
            for level in (0.2, 0.45, 0.5):
                ours.step(), single.step()
                assert ours.zeros == round(level * ours.weights)
                assert_same(ours, single, f"{layout}, {name}, at {level}")
                optimizer.step(), single_optimizer.step()
            for mask in single.masks.values():
                assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


def of_groups_only_those_travel_that_a_shard_cuts(alone):
    ranks, rows = dist.get_world_size(), 50
    line = layouts()["dim 1"][0]
    sent = {}
    for width in (500 * ranks, 500 * ranks + 2 * ranks * (ranks % 2 + 1)):
        model = Bag([placed(normal(rows, width), line)])
        pruner = Pruner(
            model, torch.optim.SGD(model.parameters(), lr=0.1), Levels((0.5,)), include=["*"], pattern=NM(2, 4)
        )
        with Traffic() as traffic:
            pruner.step()
        assert set(traffic.kinds) == {"allreduce"}, traffic.kinds
        sent[width] = traffic.bytes
    whole, cut = sent.values()
    cuts = sum(place * (500 + 2 * (ranks % 2 + 1)) % 4 > 0 for place in range(1, ranks))
    assert cut - whole == cuts * 4 * rows * 8, sent
    assert (cuts > 0) == (ranks != 3)


def blocks_are_those_of_one_process(alone):
    for (layout, places), name in product({"replicas": [None], **layouts()}.items(), ("cut", "strided")):
        whole = [*models()[name], normal(8, 16, dtype=torch.bfloat16), normal(10, 12, 3)]
        for pattern, options in (
            (Blocks(4, 4), {}),
            (Blocks(3, 2), {"score": Random(1)}),
            (Blocks(2, 8), {"allocation": UniformAllocation()}),
            (Rows(), {"score": lambda piece: piece.weight - 0.3}),
            (Columns(), {"bounds": {"last": Bounds(max=0.5)}}),
            (Rows(), {"min_weights": 0}),
        ):
            tensors = [placed(t, places[i % len(places)]) for i, t in enumerate(whole)]
            pruners = []
            for given, group in ((tensors, None), (copy.deepcopy(whole), alone)):
                model = Bag(given)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                schedule = Levels((0.2, 0.45, 0.6))
                pruner = Pruner(model, optimizer, schedule, include=["*"], pattern=pattern, group=group, **options)
                pruners.append((pruner, optimizer))
            (ours, optimizer), (single, single_optimizer) = pruners
            for level in (0.2, 0.45, 0.6):
                with Traffic() as traffic:
                    report = ours.step()
                single_report = single.step()
                where = f"{layout}, {name}, {pattern}, at {level}"
                assert (report.threshold, report.held) == (single_report.threshold, single_report.held), where
                assert_same(ours, single, where)
                assert ours.zeros > 0 or level < 0.6, where
                assert set(traffic.kinds) <= {"allreduce"}, (where, traffic.kinds)
                optimizer.step(), single_optimizer.step()


def of_blocks_only_the_sums_of_those_travel_that_a_shard_cuts(alone):
    ranks, columns = dist.get_world_size(), 400
    sent = []
    for rows in (40 * ranks, {2: 84, 3: 124, 4: 168}[ranks]):  # shards of 40 rows, or 42
        model = Bag([placed(normal(rows, columns), layouts()["dim 0"][0])])
        options = {"include": ["*"], "pattern": Blocks(4, 4), "allocation": UniformAllocation()}
        pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), Levels((0.5,)), **options)
        with Traffic() as traffic:
            pruner.step()
        sent.append(traffic.bytes)
    assert sent[1] - sent[0] == ranks // 2 * (columns // 4) * 8, sent


CHECKS = (
    blocks_are_those_of_one_process,
    of_blocks_only_the_sums_of_those_travel_that_a_shard_cuts,
    patterns_are_those_of_one_process,
    of_groups_only_those_travel_that_a_shard_cuts,
)

if __name__ == "__main__":
    run_checks(CHECKS, Path(sys.argv[1]))
