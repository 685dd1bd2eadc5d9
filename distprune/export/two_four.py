"""2:4: linear layers whose weights have two zeros in each four, on the sparse tensor cores of NVIDIA GPUs, where these
are faster."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from distprune.data import Inputs
from distprune.errors import ConfigError

ROUNDS = 20
GAIN = 1.02
"""So many times as fast a layer must be to be taken."""

Timer = Callable[[nn.Linear, Tensor], float]
"""Milliseconds of one run of a layer on some inputs."""


@dataclass(frozen=True)
class Choice:
    """What was measured of one layer, and what follows.

    Attributes:
        dense_ms, sparse_ms: of one run; None where it cannot run sparse.
        sparse: whether it is to.
        why: it is not, where it is not.
    """

    dense_ms: float | None
    sparse_ms: float | None
    sparse: bool
    why: str


def need_gpu(device: torch.device) -> None:
    """Refuse machines without sparse tensor cores.

    Raises:
        ConfigError: says what is needed.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError(
            "--format: 2:4 is chosen by measuring, and needs an NVIDIA GPU with sparse tensor cores (compute "
            "capability 8.0 or newer) where it is exported"
        )


def fits(weight: Tensor) -> bool:
    """Whether a weight (outputs x inputs) has two zeros or more in each four inputs in a row."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2


def choose(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    timer: Timer,
    convert: Callable[[Tensor], Tensor] = to_sparse_semi_structured,
) -> dict[str, Choice]:
    """Measure every linear layer, dense and sparse, and say which is to be which.

    Args:
        model: on the device, in half precision.
        inputs: what each linear layer takes, by its name.
        timer: of one layer.
        convert: makes the sparse tensor of a weight.
    """
    choices = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if not fits(layer.weight):
            choices[name] = Choice(None, None, False, "its weights are not 2:4")
        elif name not in inputs:
            choices[name] = Choice(None, None, False, "it is not called as a module")
        else:
            choices[name] = _measured(layer, inputs[name], timer, convert)
    return choices


def apply(model: nn.Module, names: list[str], convert: Callable[[Tensor], Tensor] = to_sparse_semi_structured) -> None:
    """Let the linear layers `names` of a model, in half precision on a GPU, compute with sparse weights."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(convert(layer.weight.detach()), requires_grad=False)


def inputs_of_layers(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """What each linear layer takes in one run, by its name."""
    taken: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: taken.__setitem__(name, args[0].detach()))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return taken


def time_layer(layer: nn.Linear, inputs: Tensor) -> float:
    """Milliseconds of one run on a GPU, the median of some."""
    times = []
    with torch.no_grad():
        for _ in range(3 + ROUNDS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            layer(inputs)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def _measured(layer: nn.Linear, inputs: Tensor, timer: Timer, convert: Callable[[Tensor], Tensor]) -> Choice:
    dense_ms, dense = timer(layer, inputs), layer.weight
    try:
        layer.weight = nn.Parameter(convert(dense.detach()), requires_grad=False)
        sparse_ms = timer(layer, inputs)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Choice(dense_ms, None, False, f"its shape does not fit the kernel: {str(error).splitlines()[0]}")
    finally:
        layer.weight = dense
    if dense_ms < GAIN * sparse_ms:
        return Choice(dense_ms, sparse_ms, False, f"sparse takes {sparse_ms:.3f} ms, dense {dense_ms:.3f} ms")
    return Choice(dense_ms, sparse_ms, True, "")


def halved(inputs: Inputs) -> Inputs:
    """Inputs in half precision, but for those that are whole numbers."""
    if isinstance(inputs, Tensor):
        return inputs.half()
    return {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
