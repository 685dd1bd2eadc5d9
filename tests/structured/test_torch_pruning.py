"""The same channels go as in Torch-Pruning, whose importance, normalisation and ranking are the default here.

Two things differ. Torch-Pruning leaves the weights of depthwise convolutions out of its importance, and counts the
inputs of a convolution in groups once for each group, where here all weights count once. And it rounds the number of
channels that go up, so budgets are chosen that need no rounding.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
import torchvision
from torch import nn

from distprune.structured import ChannelPruner, find_channels
from tests.pruning.reference import Levels
from tests.structured.nets import Grouped, stirred


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.bn(self.stem(x)))))
        return self.head(F.relu(self.pointwise(x)).mean((2, 3)))


def without_depthwise_weights(model: nn.Module) -> nn.Module:
    """So small that it does not matter whether they count."""
    with torch.no_grad():
        model.depthwise.weight.mul_(1e-4)
    return model


def grouped() -> nn.Module:
    model = without_depthwise_weights(Grouped())
    with torch.no_grad():  # so that it does not matter how often its inputs count
        model.grouped.weight.mul_(1e-4)
    return model


NETS = {
    "conv net": (conv_net, 8),
    "resnet18": (resnet18, 64),
    "separable": (lambda: without_depthwise_weights(Separable()), 8),
    "grouped": (grouped, 6),
}


def pruned_by_torch_pruning(model: nn.Module, images: torch.Tensor, ratio: float, is_global: bool) -> nn.Module:
    outputs = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    kinds = [nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm]
    importance = torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer="mean", bias=False, target_types=kinds
    )
    torch_pruning.pruner.BasePruner(
        model, images, importance, global_pruning=is_global, pruning_ratio=ratio, ignored_layers=outputs,
        in_channel_groups={}, out_channel_groups={},
    ).step()  # fmt: skip
    return model


@pytest.mark.parametrize("compare", ["global", "uniform"])
@pytest.mark.parametrize("name", NETS)
def test_the_same_channels_go(name, compare):
    make, size = NETS[name]
    model, images = stirred(make()), torch.randn(1, 3, size, size)
    with torch.no_grad():  # unlike each other, as after training
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(len(parameter), *[1] * (parameter.dim() - 1)) + 0.2)
    channels = find_channels(model, images)
    gone = channels.units // 4 if compare == "global" else channels.units // 2
    share = gone / channels.units
    theirs = pruned_by_torch_pruning(copy.deepcopy(model).eval(), images, share, compare == "global")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = ChannelPruner(model, optimizer, Levels([share]), channels, budget="channels", compare=compare)
    pruner.step()
    pruner.shrink()
    assert int((~pruner.kept).sum()) == gone
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), theirs.state_dict().values(), strict=True)
    )


def test_convolutions_in_groups_count_their_inputs_once_where_torch_pruning_counts_them_for_each_group():
    """Of two units, each two channels of the first layer: |out|^2 is 4 + 4 and 1 + 1, |in|^2 is 1 and 6.

    Here they are worth 8 + 1 and 2 + 6, and the second goes; there (4 + 4) / 2 + 1 and (1 + 1) / 2 + 6.
    """
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 1, 2, 1]).view(4, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([0.25, 1.5]).sqrt().view(1, 2, 1, 1).expand(4, 2, 1, 1))
    images = torch.randn(1, 1, 4, 4)
    channels = find_channels(model, images, exclude=["1"])
    assert [(group.name, group.size, group.width) for group in channels.groups] == [("0", 2, 2)]
    graph = torch_pruning.DependencyGraph().build_dependency(model, images)
    group = graph.get_pruning_group(model[0], torch_pruning.prune_conv_out_channels, [0, 1, 2, 3])
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    assert importance(group).view(2, 2).mean(0).tolist() == pytest.approx([5, 7])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = ChannelPruner(model, optimizer, Levels([0.5]), channels, budget="channels")
    assert pruner.unit_norms().square().tolist() == pytest.approx([9, 8])
    pruner.step()
    assert pruner.kept.tolist() == [True, False]
