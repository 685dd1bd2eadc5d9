"""Small networks of every kind that channels are found in, and how some of their units are taken."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distprune.pruning import masks
from distprune.structured import ChannelPruner, Channels
from tests.pruning.reference import Levels


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6),
        nn.PReLU(6), nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.back = nn.Conv2d(6, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 10, 1, stride=2)
        self.down = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.back(F.gelu(self.inner(x))))
        x = F.relu(self.shortcut(x) + self.down(x))
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(10, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(F.relu(self.c(F.silu(self.bn(x)))).amax((2, 3)))


class Grouped(nn.Module):
    """Depthwise in the middle of an inverted bottleneck, then a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 6, 1)
        self.wide = nn.Conv2d(6, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2)
        self.last = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.bn(self.expand(x))))))
        x = F.relu(self.last(F.relu(self.grouped(F.relu(self.wide(x))))))
        return self.head(x.mean((2, 3)))


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 7), nn.Dropout(0.3), nn.Tanh(),
        nn.Linear(7, 3),
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.fc1 = nn.Conv2d(8, 4, 1)
        self.fc2 = nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return self.head((x * gate).mean((2, 3)))


class Transposed(nn.Module):
    """An hourglass, as autoencoders are."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.spread = nn.ConvTranspose2d(5, 5, 3, padding=1, groups=5)
        self.norm = nn.InstanceNorm2d(5, affine=True)
        self.last = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.spread(F.relu(self.up(F.relu(self.down(x))))))))


class Twice(nn.Module):
    """One convolution, and one normalisation without weights, used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.norm(self.again(x)))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """A vision transformer in small."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(0.1 * torch.randn(4, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 12, 0.1, "gelu", batch_first=True, norm_first=norm_first)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


NETS = {
    "plain": (plain, 8),
    "residual": (Residual, 8),
    "concatenated": (Concatenated, 6),
    "grouped": (Grouped, 6),
    "flattened": (flattened, 8),
    "squeeze-excite": (SqueezeExcite, 6),
    "transposed": (Transposed, 8),
    "twice": (Twice, 6),
    "transformer": (Transformer, 8),
    "post-norm transformer": (lambda: Transformer(False), 8),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network in training mode, whose parameters and statistics are all random, and two images for it."""
    make, size = NETS[name]
    return stirred(make()), torch.randn(2, 3, size, size)


def stirred(model: nn.Module) -> nn.Module:
    """With biases, factors and statistics as training might leave them, none of them 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def some(channels: Channels, seed: int = 0) -> Tensor:
    """About half of all units, and of each group at least one and not all."""
    kept = torch.rand(channels.units, generator=torch.Generator().manual_seed(seed)) < 0.5
    for group in channels.groups:
        kept[group.begin + seed % group.size] = True
        kept[group.begin + (seed + 1) % group.size] = False
    return kept


def pruned(model: nn.Module, channels: Channels, kept: Tensor) -> ChannelPruner:
    """A pruner that holds all units but those `kept` at 0."""
    pruner = ChannelPruner(model, torch.optim.SGD(model.parameters(), lr=0.1), Levels([0.0]), channels)
    bits = {group.name: masks.pack(kept[group.units][None]) for group in channels.groups}
    pruner.load_state_dict(pruner.state_dict() | {"masks": bits})
    assert torch.equal(pruner.kept, kept)
    return pruner
