"""What several gloo ranks have to show about pruning whole channels, on replicas and shards; see `ranks.py`.

The reference is everywhere one process that prunes the same weights, unsharded.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distprune.pruning import MaskMismatchError, Movement, NonFiniteError, Taylor
from distprune.pruning.shards import local
from distprune.structured import ChannelPruner, Channels, GroupPenalty, find_channels
from distprune.structured.shrink import select
from tests.distributed.ranks import MIB, Traffic, bits, from_all_ranks, messages_of, run_checks
from tests.distributed.sharded import assembled, layouts, placed
from tests.pruning.reference import Levels
from tests.structured.nets import made

LEVELS = (0.15, 0.3, 0.4)
WAYS = {
    "macs": {},
    "params, l1": {"budget": "params", "norm": "l1"},
    "channels": {"budget": "channels"},
    "uniform": {"compare": "uniform", "norm": "l1", "budget": "channels"},
    "limits": {"multiple": 2, "min_width": 2, "most": {"expand": 0.75}},
}
_found: dict[str, tuple[nn.Module, torch.Tensor, Channels]] = {}


def found(name: str, ties: bool = False) -> tuple[nn.Module, torch.Tensor, Channels]:
    """A network, images for it and its channels; with ties its weights have three values only."""
    if name not in _found:
        torch.manual_seed(7)
        model, images = made(name)
        _found[name] = model, images, find_channels(model, images)
    model, images, channels = _found[name]
    model = copy.deepcopy(model)
    if ties:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((4 * parameter).round().clamp(-1, 1))
    return model, images, channels


def cut_up(model: nn.Module, places) -> nn.Module:
    """The model with its parameters lying where `places` say, from the first again behind the last."""
    for number, (name, parameter) in enumerate(list(model.named_parameters())):
        owner, _, leaf = name.rpartition(".")
        lying = placed(parameter.detach(), places[number % len(places)])
        setattr(model.get_submodule(owner), leaf, nn.Parameter(lying))
    return model


def pruner_of(model, channels, group=None, levels=LEVELS, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    return ChannelPruner(model, optimizer, Levels(levels), channels, group=group, **options), optimizer


def assert_same(ours: ChannelPruner, single: ChannelPruner, where: str) -> None:
    """Units, masks and digest are those of one process, and nothing lives where a unit went."""
    assert torch.equal(ours.kept, single.kept), where
    assert (ours.mask_digest, ours.zeros) == (single.mask_digest, single.zeros), where
    assert ours.layers() == single.layers(), where
    for mine, theirs in zip(ours.tensors, single.tensors, strict=True):
        mask = ours.masks[mine.name]
        assert torch.equal(assembled(mask, mine.weight).bool(), single.masks[theirs.name]), (where, mine.name)
        for value in (mine.weight, *ours._optimizer.state.get(mine.weight, {}).values()):
            if isinstance(value, torch.Tensor) and value.shape == mine.weight.shape:
                assert not local(value)[~mask].any(), (where, mine.name)


def units_are_those_of_one_process_whatever_ranks_hold(alone):
    for layout, places in {"replicas": [None], **layouts()}.items():
        for name in ("grouped", "transformer"):
            for way, options in WAYS.items():
                if name == "transformer" and way not in ("macs", "uniform"):
                    continue
                for ties in (False, True) if layout in ("replicas", "dim 0", "mixed") else (False,):
                    model, _, channels = found(name, ties)
                    single, single_by = pruner_of(copy.deepcopy(model), channels, alone, **options)
                    ours, optimizer = pruner_of(cut_up(model, places), channels, **options)
                    for level in LEVELS:
                        where = f"{name}, {way}, {layout}, ties {ties}, at {level}"
                        report, single_report = ours.step(), single.step()
                        assert report.threshold == single_report.threshold, where
                        assert (report.sparsity, report.held) == (single_report.sparsity, single_report.held), where
                        assert_same(ours, single, where)
                        optimizer.step()
                        single_by.step()


def an_update_gathers_nothing(alone):
    model, _, channels = found("grouped")
    for layout, places in {"replicas": [None], **layouts()}.items():
        ours, _ = pruner_of(cut_up(copy.deepcopy(model), places), channels)
        with Traffic() as traffic:
            ours.step()
        assert set(traffic.kinds) == {"allreduce"}, (layout, traffic.kinds)
        assert traffic.calls <= 3, (layout, traffic.kinds)
        assert traffic.bytes <= MIB // 64, (layout, traffic.bytes)


def the_penalty_is_that_of_one_process(alone):
    for layout, places in {"replicas": [None], **layouts()}.items():
        model, _, channels = found("grouped")
        single, _ = pruner_of(copy.deepcopy(model), channels, alone)
        ours, _ = pruner_of(cut_up(model, places), channels)
        for pruner in (ours, single):
            pruner.step()
            for tensor in pruner.tensors:
                tensor.weight.grad = torch.zeros_like(tensor.weight)
            GroupPenalty(pruner, 0.1).add_to_gradients()
        torch.testing.assert_close(ours.unit_norms(), single.unit_norms(), msg=layout)
        for mine, theirs in zip(ours.tensors, single.tensors, strict=True):
            gradient = mine.weight.grad
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            torch.testing.assert_close(whole, theirs.weight.grad, msg=f"{layout}, {mine.name}")
        assert len(set(from_all_ranks(bits([ours.unit_norms()])))) == 1, layout


def nan_on_one_rank_raises_the_same_error_on_all_and_nothing_changes(alone):
    for layout, places in layouts().items():
        model, _, channels = found("grouped")
        ours, optimizer = pruner_of(cut_up(model, places), channels)
        ours.step()
        optimizer.step()
        holder = dist.get_world_size() - 1
        tensor = next(t for t in ours.tensors if t.name == "wide.weight")
        mine = tensor.local[ours.masks[tensor.name]]
        if dist.get_rank() == holder and mine.numel():
            tensor.local[ours.masks[tensor.name]] = torch.nan
        if not isinstance(tensor.weight, DTensor):
            continue
        is_held = from_all_ranks(mine.numel())[holder] > 0
        before = ours.kept.clone(), ours.mask_digest, bits(t.local for t in ours.tensors)
        messages = messages_of(NonFiniteError, ours.step)
        assert len(set(messages)) == 1, (layout, messages)
        if is_held:
            assert "in wide.weight; nothing was pruned" in messages[0], (layout, messages)
            assert (ours.mask_digest, bits(t.local for t in ours.tensors)) == before[1:], layout
            assert torch.equal(ours.kept, before[0]), layout


def a_flipped_mask_is_found(alone):
    model, _, channels = found("grouped")
    ours, _ = pruner_of(model, channels)
    ours.step()
    if dist.get_rank() == dist.get_world_size() - 1:
        ours.masks["wide.weight"].view(-1)[3] ^= True
    messages = messages_of(MaskMismatchError, ours.verify)
    assert len(set(messages)) == 1, messages
    assert messages[0].endswith(f"rank {dist.get_world_size() - 1}: wide.weight"), messages


def loss_of(model, images, step):
    generator = torch.Generator().manual_seed(step)
    out = model(images)
    return F.mse_loss(out, torch.randn(3, generator=generator).expand_as(out))


def batch_of(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2 * dist.get_world_size(), 3, 6, 6, generator=generator)


def mine_of(batch):
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def under_ddp_training_goes_on_after_it_shrank_alike_on_all_ranks(alone):
    model, _, channels = found("squeeze-excite")
    plain = copy.deepcopy(model)
    levels = (0, 0, 0.3, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    plain_by = torch.optim.AdamW(plain.parameters(), lr=0.01, eps=1e-3)
    ours = ChannelPruner(wrapped, optimizer, Levels(levels), channels)
    single = ChannelPruner(plain, plain_by, Levels(levels), channels, group=alone)
    shrinks = 0
    for step in range(1, 9):
        batch = batch_of(step)
        optimizer.zero_grad()
        plain_by.zero_grad()
        loss_of(wrapped, mine_of(batch), step).backward()
        loss_of(plain, batch, step).backward()
        optimizer.step()
        plain_by.step()
        # The one process only masks.
        ours.step(), single.step()
        assert torch.equal(ours.kept, single.kept), step
        if ours.shrink():
            wrapped, shrinks = DistributedDataParallel(model), shrinks + 1
        assert len(set(from_all_ranks(bits(model.state_dict().values())))) == 1, step
    assert shrinks == 2
    single.shrink()
    assert ours.mask_digest == single.mask_digest
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == channels.count_parameters(ours.kept)


def under_fsdp_units_are_those_of_one_process_and_whole_weights_are_cut(alone):
    for score in ({}, {"score": Taylor()}, {"score": Movement(), "budget": "channels"}):
        model, _, channels = found("squeeze-excite")
        plain = copy.deepcopy(model)
        for layer in (model.stem, model.head):
            fully_shard(layer)
        fully_shard(model)
        levels = (0, 0, 0.3, 0.3, 0.5)
        ours, optimizer = pruner_of(model, channels, levels=levels, **score)
        single, plain_by = pruner_of(plain, channels, alone, levels=levels, **score)
        assert ours.is_sharded
        for step in range(1, 5):
            batch = batch_of(step)
            optimizer.zero_grad()
            loss_of(model, mine_of(batch), step).backward()
            optimizer.step()
            # From the same weights and gradients units are the same; sums of gradients differ with their order.
            for mine, theirs in zip(ours.tensors, single.tensors, strict=True):
                theirs.weight.grad = mine.weight.grad.full_tensor()
            plain_by.step()
            for mine, theirs in zip(ours.tensors, single.tensors, strict=True):
                torch.testing.assert_close(theirs.local, mine.weight.detach().full_tensor())
                theirs.local.copy_(mine.weight.detach().full_tensor())
            ours.step(), single.step()
            assert_same(ours, single, f"{score}, step {step}")
        assert messages_of(ValueError, ours.shrink)[0].startswith("shards cannot shrink"), score
        where, left = ours.cut()
        whole = {name: select(p.detach().full_tensor(), where.get(name, {})) for name, p in model.named_parameters()}
        single.shrink()
        for name, parameter in plain.named_parameters():
            if name in channels.owners:
                assert torch.equal(whole[name], parameter), name
            assert whole[name].shape == parameter.shape, name
        assert {n: {d: i.tolist() for d, i in dims.items()} for n, dims in left.items()} == {
            n: {d: i.tolist() for d, i in dims.items()} for n, dims in single.cut()[1].items()
        }
        state = ours.state_dict()
        again, _ = pruner_of(cut_up(found("squeeze-excite")[0], layouts()["mixed"]), channels, levels=levels)
        if not score:
            again.load_state_dict(copy.deepcopy(state))
            assert (again.mask_digest, again.steps_done) == (ours.mask_digest, 4)
            assert not any(local(t.weight)[~again.masks[t.name]].any() for t in again.tensors)


CHECKS = (
    units_are_those_of_one_process_whatever_ranks_hold,
    an_update_gathers_nothing,
    the_penalty_is_that_of_one_process,
    nan_on_one_rank_raises_the_same_error_on_all_and_nothing_changes,
    a_flipped_mask_is_found,
    under_ddp_training_goes_on_after_it_shrank_alike_on_all_ranks,
    under_fsdp_units_are_those_of_one_process_and_whole_weights_are_cut,
)

if __name__ == "__main__":
    run_checks(CHECKS, Path(sys.argv[1]))
