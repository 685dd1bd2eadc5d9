import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distprune.models.cifar_resnet import resnet20
from distprune.structured import find_channels, kept_of, layout, shrink_like
from tests.structured.nets import NETS, Transformer, made, pruned, some

GROUPS = {
    "plain": {"0": (8, 1), "3": (6, 1), "6": (5, 1)},
    "residual": {"back": (8, 1), "inner": (6, 1), "shortcut": (10, 1)},
    "concatenated": {"a": (4, 1), "b": (6, 1), "c": (4, 1)},
    # In `grouped` channel i goes with i + 4, and `wide`, which it takes, has 2 channels in a unit for the same reason.
    "grouped": {"stem": (6, 1), "expand": (12, 1), "wide": (6, 2), "grouped": (4, 2), "last": (4, 1)},
    "flattened": {"0": (6, 1), "4": (7, 1)},
    "squeeze-excite": {"fc1": (4, 1), "fc2": (8, 1)},
    "transposed": {"down": (6, 1), "up": (5, 1)},
    "twice": {"again": (6, 1)},
    "transformer": {
        "blocks.layers.0.linear1": (12, 1), "blocks.layers.1.linear1": (12, 1),
        "blocks.layers.0.self_attn": (4, 4), "blocks.layers.1.self_attn": (4, 4),
    },
}  # fmt: skip
GROUPS["post-norm transformer"] = GROUPS["transformer"]


@pytest.mark.parametrize("name", NETS)
def test_units_are_found_with_all_that_makes_them(name):
    channels = find_channels(*made(name))
    assert {group.name: (group.size, group.width) for group in channels.groups} == GROUPS[name]
    makers = {group.name: set(group.makers) for group in channels.groups}
    if name == "residual":
        assert makers["back"] == {"stem.weight", "back.weight"}
        assert makers["shortcut"] == {"shortcut.weight", "down.weight"}
    if name == "squeeze-excite":
        assert makers["fc2"] == {"stem.weight", "fc2.weight"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETS)
def test_without_units_a_model_computes_what_it_does_with_their_weights_at_0(name, seed):
    model, images = made(name)
    channels = find_channels(model, images)
    kept = some(channels, seed)
    pruner = pruned(model, channels, kept)
    model.eval()
    masked = model(images)
    assert pruner.shrink()
    assert not pruner.shrink(), "nothing is left to remove"
    shrunk = model(images)
    torch.testing.assert_close(shrunk, masked, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == channels.count_parameters(kept)

    again = NETS[name][0]()
    shrink_like(again, json.loads(json.dumps(layout(kept_of(model)))))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), shrunk)
    assert sizes(again) == sizes(model)
    model.train()(images).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def sizes(model):
    names = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_heads")
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in names
    }


@pytest.mark.parametrize("name", ["grouped", "transposed"])
def test_layers_know_their_new_sizes(name):
    model, images = made(name)
    channels = find_channels(model, images)
    pruned(model, channels, some(channels)).shrink()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            args = (module.in_channels, module.out_channels, module.kernel_size)
            assert type(module)(*args, groups=module.groups).weight.shape == module.weight.shape
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape


def test_the_model_given_stays_as_it_is():
    model, images = made("residual")
    model.bn.eval()
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    find_channels(model, images)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_may_be_off_and_examples_may_have_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, first, scale):
            out = self.c(F.relu(self.b(F.relu(self.a(first)) * scale)))
            return {"logits": out, "label": out.argmax(1), "is_sure": out > 1}

    with torch.no_grad():
        channels = find_channels(Named(), {"first": torch.randn(3, 4), "scale": torch.ones(3, 1)})
    assert {group.name for group in channels.groups} == {"a", "b"}
    example = (torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 1))
    assert find_channels(Named().double(), example).units == channels.units
    assert find_channels(Named().bfloat16(), example).units == channels.units


def test_attention_called_by_keywords_is_found_and_counted():
    class Called(nn.Module):
        def __init__(self, by_name):
            super().__init__()
            self.attention, self.by_name = nn.MultiheadAttention(12, 3, batch_first=True), by_name

        def forward(self, x):
            return self.attention(query=x, key=x, value=x)[0] if self.by_name else self.attention(x, x, x)[0]

    named, placed = (find_channels(Called(by_name), torch.randn(2, 5, 12)) for by_name in (True, False))
    every = torch.ones(3, dtype=torch.bool)
    assert named.count_macs(every) == placed.count_macs(every) == 5 * 4 * 12 * 12 + 2 * 5 * 5 * 12
    assert named.count_macs(torch.tensor([True, False, False])) * 3 == named.count_macs(every)


def reasons(model, example, **options):
    """What stays dense and why, by the name of a layer."""
    try:
        return dict(find_channels(model, example, **options).left_out)
    except ValueError as error:
        return dict(part.split(": ", 1) for part in str(error).split(" can be removed: ")[1].split("; "))


def convs(*between):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))


IMAGES = torch.randn(2, 3, 6, 6)


def test_outputs_and_what_is_normalised_over_its_channels_stay_dense():
    model = convs(nn.GroupNorm(2, 8))
    assert reasons(model, IMAGES) == {
        "0": "1 normalises over groups of its channels",
        "4": "nothing in the model takes its channels: they are its outputs",
    }
    left_out = reasons(Transformer(), torch.randn(2, 3, 8, 8))
    assert left_out["blocks.layers.1.linear2"] == "norm normalises over its channels"

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            return {"features": x, "logits": self.b(x)}

    with pytest.raises(ValueError, match=r"no channel of Features can be removed: a: its channels are outputs of the"):
        find_channels(Features(), IMAGES)


def test_what_is_frozen_or_left_out_stays_dense():
    model = convs(nn.BatchNorm2d(8))
    model[0].weight.requires_grad_(False)
    assert reasons(model, IMAGES)["0"] == "0.weight is frozen (requires_grad is False)"
    model = convs(nn.BatchNorm2d(8))
    model[1].weight.requires_grad_(False)
    assert reasons(model, IMAGES)["0"] == "1.weight, which hangs on it, is frozen (requires_grad is False)"
    model = convs(nn.BatchNorm2d(8))
    assert reasons(model, IMAGES, exclude=["0"])["0"] == "0.weight is excluded"
    left_out = reasons(model, IMAGES, include=["0"])
    assert left_out["2"] == "2.weight is not included"
    assert "0" not in left_out
    # Only together with all that make them.
    residual, images = made("residual")
    assert "stem.weight is excluded" in reasons(residual, images, exclude=["stem"])["back"]


def test_weights_that_are_shared_or_computed_stay():
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(3, 3, 1), nn.ReLU())), nn.Conv2d(3, 2, 1))
    model[4].weight = model[2].weight
    assert reasons(model, IMAGES)["0"] == "2.weight, which hangs on it, is shared by several layers"
    model = convs(nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[2])
    assert reasons(model, IMAGES)["0"] == "2.weight, which hangs on it, is no parameter but computed"


class Shapes(nn.Module):
    """Two convolutions, between which `between` happens."""

    def __init__(self, between, taken=8):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(taken, 4, 1), nn.Conv2d(4, 2, 1)
        self.between = between

    def forward(self, x):
        return self.c(F.relu(self.b(self.between(self.a(x)))))


@pytest.mark.parametrize(
    ("between", "taken", "why"),
    [
        (lambda x: x.view(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6), 8, "the model does not run"),
        (lambda x: torch.mul(*x.chunk(2, 1)), 4, "split in parts"),
        (lambda x: torch.cat(x.split(4, 1)[::-1], 1), 8, "split in parts"),
        (lambda x: x.softmax(1), 8, "does not compute the same"),
        (lambda x: x - x.mean(1, keepdim=True), 8, "does not compute the same"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10, "without some of them"),
    ],
    ids=["shuffled", "gated", "swapped", "softmax", "mean", "padded"],
)
def test_what_the_model_does_with_channels_by_number_keeps_them(between, taken, why):
    left_out = reasons(Shapes(between, taken), IMAGES)
    assert why in left_out["a"]
    assert "b" not in left_out


def test_factors_that_begin_at_0_hide_nothing():
    model = nn.Sequential(Shapes(lambda x: x.softmax(1)), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    nn.init.zeros_(model[1].weight)
    assert "does not compute the same" in reasons(model, IMAGES)["0.a"]


def test_thin_attention_can_lose_more_heads():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), nn.Linear(16, 2))
    tokens = torch.randn(2, 5, 16)
    channels = find_channels(model, tokens)
    kept = torch.ones(channels.units, dtype=torch.bool)
    (heads,) = (group for group in channels.groups if group.name == "0.self_attn")
    kept[heads.begin] = False
    pruned(model, channels, kept).shrink()
    again = find_channels(model, tokens)
    assert {group.name: group.size for group in again.groups}["0.self_attn"] == 3


def test_layers_used_only_in_training_count():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)
            self.auxiliary = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            out = self.c(F.relu(self.b(x)))
            return (out, self.auxiliary(x)) if self.training else out

    left_out = reasons(Auxiliary(), IMAGES)
    assert left_out["a"].startswith("without some of them the model does not run")
    assert "auxiliary" in left_out
    assert "b" not in left_out


def test_padding_shortcuts_keep_residual_streams_and_inner_channels_go():
    channels = find_channels(resnet20(), torch.randn(2, 3, 16, 16))
    inner = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert sorted(group.name for group in channels.groups) == inner
    assert set(channels.left_out) == {"conv1", "linear"}


def test_where_nothing_can_be_removed_the_message_says_why():
    with pytest.raises(ValueError, match=r"no channel of Linear can be removed: .*they are its outputs"):
        find_channels(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match="nothing to prune in ReLU"):
        find_channels(nn.ReLU(), torch.randn(4, 3))
    with pytest.raises(ValueError, match="the channels of Sequential cannot be traced: "):
        find_channels(convs(nn.ReLU()), torch.randn(2, 5, 6, 6))


def test_a_layout_of_another_model_is_refused_and_changes_nothing():
    model, images = made("plain")
    channels = find_channels(model, images)
    pruned(model, channels, some(channels)).shrink()
    other, _ = made("residual")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="of another model: "):
        shrink_like(other, layout(kept_of(model)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), other.state_dict().values(), strict=True))
    assert kept_of(other) == {}


@pytest.mark.parametrize("name", NETS)
def test_a_shrunk_model_can_be_shrunk_again_and_knows_what_is_left_of_the_first(name):
    model, images = made(name)
    for seed in range(2):
        channels = find_channels(model, images)
        kept = some(channels, seed)
        kept[: channels.groups[0].size] = torch.arange(channels.groups[0].size) < max(2, channels.groups[0].size // 2)
        pruned(model, channels, kept).shrink()
    again = NETS[name][0]()
    shrink_like(again, layout(kept_of(model)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_a_convolution_in_groups_of_one_channel_left_is_not_taken_for_a_depthwise_one():
    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1))

    model = net()
    channels = find_channels(model, IMAGES)
    kept = torch.ones(channels.units, dtype=torch.bool)
    for group in channels.groups:
        if group.name in "01":
            assert (group.size, group.width) == (2, 4)
            kept[group.begin] = False
    pruned(model, channels, kept).shrink()
    assert model[1].groups == model[1].in_channels == model[1].out_channels == 4
    again = find_channels(model, IMAGES)
    assert [group.name for group in again.groups] == ["2"]
    assert "1 has one channel left in each of its groups" in again.left_out.values()
    fresh = net()
    shrink_like(fresh, layout(kept_of(model)))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IMAGES), model(IMAGES))
