"""One registry: a name in the configuration, a model in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from distprune.config.schema import HF, has_own_weights
from distprune.entries import imported, near
from distprune.errors import ConfigError
from distprune.models.cifar_resnet import cifar_resnet18, resnet20, resnet32, resnet56
from distprune.models.hugging_face import make_transformer
from distprune.models.small import digits_cnn, lenet300, mnist_cnn

Constructor = Callable[..., nn.Module]

OURS: dict[str, Constructor] = {
    f.__name__: f for f in (cifar_resnet18, digits_cnn, lenet300, mnist_cnn, resnet20, resnet32, resnet56)
}


def build_model(
    name: str,
    args: dict[str, Any],
    num_classes: int,
    key: str = "model",
    task: str = "images",
    pretrained: bool = False,
) -> nn.Module:
    """Make a model with fresh weights, or, of transformers, with its own.

    Args:
        name: one of ours, `torchvision:NAME`, `timm:NAME`, `package.module:function`, or `hf:NAME`.
        args: keyword arguments for its constructor.
        num_classes: passed as `num_classes` where the constructor takes it by name and `args` does not set it.
        key: the configuration section, for messages.
        task: as data.task; says which model of transformers is meant.
        pretrained: take the weights that a model of transformers has, unless `args` says otherwise.

    Raises:
        ConfigError: the name or an argument is unknown, or a package is missing.
        MissingError: see `make_transformer`.
    """
    if name.startswith(HF):
        settings = {arg: value for arg, value in args.items() if arg != "pretrained"}
        pretrained = pretrained and has_own_weights(name, args)
        return make_transformer(name.removeprefix(HF), task, num_classes, settings, pretrained, key)
    constructor, takes_classes = _find(name, key)
    if takes_classes:
        args = {"num_classes": num_classes, **args}
    try:
        model = constructor(**args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{key}.args: {name} cannot be made with {args}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{key}.name: {name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _find(name: str, key: str) -> tuple[Constructor, bool]:
    """The constructor, and whether it takes `num_classes`."""
    library, colon, entry = name.partition(":")
    if not colon:
        if name not in OURS:
            raise ConfigError(
                f"{key}.name: no model {name!r}{near(name, list(OURS))}; others are torchvision:NAME, "
                "timm:NAME, hf:NAME and package.module:function"
            )
        return OURS[name], True
    if library == "torchvision":
        from torchvision import models

        names = models.list_models()
        if entry not in names:
            raise ConfigError(f"{key}.name: torchvision has no model {entry!r}{near(entry, names)}")
        return lambda **args: models.get_model(entry, weights=None, **args), True
    if library == "timm":
        try:
            import timm
        except ImportError:
            raise ConfigError(f"{key}.name: {name} needs timm; pip install 'distprune[timm]'") from None
        if not timm.is_model(entry):
            raise ConfigError(f"{key}.name: timm has no model {entry!r}{near(entry, timm.list_models())}")
        return lambda **args: timm.create_model(entry, pretrained=False, **args), True
    constructor = imported(name, f"{key}.name")
    return constructor, "num_classes" in inspect.signature(constructor).parameters
