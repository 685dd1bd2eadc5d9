"""Plans on torchvision's models: zeros anywhere, 2:4, and half the multiply-accumulates in whole channels.

The table of docs/models.md is what this computes. To write it anew: DISTPRUNE_WRITE_DOCS=1 pytest THIS_FILE
"""

import gc
import os
import re
from collections import Counter
from contextlib import suppress

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from distprune.pruning import NM, OneShotSchedule, Pruner
from distprune.structured import ChannelPruner, find_channels
from tests.jobs import ROOT

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg16_bn": "VGG-16-BN",
    "mobilenet_v3_large": "MobileNetV3-L",
    "densenet121": "DenseNet-121",
    "efficientnet_b0": "EfficientNet-B0",
    "convnext_tiny": "ConvNeXt-T",
    "regnet_y_400mf": "RegNet-Y-400MF",
    "vit_b_16": "ViT-B/16",
    "swin_t": "Swin-T",
}
# Small, where the model takes it: equality does not depend on it.
SIZES = {"vit_b_16": 224}
# Made of zeros by torchvision, which would all be pruned.
EXCLUDED = {"vit_b_16": ["last"]}
SHARES = [0.05 * step for step in range(10, 0, -1)]
HEADER = (
    "| model | 90 %: zero of prunable | 2:4: zero of prunable | channels in groups | MACs left | parameters left | "
    "stays dense |\n|---|---|---|---|---|---|---|\n"
)


def made(name):
    """A model with statistics and factors of normalisations as training gives them."""
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.1, 0.1)
    return model.eval()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def zeros_anywhere(name):
    model = made(name)
    pruner = Pruner(model, optimizer_of(model), OneShotSchedule(0.9), exclude=EXCLUDED.get(name, ()))
    report = pruner.step()
    assert report.zeros == round(0.9 * report.weights)
    assert sum(int((tensor.weight == 0).sum()) for tensor in pruner.tensors) == report.zeros
    return report


def two_of_four(name):
    model = made(name)
    pruner = Pruner(model, optimizer_of(model), OneShotSchedule(0.5), exclude=EXCLUDED.get(name, ()), pattern=NM(2, 4))
    report = pruner.step()
    for tensor in pruner.tensors:
        groups = tensor.weight.detach().movedim(1, -1).reshape(-1, 4)
        assert bool(((groups == 0).sum(1) == 2).all()), f"{name}: {tensor.name}"
    return report


def conv_and_linear_macs(model, images):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if "attention" not in str(op) and "bmm" not in str(op)) // 2


def whole_channels(name):
    """Half the multiply-accumulates gone, or the most that multiples of 0.05 allow."""
    model = made(name)
    images = torch.randn(2, 3, SIZES.get(name, 64), SIZES.get(name, 64), generator=torch.Generator().manual_seed(1))
    channels = find_channels(model, images)
    for share in SHARES:
        with suppress(ValueError):  # more than can go
            pruner = ChannelPruner(model, optimizer_of(model), OneShotSchedule(share), channels)
            break
    every = torch.ones(channels.units, dtype=torch.bool)
    assert channels.count_parameters(every) == sum(p.numel() for p in model.parameters())
    pruner.step()
    assert pruner.sparsity == pytest.approx(share, abs=0.01)
    with torch.no_grad():
        masked = model(images)
        assert pruner.shrink()
        shrunk = model(images)
    assert float((masked - shrunk).abs().max()) <= 1e-5 * max(1.0, float(masked.abs().max())), name
    assert channels.count_parameters(pruner.kept) == sum(p.numel() for p in model.parameters())
    if name not in ("vit_b_16", "swin_t"):  # whose attention that counter sees in other parts
        assert conv_and_linear_macs(model, images) == 2 * channels.count_macs(pruner.kept)  # two images
    return channels, pruner


def stays_dense(channels):
    """How many layers for which reason."""
    reasons = Counter(
        re.sub(r"\b[\w.]*\.?(norm|ln|LayerNorm)[\w.]*(?= normalises)", "a norm", why)
        for why in channels.left_out.values()
    )
    short = {
        "nothing in the model takes its channels: they are its outputs": "outputs",
        "it is not called as a layer, so nobody sees what hangs on it": "not called as a layer",
    }
    shown = Counter()
    for why, count in reasons.items():
        shown[
            short.get(
                why,
                "width of a norm" if "normalises" in why else "hangs on a parameter" if "no layer's" in why else why,
            )
        ] += count
    return ", ".join(f"{why}: {count}" for why, count in sorted(shown.items()))


def row(name):
    anywhere, pattern = zeros_anywhere(name), two_of_four(name)
    channels, pruner = whole_channels(name)
    every = torch.ones(channels.units, dtype=torch.bool)
    macs = channels.count_macs(pruner.kept) / channels.count_macs(every)
    parameters = channels.count_parameters(pruner.kept) / channels.count_parameters(every)
    gc.collect()
    return (
        f"| {NAMES[name]} | {anywhere.zeros:,} of {anywhere.weights:,} | {pattern.zeros:,} of {pattern.weights:,} | "
        f"{channels.units:,} in {len(channels.groups)} | {100 * macs:.0f} % | {100 * parameters:.0f} % | "
        f"{stays_dense(channels)} |\n"
    )


@pytest.fixture(scope="module")
def written():
    rows = {}
    yield rows
    if os.environ.get("DISTPRUNE_WRITE_DOCS") and len(rows) == len(NAMES):
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        table = HEADER + "".join(rows[name] for name in NAMES)
        DOCS.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_plan_works_and_the_table_says_so(name, written):
    written[name] = row(name)
    if not os.environ.get("DISTPRUNE_WRITE_DOCS"):
        assert written[name] in DOCS.read_text(encoding="utf-8")
