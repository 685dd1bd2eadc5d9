import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distprune.pruning import CubicSchedule, Taylor
from distprune.structured import ChannelPruner, GroupPenalty, find_channels, kept_of, layout, shrink_like
from tests.pruning.reference import Levels
from tests.structured.nets import NETS, made, stirred

# A large eps, since gradients of biases of keys are 0 but for rounding, of which Adam makes whole steps.
OPTIMIZERS = {
    "momentum": lambda p, **kw: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **kw),
    "nesterov": lambda p, **kw: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, eps=1e-3, weight_decay=0.1, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.1, **kw),
    "amsgrad": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.1, amsgrad=True, **kw),
}
IMPLEMENTATIONS = {
    "plain": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
SCHEDULE = CubicSchedule(initial=0.1, final=0.5, begin=2, end=8, every=3)


def train_step(net, optimizer, step, pruner=None):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    optimizer.zero_grad()
    out = net(images)
    F.mse_loss(out, torch.randn(out.shape, generator=generator)).backward()
    if pruner is not None:
        pruner.mask_gradients()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()


def alive_where_pruned(pruner, optimizer):
    found = []
    for tensor in pruner.tensors:
        pruned = ~pruner.masks[tensor.name]
        for kind, value in {"weight": tensor.weight, **optimizer.state.get(tensor.weight, {})}.items():
            if isinstance(value, torch.Tensor) and value.shape == pruned.shape and (value[pruned] != 0).any():
                found.append(f"{kind} of {tensor.name}")
    return found


def frozen_dropout(net):
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return net


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_lives_in_a_unit_that_went_after_any_step(optimizer, implementation):
    net, images = made("grouped")
    optimizer = OPTIMIZERS[optimizer](net.parameters(), **IMPLEMENTATIONS[implementation])
    pruner = ChannelPruner(net, optimizer, SCHEDULE, find_channels(net, images))
    updates = 0
    for step in range(1, 11):
        train_step(net, optimizer, step, pruner)
        assert alive_where_pruned(pruner, optimizer) == []
        if pruner.step() is not None:
            updates += 1
            assert alive_where_pruned(pruner, optimizer) == []
            for name, layer in pruner.layers().items():
                group = next(group for group in pruner.channels.groups if group.name == name)
                assert layer.zeros == int((~pruner.kept[group.units]).sum()) < group.size
    assert updates == 3
    assert pruner.is_final
    assert pruner.zeros == sum(int((~mask).sum()) for mask in pruner.masks.values())
    pruner.verify()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["grouped", "transformer"])
def test_training_goes_on_after_it_shrank_as_it_would_have_masked(name, optimizer, implementation):
    net, images = made(name)
    frozen_dropout(net)
    channels = find_channels(net, images)
    found = []
    for shrinks in (False, True):
        model = copy.deepcopy(net)
        biases = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": biases, "weight_decay": 0.0}]
        trained_by = OPTIMIZERS[optimizer](groups, **IMPLEMENTATIONS[implementation])
        pruner = ChannelPruner(model, trained_by, Levels([0, 0, 0, 0.3, 0.3, 0.3, 0.6, 0.6, 0.6]), channels)
        for step in range(1, 9):
            train_step(model, trained_by, step, pruner)
            if pruner.step() and shrinks:
                pruner.shrink()
        found.append((model, trained_by, pruner))
    (masked, masked_by, held), (shrunk, shrunk_by, gone) = found
    assert torch.equal(held.kept, gone.kept)
    assert gone.sparsity == held.sparsity == pytest.approx(0.6, abs=0.1)
    assert (gone.zeros, gone.weights) == (held.zeros, held.weights)
    assert [len(g["params"]) for g in shrunk_by.param_groups] == [len(g["params"]) for g in masked_by.param_groups]
    assert [g["weight_decay"] for g in shrunk_by.param_groups] == [0.1, 0.0]
    assert set(shrunk_by.state) == set(shrunk.parameters())
    masked.eval(), shrunk.eval()
    torch.testing.assert_close(shrunk(images), masked(images), rtol=1e-5, atol=1e-5)
    held.shrink()
    torch.testing.assert_close(dict(masked.state_dict()), dict(shrunk.state_dict()), rtol=1e-4, atol=1e-5)
    for one, other in zip(masked.parameters(), shrunk.parameters(), strict=True):
        assert masked_by.state[one].keys() == shrunk_by.state[other].keys()
        for key, value in masked_by.state[one].items():
            torch.testing.assert_close(value, shrunk_by.state[other][key], rtol=1e-3, atol=1e-5)


def test_adafactors_rows_and_columns_shrink_too():
    net, images = made("plain")
    optimizer = torch.optim.Adafactor(net.parameters())
    pruner = ChannelPruner(net, optimizer, Levels([0, 0.5]), find_channels(net, images))
    train_step(net, optimizer, 1)
    pruner.step()
    assert pruner.shrink()
    train_step(net, optimizer, 2)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("budget", ["channels", "params", "macs"])
@pytest.mark.parametrize("name", NETS)
def test_the_budget_is_what_the_shrunk_model_costs(name, budget):
    net, images = made(name)
    channels = find_channels(net, images)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = ChannelPruner(net, optimizer, Levels([0.3]), channels, budget=budget)
    dense = pruner.cost(pruner.kept)
    before = costs(net, images)
    report = pruner.step()
    pruner.shrink()
    after = costs(net, images)
    assert channels.count_parameters(pruner.kept) == after["params"] == sum(p.numel() for p in net.parameters())
    assert channels.count_macs(torch.ones_like(pruner.kept)) == before["macs"]
    assert channels.count_macs(pruner.kept) == after["macs"]
    counted = {"channels": int(pruner.kept.sum()), **after}[budget]
    assert pruner.cost(pruner.kept) == counted
    assert pruner.sparsity == report.sparsity == 1 - counted / dense
    assert report.target_sparsity == 0.3
    # No unit of any group costs more than this.
    most = max(dense - pruner.cost(without(channels, unit)) for unit in range(channels.units))
    assert abs(counted - 0.7 * dense) <= most


def without(channels, unit):
    kept = torch.ones(channels.units, dtype=torch.bool)
    kept[unit] = False
    return kept


def costs(net, images):
    """Parameters, and multiply-accumulates of one sample as torch counts them."""
    # Of attention it knows no fused kernels for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net.eval()(images)
    flops = counter.get_flop_counts()["Global"]
    return {"params": sum(p.numel() for p in net.parameters()), "macs": sum(flops.values()) // (2 * len(images))}


def test_taylor_scores_are_sums_of_weights_times_gradients():
    net, images = made("plain")
    channels = find_channels(net, images)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pruner = ChannelPruner(net, optimizer, Levels([0, 0, 0.3]), channels, budget="channels", score=Taylor())
    sums = torch.zeros(channels.units, dtype=torch.float64)
    pruner.step()
    for step in (1, 2):
        train_step(net, optimizer, step)
        for tensor, dim in channels.scored:
            weight = net.get_parameter(tensor)
            seen = (weight * weight.grad).abs().double().movedim(dim, 0).reshape(weight.shape[dim], -1).sum(1)
            owner = channels.owners[tensor][dim]
            sums.index_add_(0, owner[owner >= 0], seen[owner >= 0])
        if step == 1:  # an update forgets what was seen, also where nothing goes
            pruner.step()
            sums.zero_()
    pruner.step()
    level = torch.cat([sums[group.units] / sums[group.units].mean() for group in channels.groups])
    gone = set((~pruner.kept).nonzero()[:, 0].tolist())
    assert gone == set(level.argsort()[: len(gone)].tolist())
    assert len(gone) == round(0.3 * channels.units)


def test_taylor_goes_on_over_a_shrink_and_wants_gradients():
    net, images = made("plain")
    channels = find_channels(net, images)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    levels = Levels([0, 0.2, 0.2, 0.5])
    pruner = ChannelPruner(net, optimizer, levels, channels, score=Taylor())
    pruner.schedule = Levels([0.2])
    with pytest.raises(ValueError, match="the score Taylor has seen no gradient by step 0"):
        pruner.step()
    assert bool(pruner.kept.all())
    pruner.schedule = levels
    for step in range(1, 4):
        train_step(net, optimizer, step)
        if step == 2:
            pruner.shrink()
        pruner.step()
    assert pruner.sparsity == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("alpha", [0.0, 4.0])
def test_the_penalty_is_the_gradient_of_what_is_written(alpha):
    net, images = made("grouped")
    channels = find_channels(net, images)
    pruner = ChannelPruner(net, torch.optim.SGD(net.parameters(), lr=0.1), Levels([0.3]), channels)
    pruner.step()
    squares = [torch.zeros(()) for _ in range(channels.units)]
    for tensor, dim in channels.scored:
        for index, unit in enumerate(channels.owners[tensor][dim].tolist()):
            if unit >= 0:
                squares[unit] = squares[unit] + net.get_parameter(tensor).select(dim, index).square().sum()
    total = torch.zeros(())
    for group in channels.groups:
        units = [unit for unit in range(group.begin, group.begin + group.size) if pruner.kept[unit]]
        norms = [squares[unit].detach().sqrt() for unit in units]
        for unit, norm in zip(units, norms, strict=True):
            spread = max(norms) - min(norms)
            share = (max(norms) - norm) / spread if spread else 0.0
            total = total + 0.03 / 2 * 2 ** (alpha * share) * squares[unit]
    expected = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    GroupPenalty(pruner, 0.03, alpha).add_to_gradients()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + (torch.zeros_like(parameter) if gradient is None else gradient))
    once = [parameter.grad.clone() for parameter in net.parameters()]
    GroupPenalty(pruner, 0.03, alpha).add_to_gradients(scale=256.0)
    for parameter, before in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad - before, 256 * (before - 1), rtol=1e-4, atol=1e-4)
    norms = torch.tensor([square.item() ** 0.5 for square in squares])
    torch.testing.assert_close(pruner.unit_norms(), norms)
    pruner.shrink()
    torch.testing.assert_close(pruner.unit_norms(), norms)


@pytest.mark.parametrize("score", [None, Taylor()], ids=["magnitude", "taylor"])
@pytest.mark.parametrize("shrinks", [False, True])
def test_a_state_goes_on_where_it_was_saved(shrinks, score):
    levels = Levels([0, 0.2, 0.2, 0.4, 0.5])
    options = {} if score is None else {"score": score}

    def begin(net):
        optimizer = OPTIMIZERS["momentum"](net.parameters())
        return optimizer, ChannelPruner(net, optimizer, levels, channels, **options)

    dense, images = made("residual")
    channels = find_channels(dense, images)
    net = copy.deepcopy(dense)
    optimizer, pruner = begin(net)
    for step in range(1, 3):
        train_step(net, optimizer, step)
        pruner.step()
    if shrinks:
        pruner.shrink()
    train_step(net, optimizer, 3)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), pruner.state_dict(), pruner.present))

    other = stirred(copy.deepcopy(dense))
    again_by, again = begin(other)
    assert again.reshape(saved[3]) == shrinks
    other.load_state_dict(saved[0])
    again_by.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert (again.mask_digest, again.steps_done, again.zeros) == (pruner.mask_digest, 3, pruner.zeros)
    for model, trained_by, holder in ((net, optimizer, pruner), (other, again_by, again)):
        assert holder.step().step == 3
        train_step(model, trained_by, 4)
        assert holder.step() is not None
        holder.shrink()
    assert torch.equal(again.kept, pruner.kept)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_state_that_does_not_fit_changes_nothing():
    net, images = made("residual")
    channels = find_channels(net, images)
    pruner = ChannelPruner(net, torch.optim.SGD(net.parameters(), lr=0.1), Levels([0.3]), channels)
    dense = pruner.state_dict()
    pruner.step()
    good = pruner.state_dict()
    pruner.shrink()
    before = copy.deepcopy((net.state_dict(), pruner.state_dict(), pruner.mask_digest))
    name, bits = next(iter(good["masks"].items()))
    for wrong, message in (
        (dense, "channels that are kept were removed from the model; bring them back first"),
        (good | {"masks": {"other": bits}}, "channels are of other groups: missing .* unexpected .'other'"),
        (good | {"masks": good["masks"] | {name: bits[:, :0]}}, name),
        (good | {"observed": {"stem.weight": torch.ones(8, 3, 3, 3)}}, "observed of weights is of another score"),
    ):
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(wrong)
        assert all(torch.equal(a, b) for a, b in zip(before[0].values(), net.state_dict().values(), strict=True))
        assert pruner.mask_digest == before[2]
        assert (pruner.steps_done, pruner.state_dict()["target_bits"]) == (0, before[1]["target_bits"])
    pruner.load_state_dict(good)


def test_channels_come_back_where_an_earlier_state_is_taken_up():
    """Down to one channel in places, where shapes no longer tell a convolution from a depthwise one."""

    def net():
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1),
            nn.ConvTranspose2d(4, 4, 2, groups=4), nn.Conv2d(4, 2, 1),
        )  # fmt: skip

    model, images = stirred(net()), torch.randn(2, 1, 8, 8)
    channels = find_channels(model, images)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    pruner = ChannelPruner(model, optimizer, Levels([0, 0.8]), channels, budget="channels", score=Taylor())
    out = model(images)
    out.square().mean().backward()
    optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    structure = str(model)
    expected = model.eval()(images)
    pruner.step()
    pruner.shrink()
    assert model[0].weight.shape[:2] == (1, 1)
    assert str(model) != structure
    assert pruner.reshape(torch.ones_like(pruner.kept))
    assert str(model) == structure
    assert kept_of(model)["0.weight"][0].tolist() == list(range(6))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(saved[2])
    assert pruner.zeros == 0
    assert torch.equal(model(images), expected)
    model.train()(images).square().mean().backward()
    optimizer.step()
    assert pruner.step() is not None
    fresh = net()
    pruner.shrink()
    shrink_like(fresh, json.loads(json.dumps(layout(kept_of(model)))))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(images), model.eval()(images))


def test_limits_hold_in_every_update():
    net, images = made("grouped")
    channels = find_channels(net, images)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    limits = {"multiple": 2, "min_width": 3, "most": {"expand": 0.5, "stem": 0.0}}
    pruner = ChannelPruner(net, optimizer, Levels([0.1, 0.2, 0.3]), channels, **limits)
    before = pruner.kept.clone()
    for step in range(3):
        report = pruner.step()
        assert not (pruner.kept & ~before).any()
        before = pruner.kept.clone()
        for group in channels.groups:
            width = int(before[group.units].sum()) * group.width
            assert width % 2 == 0
            assert width >= 3
        assert pruner.layers()["stem"].zeros == 0
        assert pruner.layers()["expand"].zeros <= 6
        assert "stem" not in report.held, "all of it is left, as all of it would be"
        train_step(net, optimizer, step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiple": 0}, "multiple and min_width must be at least 1 channel, got 0 and 1"),
        ({"most": {"stm": 0.5}}, "most: there is no group 'stm'; there are expand, grouped"),
        ({"most": {"stem": 1.5}}, r"most: the share of stem must lie in \[0, 1\], got 1.5"),
        ({"min_width": 99}, r"at most 0.0000 of the macs can go .* but 0.5 is asked for"),
    ],
)
def test_settings_outside_their_range_are_refused(options, message):
    net, images = made("grouped")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        ChannelPruner(net, optimizer, Levels([0.5]), find_channels(net, images), **options)
    assert not optimizer._optimizer_step_post_hooks


def test_exactly_what_limits_allow_may_be_asked_for():
    net = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    channels = find_channels(net, torch.randn(2, 3))
    pruner = ChannelPruner(net, optimizer, Levels([0.1]), channels, budget="channels", most={"0": 0.1})
    report = pruner.step()
    assert report.held == ("0",)
    assert int(pruner.kept.sum()) == 9


def test_channels_of_another_model_are_refused():
    net, images = made("grouped")
    channels = find_channels(net, images)
    for other in (made("residual")[0], nn.Linear(3, 2)):
        with pytest.raises(ValueError, match="the channels are of another model, in which "):
            ChannelPruner(other, torch.optim.SGD(other.parameters(), lr=0.1), Levels([0.5]), channels)
    strange = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer does not train "):
        ChannelPruner(net, strange, Levels([0.5]), channels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_memory_formats_stay(dtype):
    net, images = made("grouped")
    channels = find_channels(net, images)
    net = net.to(dtype).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    pruner = ChannelPruner(net, optimizer, Levels([0, 0.4]), channels)
    net(images.to(dtype)).square().mean().backward()
    optimizer.step()
    assert pruner.step() is not None
    net.eval()
    masked = net(images.to(dtype))
    pruner.shrink()
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(net(images.to(dtype)), masked, rtol=tolerance, atol=tolerance)
    weight = net.grouped.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_a_step_that_a_scaler_skips_does_not_count():
    net, images = made("plain")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = ChannelPruner(net, optimizer, Levels([0, 0.5]), find_channels(net, images))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((net(images) * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        assert pruner.steps_done == int(factor == 1.0)
    assert pruner.sparsity > 0.4
    pruner.shrink()
    scaler.scale(net(images).sum()).backward()
    scaler.step(optimizer)
    assert pruner.steps_done == 2


def test_closing_lets_weights_live():
    net, images = made("plain")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    channels = find_channels(net, images)
    pruner = ChannelPruner(net, optimizer, Levels([0.5]), channels)
    pruner.step()
    pruner.close()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert alive_where_pruned(pruner, optimizer)
    assert bool((~pruner.kept).any())


def test_hooks_see_the_new_parameters():
    net, images = made("plain")
    seen = []
    net[3].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    channels = find_channels(net, images)
    seen.clear()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = ChannelPruner(net, optimizer, Levels([0.5]), channels, compare="uniform", budget="channels")
    pruner.step()
    pruner.shrink()
    net(images)
    assert seen == [3]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in net.parameters()}
