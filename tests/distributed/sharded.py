"""What several gloo ranks have to show about pruning weights of which each holds a shard; see `ranks.py`.

The reference is everywhere one process that prunes the same weights, unsharded.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from distprune.pruning import (
    CubicSchedule,
    MaskMismatchError,
    NonFiniteError,
    Pruner,
    WeightMismatchError,
    compare_replicas,
)
from distprune.pruning.collectives import Ranks
from distprune.pruning.shards import CHUNK, local
from distprune.pruning.threshold import share
from distprune.tracking import BINS
from distprune.training.histograms import count, largest
from tests.distributed.ranks import MIB, Traffic, bits, from_all_ranks, messages_of, run_checks
from tests.distributed.same_masks import channels_last, few_values, models, normal
from tests.pruning.reference import Bag, Levels

LEVELS = (0.2, 0.5, 0.83)
MANY_KINDS = ("ties", "all dtypes with ties", "channels_last, uneven", "first dimension smaller than the ranks")
SCHEDULE = CubicSchedule(final=0.8, begin=1, end=5, every=2)
INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def meshes() -> dict[str, DeviceMesh]:
    """All ranks in a line, and four of them also as 2 replicas x 2 shards."""
    world_size = dist.get_world_size()
    found = {"line": init_device_mesh("cpu", (world_size,))}
    if world_size == 4:
        found["square"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return found


def layouts() -> dict[str, list[tuple[DeviceMesh, list[Placement]] | None]]:
    """Where tensors lie, by name; the i-th tensor of a model as the i-th entry says, from the first again behind the
    last. None is a plain tensor, that every rank holds whole."""
    line = meshes()["line"]
    found = {
        "dim 0": [(line, [Shard(0)])],
        "dim 1": [(line, [Shard(1)])],
        "last dim": [(line, [Shard(-1)])],
        "mixed": [None, (line, [Shard(2)]), (line, [Shard(0)]), (line, [Replicate()]), (line, [Shard(1)])],
    }
    if (square := meshes().get("square")) is not None:
        found |= {
            "HSDP": [(square, [Replicate(), Shard(0)])],
            "HSDP the other way round": [(square, [Shard(0), Replicate()])],
            "HSDP in dim 1": [(square, [Replicate(), Shard(1)])],
            "dim 0 twice": [(square, [Shard(0), Shard(0)])],
            "two dims": [(square, [Shard(0), Shard(1)]), (square, [Shard(1), Shard(0)])],
            "two meshes": [(square, [Replicate(), Shard(0)]), (line, [Shard(0)]), (square, [Shard(1), Shard(1)]), None],
        }
    return found


def placed(tensor: torch.Tensor, where: tuple[DeviceMesh, list[Placement]] | None) -> torch.Tensor:
    if where is None or tensor.dim() == 0:
        return tensor.clone()
    mesh, placements = where
    fitting = [Shard(min(p.dim, tensor.dim() - 1)) if isinstance(p, Shard) else p for p in placements]
    return distribute_tensor(tensor.clone(), mesh, fitting)


def sharded_models() -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(2)
    small = [few_values(1, 40), normal(3, 2, 3, 3), few_values(2, 5, 3, 3), normal(5, 7), normal(1), few_values(2)]
    strided = [channels_last(few_values(7, 6, 3, 3)), few_values(9, 14).t(), channels_last(normal(3, 8, 5, 3))]
    return models() | {"first dimension smaller than the ranks": small, "channels_last, uneven": strided}


def pruner_of(tensors: list[torch.Tensor], levels=LEVELS, group=None) -> tuple[Pruner, torch.optim.Optimizer]:
    model = Bag(tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Pruner(model, optimizer, Levels(levels), include=["*"], min_weights=0, group=group), optimizer


def assembled(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The whole of what is sharded as `weight` is."""
    if not isinstance(weight, DTensor):
        return part
    shape, stride = weight.shape, weight.stride()
    part = part.to(torch.int32) if part.dtype == torch.bool else part
    whole = DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)
    return whole.full_tensor()


def assert_same(sharded: Pruner, single: Pruner, where: str) -> None:
    """Masks, digest and counts are those of one process, and nothing lives at a pruned place."""
    for ours, theirs in zip(sharded.tensors, single.tensors, strict=True):
        mask = sharded.masks[ours.name]
        assert torch.equal(assembled(mask, ours.weight).bool(), single.masks[theirs.name]), (where, ours.name)
        weight = ours.local
        assert not weight.view(INT_OF_SIZE[weight.element_size()])[~mask].any(), (where, ours.name, "not +0")
        assert sharded.layers()[ours.name] == single.layers()[theirs.name], (where, ours.name)
        for key, state in sharded._optimizer.state.get(ours.weight, {}).items():
            if isinstance(state, torch.Tensor) and state.dim() == ours.weight.dim() > 0:
                assert not local(state)[~mask].any(), (where, ours.name, key)
    assert sharded.mask_digest == single.mask_digest, where
    assert sharded.zeros == single.zeros, where
    assert len(set(from_all_ranks((sharded.mask_digest, sharded.zeros)))) == 1, where


def masks_are_those_of_one_process_however_the_weights_are_sharded(alone):
    for layout, places in layouts().items():
        every_model = layout in ("dim 0", "mixed")
        for name, tensors in sharded_models().items():
            if not every_model and name not in MANY_KINDS:
                continue
            sharded, optimizer = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
            single, single_optimizer = pruner_of(copy.deepcopy(tensors), group=alone)
            for level in LEVELS:
                where = f"{name}, {layout}, at {level}"
                with Traffic() as traffic:
                    report = sharded.step()
                single_report = single.step()
                assert sharded.zeros == round(level * sharded.weights), where
                assert report.threshold == single_report.threshold, where
                assert_same(sharded, single, where)
                assert traffic.calls <= 8, (where, traffic.kinds)
                assert traffic.bytes <= MIB, (where, traffic.bytes)
                assert not any("gather" in kind or "scatter" in kind for kind in traffic.kinds), (where, traffic.kinds)
                for tensor in (*sharded.tensors, *single.tensors):  # training goes on, the same on every rank
                    tensor.local.mul_(-1.5)
                optimizer.step()
                single_optimizer.step()


def the_counter_of_traffic_sees_what_a_dtensor_sends(alone):
    with Traffic() as traffic:
        distribute_tensor(normal(8, 3), meshes()["line"], [Shard(0)], src_data_rank=None).full_tensor()
    assert any("all_gather" in kind for kind in traffic.kinds), traffic.kinds


def an_update_without_ties_takes_at_most_4_collectives_and_a_mebibyte(alone):
    for layout, places in layouts().items():
        values = (torch.randperm(CHUNK + 27 * 5 * 7 * 2) / 7).split([CHUNK, 27 * 5 * 7 * 2])
        tensors = [values[0].view(512, -1), values[1].view(5, 14, 9, 3)]
        sharded, optimizer = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
        for _ in LEVELS:
            with Traffic() as traffic:
                sharded.step()
            optimizer.step()
            assert 1 <= traffic.calls <= 4, (layout, traffic.kinds)
            assert set(traffic.kinds) == {"allreduce"}, (layout, traffic.kinds)
            assert 0 < traffic.bytes <= MIB, (layout, traffic.bytes)


def histograms_count_each_weight_once_however_it_is_sharded(alone):
    for layout, places in layouts().items():
        for name, tensors in sharded_models().items():
            sharded, _ = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
            single, _ = pruner_of(copy.deepcopy(tensors), group=alone)
            limits = largest(single.tensors, Ranks(alone))
            with Traffic() as traffic:
                assert torch.equal(largest(sharded.tensors, Ranks()), limits), (name, layout)
                named = dict(zip((t.name for t in single.tensors), limits.tolist(), strict=True))
                counted = count(sharded.tensors, named, Ranks())
            assert counted == count(single.tensors, named, Ranks(alone)), (name, layout)
            assert traffic.kinds == {"allreduce": 2}, traffic.kinds
            assert traffic.bytes == 8 * (1 + BINS + 1) * len(tensors), traffic.bytes


def traffic_does_not_grow_with_the_model(alone):
    sizes = []
    for rows in (10, 10_000):
        sharded, _ = pruner_of([placed(few_values(rows, 100), (meshes()["line"], [Shard(1)]))], [0.5])
        with Traffic() as traffic:
            sharded.step()
        sizes.append(traffic.bytes)
    assert sizes[1] < 1.1 * sizes[0], sizes


def ranks_with_the_same_shard_share_the_counting(alone):
    for layout, places in layouts().items():
        tensors = [normal(16, 12), normal(8, 4, 3, 3), normal(24, 16)]
        sharded, _ = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
        mine = [sharded.tensors[number].indices(start, stop) for number, start, stop in share(sharded.tensors)]
        counted = from_all_ranks(torch.cat(mine) if mine else torch.zeros(0, dtype=torch.int64))
        assert torch.equal(torch.cat(counted).sort().values, torch.arange(sharded.weights)), layout
        if layout != "mixed":
            assert max(map(len, counted)) <= 1.5 * sharded.weights / dist.get_world_size() + 24, layout


def small_net() -> nn.Module:
    """Of its six weights the last has a first dimension of 1, the one before of 3."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 24),
        nn.Linear(24, 24),
        nn.Linear(24, 3),
        nn.Linear(3, 1),
    )


def in_dim_1(parameter: nn.Parameter) -> Shard:
    even = parameter.dim() > 1 and parameter.shape[1] % dist.get_world_size() == 0
    return Shard(1) if even else Shard(0)


def fsdp_nets() -> dict[str, nn.Module]:
    """Models as FSDP2 shards them, all with the same weights."""
    ways = {name: {"mesh": mesh} for name, mesh in meshes().items()}
    line = meshes()["line"]
    ways["dim 1"] = {"mesh": line, "shard_placement_fn": in_dim_1}
    ways["bfloat16"] = {"mesh": line, "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    ways["CPU offload"] = {"mesh": line, "offload_policy": CPUOffloadPolicy(pin_memory=False)}
    nets = {}
    for name, way in ways.items():
        nets[name] = small_net()
        for layer in (nets[name][2], nets[name][5]):
            fully_shard(layer, **way)
        fully_shard(nets[name], **way)
    return nets


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, before_step=lambda: None) -> None:
    optimizer.zero_grad()
    for micro in range(2):
        if hasattr(net, "set_requires_gradient_sync"):
            net.set_requires_gradient_sync(micro == 1)
        net(torch.randn(4, 3, 5, 5)).square().mean().backward()
    before_step()
    optimizer.step()


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def training_under_fsdp_prunes_as_one_process_does(alone):
    for kind, make in OPTIMIZERS.items():
        for name, net in fsdp_nets().items():
            if kind == "momentum" and name in ("bfloat16", "CPU offload"):
                continue
            plain = small_net()
            optimizer, plain_optimizer = make(net.parameters()), torch.optim.SGD(plain.parameters(), lr=0)
            sharded = Pruner(net, optimizer, SCHEDULE)
            single = Pruner(plain, plain_optimizer, SCHEDULE, group=alone)
            assert len(sharded.tensors) == 6
            assert all(isinstance(t.weight, DTensor) for t in sharded.tensors)
            torch.manual_seed(dist.get_rank())
            for step in range(1, 7):
                where = f"{name}, {kind}, step {step}"
                train_step(net, optimizer, sharded.mask_gradients)
                for ours, theirs in zip(sharded.tensors, single.tensors, strict=True):
                    theirs.local.copy_(ours.weight.detach().full_tensor())
                plain_optimizer.step()
                assert not any(t.local[~sharded.masks[t.name]].any() for t in sharded.tensors), where
                with Traffic() as traffic:
                    report = sharded.step()
                single.step()
                assert (report is not None) == SCHEDULE.is_update(step), where
                if report:
                    assert sharded.zeros == round(SCHEDULE.sparsity(step) * sharded.weights), where
                    assert set(traffic.kinds) == {"allreduce"}, (where, traffic.kinds)
                    assert traffic.calls <= 5, (where, traffic.kinds)  # one more near the limits of a tensor
                    assert traffic.bytes <= MIB, (where, traffic.bytes)
                else:
                    assert traffic.calls == 0, (where, traffic.kinds)
                assert_same(sharded, single, where)
            assert len(optimizer.state[sharded.tensors[0].weight]) > 0


def clipping_under_fsdp_counts_only_weights_that_are_left(alone):
    for name, net in fsdp_nets().items():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        sharded = Pruner(net, optimizer, Levels([0.6]))
        sharded.step()
        net(torch.randn(4, 3, 5, 5)).square().mean().mul(100).backward()
        squares, dense_squares = 0.0, 0.0
        for parameter_name, parameter in net.named_parameters():
            gradient = parameter.grad.full_tensor().double()
            dense_squares += gradient.square().sum().item()
            if parameter_name in sharded.masks:
                gradient *= assembled(sharded.masks[parameter_name], parameter)
            squares += gradient.square().sum().item()
        sharded.mask_gradients()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0).full_tensor().item()
        assert abs(norm - squares**0.5) < 1e-4 * norm, (name, norm, squares**0.5)
        assert norm < 0.99 * dense_squares**0.5, name
        optimizer.step()
        assert not any(t.local[~sharded.masks[t.name]].any() for t in sharded.tensors), name


def a_pruner_made_after_a_forward_pass_prunes_the_sharded_weights(alone):
    # The root's weights stay unsharded after a forward pass, and are then plain tensors that no optimizer steps.
    for name, net in fsdp_nets().items():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.no_grad():
            net(torch.randn(4, 3, 5, 5))
        try:
            sharded = Pruner(net, optimizer, Levels([0.6]))
        except ValueError:
            continue  # a clear refusal would do as well
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strangers = [t.name for t in sharded.tensors if id(t.weight) not in stepped]
        assert strangers == [], (name, strangers)


def a_state_goes_from_shards_to_equal_shards(alone):
    for layout, places in layouts().items():
        for name in ("ties", "half precision", "first dimension smaller than the ranks", "channels_last"):
            tensors = sharded_models()[name]
            sharded, optimizer = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
            single, _ = pruner_of(copy.deepcopy(tensors), group=alone)
            sharded.step()
            single.step()
            state = copy.deepcopy(sharded.state_dict())
            again, _ = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
            again.load_state_dict(state)
            assert_same(again, single, f"{name}, {layout}")
            optimizer.step()
            assert again.step() is None
            assert again.steps_done == 0


def has_nan(pruner: Pruner) -> bool:
    return any(tensor.local.isnan().any() for tensor in pruner.tensors)


def nan_in_one_shard_raises_the_same_error_on_every_rank(alone):
    for layout, places in layouts().items():
        tensors = [normal(8, 12), normal(16, 8, 3, 3)]
        sharded, optimizer = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
        sharded.step()
        optimizer.step()
        kept = (assembled(sharded.masks["tensors.1"], sharded.tensors[1].weight)).view(-1).nonzero().view(-1)
        bad = torch.zeros(16 * 8 * 9)
        bad[kept[-2:]] = torch.nan
        sharded.tensors[1].local.add_(local(placed(bad.view(16, 8, 3, 3), places[1 % len(places)])))
        before = bits(t.local for t in sharded.tensors), bits(sharded.masks.values()), sharded.mask_digest
        messages = messages_of(NonFiniteError, sharded.step)
        assert len(set(messages)) == 1, (layout, messages)
        holders = [str(rank) for rank, bad in enumerate(from_all_ranks(has_nan(sharded))) if bad]
        where = "" if len(holders) == dist.get_world_size() else f" on rank {', '.join(holders)}"
        assert f"at step 1: tensors.1: 2 of 1152{where}; nothing was pruned" in messages[0], (layout, messages)
        after = bits(t.local for t in sharded.tensors), bits(sharded.masks.values()), sharded.mask_digest
        assert before == after, layout


def a_flipped_bit_in_a_replica_is_reported_on_every_rank(alone):
    world_size = dist.get_world_size()
    last = world_size - 1
    for layout, places in layouts().items():
        tensors = [few_values(8, 12), normal(16, 8), normal(8, 8), normal(4, 8)]
        for column in range(len(tensors)):
            sharded, _ = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
            sharded.step()
            tensor = sharded.tensors[column]
            held_by_last = from_all_ranks(tensor.local.numel())[last]
            if dist.get_rank() == last and held_by_last:
                sharded.masks[tensor.name].view(-1)[5 % held_by_last] ^= True
            messages = messages_of(MaskMismatchError, sharded.verify)
            where = (layout, tensor.name, messages)
            assert len(set(messages)) == 1, where
            if not held_by_last:
                assert messages[0] == "no error", where
            else:
                assert messages[0].endswith(f"at step 0: rank {last}: {tensor.name}"), where


def shards_without_replicas_are_compared_with_nothing_and_replicas_of_shards_with_each_other(alone):
    for layout, places in layouts().items():
        if layout == "mixed":
            continue
        tensors = {f"t{i}": placed(normal(8, 12), places[i % len(places)]) for i in range(2)}
        replicated = any(isinstance(p, Replicate) for _, placements in filter(None, places) for p in placements)
        assert compare_replicas(tensors, 3) == (replicated or layout == "two meshes"), layout
        if layout == "HSDP":
            if dist.get_rank() == 3:
                local(tensors["t1"])[0, 0] = torch.nan
            messages = messages_of(WeightMismatchError, lambda tensors=tensors: compare_replicas(tensors, 3))
            assert set(messages) == {"weights differ between ranks at step 3: t1, with no majority"}, messages


def packed_masks_of_rows_are_shards_of_the_whole_mask_packed(alone):
    for layout, places in layouts().items():
        tensors = sharded_models()["first dimension smaller than the ranks"]
        sharded, _ = pruner_of([placed(t, places[i % len(places)]) for i, t in enumerate(tensors)])
        single, _ = pruner_of(copy.deepcopy(tensors), group=alone)
        sharded.step()
        single.step()
        for tensor in sharded.tensors:
            bits_of_it = sharded.state_dict()["masks"][tensor.name]
            assert isinstance(bits_of_it, DTensor) == (isinstance(tensor.weight, DTensor) and tensor.part.is_rows)
            if isinstance(bits_of_it, DTensor):
                assert torch.equal(bits_of_it.full_tensor(), single.state_dict()["masks"][tensor.name]), layout


def refusal(weight: torch.Tensor, group=None) -> str:
    model = Bag([weight])
    try:
        Pruner(model, torch.optim.SGD(model.parameters()), Levels([0.5]), include=["*"], group=group)
    except ValueError as error:
        return str(error)
    return "no error"


def a_mesh_larger_than_the_group_is_refused(alone):
    message = refusal(distribute_tensor(normal(8, 3), meshes()["line"], [Shard(0)]), group=alone)
    placed = list(range(dist.get_world_size()))
    expected = f"tensors.0 cannot be pruned: it is placed on ranks {placed}, but those that prune together are"
    assert message == f"{expected} [{dist.get_rank()}]", message


def a_mesh_smaller_than_the_group_is_refused(alone):
    if dist.get_world_size() == 2:
        return
    mesh = DeviceMesh("cpu", [0, 1])
    message = refusal(distribute_tensor(normal(8, 3), mesh, [Shard(0)]))
    together = list(range(dist.get_world_size()))
    expected = f"tensors.0 cannot be pruned: it is placed on ranks [0, 1], but those that prune together are {together}"
    assert message == expected, message


def the_mesh_of_one_row_of_a_square_is_refused(alone):
    if (square := meshes().get("square")) is not None:
        message = refusal(distribute_tensor(normal(8, 3), square["shard"], [Shard(0)]))
        assert "those that prune together are [0, 1, 2, 3]" in message, message


def a_mesh_of_other_ranks_than_the_group_is_refused_though_as_large(alone):
    if dist.get_world_size() == 2:
        return
    mesh, group = DeviceMesh("cpu", [0, 1]), dist.new_group([1, 2])
    weight = distribute_tensor(normal(8, 3), mesh, [Shard(0)])
    if dist.get_rank() == 1:
        assert refusal(weight, group) != "no error"


def placements_that_are_no_rectangles_are_refused(alone):
    line = meshes()["line"]
    for placement in (Partial(), _StridedShard(0, split_factor=2)):
        size = dist.get_world_size()
        shape = torch.Size((8, 3) if isinstance(placement, Partial) else (8 * size, 3))
        weight = DTensor.from_local(normal(8, 3), line, [placement], run_check=False, shape=shape, stride=(3, 1))
        message = refusal(weight)
        assert message.startswith("tensors.0 cannot be pruned: placement "), message
        assert message.endswith("Shard and Replicate can"), message


def shards_of_other_sizes_than_sharding_gives_are_refused(alone):
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = normal(1 if rank < size - 1 else 1 + 2 * size, 3)
    whole = torch.Size((3 * size, 3))
    message = refusal(
        DTensor.from_local(mine, meshes()["line"], [Shard(0)], run_check=False, shape=whole, stride=(3, 1))
    )
    assert f"its local shape is {tuple(mine.shape)}, not (3, 3) as sharding gives" in message, message


CHECKS = (
    the_counter_of_traffic_sees_what_a_dtensor_sends,
    masks_are_those_of_one_process_however_the_weights_are_sharded,
    an_update_without_ties_takes_at_most_4_collectives_and_a_mebibyte,
    histograms_count_each_weight_once_however_it_is_sharded,
    traffic_does_not_grow_with_the_model,
    ranks_with_the_same_shard_share_the_counting,
    training_under_fsdp_prunes_as_one_process_does,
    clipping_under_fsdp_counts_only_weights_that_are_left,
    a_pruner_made_after_a_forward_pass_prunes_the_sharded_weights,
    a_state_goes_from_shards_to_equal_shards,
    nan_in_one_shard_raises_the_same_error_on_every_rank,
    a_flipped_bit_in_a_replica_is_reported_on_every_rank,
    shards_without_replicas_are_compared_with_nothing_and_replicas_of_shards_with_each_other,
    packed_masks_of_rows_are_shards_of_the_whole_mask_packed,
    a_mesh_larger_than_the_group_is_refused,
    a_mesh_smaller_than_the_group_is_refused,
    the_mesh_of_one_row_of_a_square_is_refused,
    a_mesh_of_other_ranks_than_the_group_is_refused_though_as_large,
    placements_that_are_no_rectangles_are_refused,
    shards_of_other_sizes_than_sharding_gives_are_refused,
)

if __name__ == "__main__":
    run_checks(CHECKS, Path(sys.argv[1]))
