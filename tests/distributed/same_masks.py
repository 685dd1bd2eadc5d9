"""What several gloo ranks have to show about pruning weights that each of them holds whole; see `ranks.py`."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distprune.pruning import (
    CubicSchedule,
    MaskMismatchError,
    NonFiniteError,
    Pruner,
    WeightMismatchError,
    compare_replicas,
)
from distprune.pruning.collectives import Ranks
from distprune.pruning.prunable import find_prunable
from distprune.pruning.scorer import Scorer
from distprune.pruning.scores import magnitude
from distprune.pruning.shards import CHUNK, flat
from distprune.pruning.threshold import Search, share
from tests.distributed.ranks import MIB, Traffic, bits, from_all_ranks, messages_of, run_checks
from tests.pruning.reference import Bag, Levels, prune_by_sort

LEVELS = (0.1, 0.5, 0.5, 0.83, 0.99)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def few_values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(memory_format=torch.channels_last)


def models() -> dict[str, list[torch.Tensor]]:
    """Weights by name of the model; the same on every rank."""
    torch.manual_seed(1)
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    return {
        "no ties": [normal(40, 30), normal(1000), normal(8, 3, 3, 3)],
        "ties": [few_values(40, 30), few_values(7), few_values(8, 3, 3, 3)],
        "all equal": [torch.ones(31, 7), -torch.ones(100)],
        "half precision": [normal(50, 40, dtype=bf16), normal(50, 40, dtype=f16), normal(300)],
        "all dtypes": [normal(300, dtype=d) for d in (f32, f64, bf16, f16)],
        "all dtypes with ties": [few_values(300, dtype=d) for d in (bf16, f64, f32, f16)],
        "channels_last": [channels_last(normal(8, 5, 3, 3)), channels_last(few_values(9, 7, 3, 3))],
        "transposed": [normal(30, 40).t(), few_values(50, 7).t()],
        "empty tensors": [torch.empty(0), few_values(50), torch.empty(3, 0), normal(33), torch.empty(0, 2)],
        "one tensor": [few_values(1001)],
        "one weight": [torch.ones(1)],
        "three weights": [torch.ones(1), torch.zeros(2)],
        "denormals and zeros": [few_values(200) * 1.4e-45, few_values(100, dtype=f16) * 6e-8, -torch.zeros(20)],
        "longer than a chunk": [normal(CHUNK + 17), few_values(100, 3), normal(CHUNK // 2, dtype=bf16)],
    }


def pruner_of(tensors: list[torch.Tensor], levels=LEVELS, group=None) -> tuple[Pruner, torch.optim.Optimizer]:
    model = Bag(copy.deepcopy(tensors))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Pruner(model, optimizer, Levels(levels), include=["*"], min_weights=0, group=group), optimizer


def traffic_of_each_update(tensors: list[torch.Tensor], levels=LEVELS) -> list[Traffic]:
    pruner, optimizer = pruner_of(tensors, levels)
    found = []
    for _ in levels:
        with Traffic() as traffic:
            pruner.step()
        optimizer.step()
        found.append(traffic)
    return found


def masks_are_those_of_one_process_and_of_a_stable_sort(alone):
    for name, tensors in models().items():
        together, optimizer = pruner_of(tensors)
        single, single_optimizer = pruner_of(tensors, group=alone)
        for level in LEVELS:
            k = round(level * together.weights)
            weights = [t.weight for t in together.tensors]
            expected = prune_by_sort(weights, list(together.masks.values()), k) if together.weights < 10**4 else None
            report, single_report = together.step(), single.step()
            where = f"{name} at {level}"
            assert together.zeros == single.zeros == k, where
            assert all(torch.equal(m, single.masks[n]) for n, m in together.masks.items()), where
            assert together.mask_digest == single.mask_digest, where
            assert report.threshold == single_report.threshold, where
            if expected:
                assert [m.flatten().tolist() for m in together.masks.values()] == expected, where
            assert bits(t.weight for t in together.tensors) == bits(t.weight for t in single.tensors), where
            assert len(set(from_all_ranks(together.mask_digest))) == 1, where
            for o in (optimizer, single_optimizer):
                o.step()
            for ours, theirs in zip(together.tensors, single.tensors, strict=True):
                for weight in (ours.weight, theirs.weight):  # training goes on, the same on every rank
                    weight.detach().mul_(-1.5)


def an_update_takes_at_most_4_collectives_and_a_mebibyte(alone):
    for tensors in (models()["no ties"], [torch.randperm(CHUNK + 17) / 7]):
        for traffic in traffic_of_each_update(tensors):
            assert 1 <= traffic.calls <= 4, (len(tensors), traffic.calls)
            assert 0 < traffic.bytes <= MIB, (len(tensors), traffic.bytes)


def an_update_that_splits_ties_takes_at_most_8_collectives_and_a_mebibyte(alone):
    for name in ("ties", "all equal", "half precision", "channels_last", "empty tensors", "denormals and zeros"):
        for traffic in traffic_of_each_update(models()[name]):
            assert traffic.calls <= 8, (name, traffic.calls)
            assert traffic.bytes <= MIB, (name, traffic.bytes)


def float64_weights_that_agree_in_48_bits_take_at_most_5_collectives(alone):
    # One more than the budget: 63 bits take four digits, and a digit of more than 16 bits would exceed the mebibyte.
    close = (torch.tensor(1.0).double().view(torch.int64) + torch.randperm(3000)).view(torch.float64)
    for traffic in traffic_of_each_update([close]):
        assert traffic.calls <= 5, traffic.calls
        assert traffic.bytes <= MIB, traffic.bytes
    for traffic in traffic_of_each_update([normal(3000, dtype=torch.float64)]):
        assert traffic.calls <= 4, traffic.calls


def float64_ties_take_at_most_8_collectives_and_a_mebibyte(alone):
    for name in ("all dtypes", "all dtypes with ties"):
        for traffic in traffic_of_each_update(models()[name]):
            assert traffic.calls <= 8, (name, traffic.calls)
            assert traffic.bytes <= MIB, (name, traffic.bytes)


def traffic_does_not_grow_with_the_model(alone):
    small, large = (traffic_of_each_update([few_values(n)], [0.5])[0] for n in (1000, 1_000_000))
    assert large.bytes < 1.1 * small.bytes


def a_step_without_an_update_takes_no_collective(alone):
    pruner, optimizer = pruner_of(models()["ties"])
    pruner.schedule = CubicSchedule(final=0.5, begin=2, end=4, every=2)
    with Traffic() as traffic:
        pruner.step()
        optimizer.step()
        pruner.step()
    assert traffic.calls == 0


def search(tensors, masks, ranks: Ranks) -> Search:
    return Search(tensors, masks, [0] * len(tensors), Scorer(magnitude, tensors), ranks)


def ranks_share_the_counting_and_read_nothing_else(alone):
    for name in ("no ties", "ties", "channels_last", "transposed", "empty tensors", "one weight", "one tensor"):
        model = Bag(models()[name])
        selection = find_prunable(model, include=["*"])
        masks = [torch.ones_like(t.weight, dtype=torch.bool) for t in selection.tensors]
        k = selection.numel // 2
        whole = find_prunable(model, include=["*"], ranks=Ranks(alone)).tensors
        expected = search(whole, masks, Ranks(alone)).together(k) if k else None
        pieces = share(selection.tensors)
        counted = sum(stop - start for _, start, stop in pieces)
        shares = from_all_ranks(counted)
        assert sum(shares) == selection.numel, name
        assert max(shares) - min(shares) <= 1, name
        mine = {number: flat(selection.tensors[number].local)[start:stop].clone() for number, start, stop in pieces}
        for tensor in selection.tensors:
            tensor.weight.detach().fill_(torch.nan)
        for number, start, stop in pieces:
            flat(selection.tensors[number].local)[start:stop] = mine[number]
        if k:
            assert search(selection.tensors, masks, Ranks()).together(k) == expected, name


def training_under_ddp_keeps_weights_and_masks_equal(alone):
    torch.manual_seed(dist.get_rank())  # ranks start apart; DDP brings them together
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    model = DistributedDataParallel(net.to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    schedule = CubicSchedule(final=0.9, begin=2, end=9, every=3)
    pruner = Pruner(model, optimizer, schedule)
    assert list(pruner.masks) == ["0.weight", "3.weight"]
    seen_data = set()
    for step in range(1, 13):
        images = torch.randn(4, 3, 5, 5)
        seen_data.add(bits([images]))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.randint(5, (4,))).backward()
        pruner.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pruner.step()
        assert not any(t.weight[~pruner.masks[t.name]].any() for t in pruner.tensors)
        if schedule.is_update(step):
            zeros = sum(int((t.weight == 0).sum()) for t in pruner.tensors)
            assert zeros == round(schedule.sparsity(step) * 576)
        assert len(set(from_all_ranks(bits(model.parameters())))) == 1
        assert len(set(from_all_ranks(bits(pruner.masks.values())))) == 1
    assert pruner.zeros == round(0.9 * 576)
    assert len(set().union(*from_all_ranks(seen_data))) == 12 * dist.get_world_size()


def nan_raises_the_same_error_on_every_rank(alone):
    pruner, optimizer = pruner_of(models()["no ties"])
    pruner.step()
    optimizer.step()
    kept = pruner.masks["tensors.1"].nonzero().view(-1)
    pruner.tensors[1].weight.detach()[kept[[0, 5, -1]]] = torch.nan
    pruner.tensors[2].weight.detach()[pruner.masks["tensors.2"]] = torch.inf
    infinite = int(pruner.masks["tensors.2"].sum())
    before = bits([t.weight for t in pruner.tensors]), pruner.mask_digest, pruner.zeros
    messages = messages_of(NonFiniteError, pruner.step)
    assert len(set(messages)) == 1, messages
    assert f"step 1: tensors.1: 3 of 1000; tensors.2: {infinite} of 216" in messages[0], messages
    assert (bits([t.weight for t in pruner.tensors]), pruner.mask_digest, pruner.zeros) == before


def a_flipped_bit_is_reported_on_every_rank_by_rank_and_tensor(alone):
    last = dist.get_world_size() - 1
    for next_act in ("verify", "step"):
        pruner, optimizer = pruner_of(models()["no ties"])
        pruner.step()
        optimizer.step()
        pruner.verify()
        if dist.get_rank() == last:
            mask = pruner.masks["tensors.1"]
            mask[mask.nonzero()[0]] = False
        messages = messages_of(MaskMismatchError, getattr(pruner, next_act))
        assert len(set(messages)) == 1, messages
        assert "at step 1" in messages[0], messages
        assert messages[0].endswith(f": rank {last}: tensors.1"), messages


def weights_that_differ_between_replicas_are_named_by_rank_and_tensor(alone):
    last = dist.get_world_size() - 1
    tensors = {f"t{i}": tensor for i, tensor in enumerate(models()["half precision"])}
    assert compare_replicas(tensors, 7)
    for name in tensors:
        changed = {n: t.clone() for n, t in tensors.items()}
        if dist.get_rank() == last:
            changed[name].view(-1)[-1] *= -1
        messages = messages_of(WeightMismatchError, lambda changed=changed: compare_replicas(changed, 7))
        who = f"rank {last}: {name}" if last > 1 else f"{name}, with no majority"
        assert set(messages) == {f"weights differ between ranks at step 7: {who}"}, messages


def weights_that_differ_between_ranks_are_reported_on_every_rank(alone):
    pruner, _ = pruner_of(models()["no ties"])
    if dist.get_rank() == 0:
        pruner.tensors[0].weight.detach().mul_(0.01)
    messages = messages_of(MaskMismatchError, pruner.step)
    assert len(set(messages)) == 1, messages
    assert "masks differ between ranks at step 0" in messages[0], messages
    assert "tensors.0" in messages[0], messages


def a_state_saved_by_one_process_goes_on_in_many(alone):
    for name, tensors in models().items():
        single, single_optimizer = pruner_of(tensors, group=alone)
        single.step()
        together, optimizer = pruner_of([t.weight.detach().clone() for t in single.tensors])
        together.load_state_dict(copy.deepcopy(single.state_dict()))
        for pruner, o in ((single, single_optimizer), (together, optimizer)):
            assert pruner.step() is None
            o.step()
            pruner.step()
        assert together.mask_digest == single.mask_digest, name
        assert together.zeros == round(LEVELS[1] * together.weights), name


def a_group_of_some_ranks_prunes_without_the_others(alone):
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        together, _ = pruner_of(models()["ties"], [0.5], group=pair)
        single, _ = pruner_of(models()["ties"], [0.5], group=alone)
        together.step()
        single.step()
        assert together.mask_digest == single.mask_digest


CHECKS = (
    masks_are_those_of_one_process_and_of_a_stable_sort,
    an_update_takes_at_most_4_collectives_and_a_mebibyte,
    an_update_that_splits_ties_takes_at_most_8_collectives_and_a_mebibyte,
    float64_weights_that_agree_in_48_bits_take_at_most_5_collectives,
    float64_ties_take_at_most_8_collectives_and_a_mebibyte,
    traffic_does_not_grow_with_the_model,
    a_step_without_an_update_takes_no_collective,
    ranks_share_the_counting_and_read_nothing_else,
    training_under_ddp_keeps_weights_and_masks_equal,
    nan_raises_the_same_error_on_every_rank,
    a_flipped_bit_is_reported_on_every_rank_by_rank_and_tensor,
    weights_that_differ_between_replicas_are_named_by_rank_and_tensor,
    weights_that_differ_between_ranks_are_reported_on_every_rank,
    a_state_saved_by_one_process_goes_on_in_many,
    a_group_of_some_ranks_prunes_without_the_others,
)


if __name__ == "__main__":
    run_checks(CHECKS, Path(sys.argv[1]))
