"""Channels in another order: more is kept under N:M, and the model computes the same."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distprune.pruning import NM, OneShotSchedule, Pruner, find_permutations, permute_channels
from distprune.pruning.permutation import find_permutation, kept


def best_kept(magnitudes, pattern):
    """By trying every partition of the columns into groups."""

    def best(left):
        if not left:
            return 0.0
        groups = ((left[0], *others) for others in itertools.combinations(left[1:], pattern.m - 1))
        return max(of[group] + best(tuple(c for c in left if c not in group)) for group in groups)

    columns = tuple(range(magnitudes.shape[1]))
    of = {
        group: magnitudes[:, group].topk(pattern.n, 1).values.double().sum().item()
        for group in itertools.combinations(columns, pattern.m)
    }
    return best(columns)


@pytest.mark.parametrize("shape", [(4, 8), (6, 12), (1, 12)], ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_comes_near_the_best_of_all_groupings(shape, pattern, seed):
    torch.manual_seed(seed)
    magnitudes = torch.randn(shape).abs()
    order = find_permutation(magnitudes, pattern)
    assert sorted(order.tolist()) == list(range(shape[1]))
    assert kept(magnitudes[:, order], pattern) >= 0.995 * best_kept(magnitudes, pattern)
    assert torch.equal(order, find_permutation(magnitudes, pattern))


def test_on_larger_matrices_much_less_is_lost():
    torch.manual_seed(0)
    magnitudes = torch.randn(200, 64).abs() * torch.randn(64).exp()
    order = find_permutation(magnitudes, NM(2, 4))
    lost, whole = magnitudes.sum() - kept(magnitudes, NM(2, 4)), magnitudes.sum()
    assert whole - kept(magnitudes[:, order], NM(2, 4)) < 0.9 * lost


@pytest.mark.parametrize("magnitudes", [torch.zeros(3, 8), torch.ones(3, 8), torch.rand(5, 4)])
def test_where_there_is_nothing_to_gain_nothing_is_reordered(magnitudes):
    assert find_permutation(magnitudes, NM(2, 4)).tolist() == list(range(magnitudes.shape[1]))


class Residual(nn.Module):
    """Everything that channels are followed through: norms, depthwise, a squeeze, a sum, pools, a mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        )
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1))
        self.outer = nn.Sequential(nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1))
        self.head = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 5))

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        y = self.inner(x)
        y = y * self.squeeze(y).sigmoid()
        x = F.relu(x + self.outer(y))
        return self.head(x.mean((2, 3)))


def lively(model):
    """Norms as after training, so that each channel has its own."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


def outputs(model, inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(inputs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_model_computes_the_same_and_pruned_it_keeps_more(memory_format):
    torch.manual_seed(0)
    model, inputs = lively(Residual()).to(memory_format=memory_format), torch.randn(2, 4, 8, 8)
    expected, before = outputs(model, inputs), copy.deepcopy(model)
    found = permute_channels(model, NM(2, 4), (inputs,))
    assert len(found.found) == 4  # stem and sum, within the inner block, squeezed (one group), the head
    assert found.left_out == {"stem.0.weight": "its input channels are made by no layer that was followed"}
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert model.training
    assert {n: b.item() for n, b in model.named_buffers() if "tracked" in n} == {
        n: b.item() for n, b in before.named_buffers() if "tracked" in n
    }
    shares = []
    for given in (before, model):
        pruner = Pruner(given, torch.optim.SGD(given.parameters()), OneShotSchedule(0.5), pattern=NM(2, 4))
        whole = sum(t.weight.abs().sum().item() for t in pruner.tensors)
        pruner.step()
        shares.append(sum(t.weight.abs().sum().item() for t in pruner.tensors) / whole)
    assert shares == pytest.approx([found.before, found.after], rel=1e-5)
    assert found.after > found.before + 0.01


def test_what_was_found_on_one_rank_is_applied_on_others():
    torch.manual_seed(0)
    one, inputs = lively(Residual()), torch.randn(2, 4, 8, 8)
    other, untouched = copy.deepcopy(one), copy.deepcopy(one)
    found = find_permutations(one, NM(2, 4), (inputs,))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), untouched.parameters(), strict=True))
    found.apply(other)
    permute_channels(one, NM(2, 4), (inputs,))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Forward(nn.Module):
    """Two layers with 8 channels between them, and what a test puts in between."""

    def __init__(self, between, **others):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.between = between
        for name, module in others.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def twice(model, x):
    return model.other(model.other(x))


@pytest.mark.parametrize(
    "model",
    [
        Forward(lambda model, x: x.flip(1)),
        Forward(lambda model, x: torch.cat([x[:, 4:], x[:, :4]], 1)),
        Forward(lambda model, x: x.view(2, 4, -1).softmax(1).view(x.shape)),
        Forward(lambda model, x: model.other(x), other=nn.Conv2d(8, 8, 1, groups=2)),
        Forward(lambda model, x: x + model.other, other=nn.Parameter(torch.randn(8, 1, 1))),
        Forward(lambda model, x: x.mean(1, keepdim=True) + model.other(x), other=nn.Conv2d(8, 8, 1, groups=2)),
        Forward(twice, other=nn.Conv2d(8, 8, 1)),
        Forward(lambda model, x: model.other(x.movedim(1, -1)).movedim(-1, 1), other=nn.LayerNorm(8)),
        Forward(lambda model, x: model.other(x), other=nn.GroupNorm(2, 8)),
    ],
)
def test_channels_that_run_into_something_else_stay(model):
    inputs = torch.randn(2, 4, 4, 4)
    state = copy.deepcopy(model.state_dict())
    found = permute_channels(model, NM(2, 4), (inputs,))
    assert found.found == ()
    assert "no layer that was followed" in found.left_out["second.weight"]
    assert found.before == found.after
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_weight_that_is_used_outside_its_layer_stays():
    model = Forward(lambda model, x: model.other(x), other=nn.Conv2d(8, 8, 1))
    model.between = lambda model, x: model.other(x) + F.conv2d(x, model.other.weight).mean()
    found = permute_channels(model, NM(2, 4), (torch.randn(2, 4, 4, 4),))
    assert found.found == ()


def test_what_changes_the_outputs_is_taken_back_and_named():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 8, 1)), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    scales = torch.arange(1.0, 9.0)[:, None, None]
    # A hook on a layer is not seen.
    model[0][0].register_forward_hook(lambda module, args, output: output * scales.to(output.dtype))
    inputs = torch.randn(2, 4, 4, 4)
    expected = outputs(model, inputs)
    found = permute_channels(model, NM(2, 4), (inputs,))
    assert found.left_out["2.weight"] == "the outputs change with the order of its input channels"
    assert "4.weight" not in found.left_out
    torch.testing.assert_close(outputs(model, inputs), expected)


def test_shared_weights_stay():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    )
    model[4].weight = model[0].weight
    found = permute_channels(model, NM(2, 4), (torch.randn(2, 8),))
    assert found.left_out["2.weight"] == "0.weight is used at several places"
    assert len(found.found) == 1


@pytest.mark.parametrize(("size", "why"), [(2, "groups lie within one"), (3, "more inputs than groups of 4 divide")])
def test_flattened_channels_stay_unless_others_take_them_too(size, why):
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8 * size**2, 4))
    found = permute_channels(model, NM(2, 4), (torch.randn(2, 4, size, size),))
    assert found.left_out["2.weight"].endswith(why)


def test_what_is_excluded_does_not_count():
    torch.manual_seed(0)
    model, inputs = lively(Residual()), torch.randn(2, 4, 8, 8)
    found = permute_channels(
        model, NM(2, 4), (inputs,), exclude=["head.4", "inner.0", "head.0", "outer.1", "squeeze.1"]
    )
    assert found.left_out.keys() == {"stem.0.weight"}
    assert len(found.found) == 1


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.aside = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        return (self.second(x), self.aside(x)) if self.training else self.second(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [(Branching(), "Branching cannot be traced"), (Auxiliary(), "aside.weight is not reached from the inputs")],
)
def test_models_that_are_not_seen_whole_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        permute_channels(model, NM(2, 4), (torch.randn(2, 8),))
