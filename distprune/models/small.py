"""Small reference networks for grey images."""

from __future__ import annotations

from torch import nn


def lenet300(num_classes: int = 10, in_features: int = 784) -> nn.Sequential:
    """LeNet-300-100 (LeCun et al. 1998): three linear layers, 266,200 weights; images are flattened."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_features, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )


def digits_cnn(num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """A conv net for 1 x 8 x 8 images: two 3 x 3 convolutions with batch norm, pooling, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, num_classes),
    )


def mnist_cnn(num_classes: int = 10, width: int = 32) -> nn.Sequential:
    """A conv net for 1 x 28 x 28 images: two pairs of 3 x 3 convolutions with batch norm, each pooled, two linear
    layers; 468,000 parameters at width 32."""

    def pair(inputs: int, outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for planes in (inputs, outputs):
            layers += [nn.Conv2d(planes, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return [*layers, nn.MaxPool2d(2)]

    return nn.Sequential(
        *pair(1, width),
        *pair(width, 2 * width),
        nn.Flatten(),
        nn.Linear(2 * width * 49, 4 * width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(4 * width, num_classes),
    )
