"""Which channels of a model can be removed: traced, then tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distprune.errors import reason
from distprune.pruning.prunable import find_prunable
from distprune.structured.channels import ChannelGroup, Channels, Work
from distprune.structured.example import moved, run, tensors
from distprune.structured.shrink import positions, resize
from distprune.structured.trace import Traced, heads, trace
from distprune.structured.work import measure

EFFECT = 1e-3
"""Largest difference between a model whose weights are 0 and one without them, of what it matters that they are 0."""
NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}
"""And of the largest output."""


def find_channels(model: nn.Module, example: Any, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Channels:
    """Find the units of a model that can be removed.

    Every group is tried: some of its units are removed from a copy of the model, which must then compute what it does
    with their weights at 0. Groups that do not stand this stay dense, with the reason, as do model outputs, what is
    normalised over its channels (layer norm), and what is frozen or left out.

    Args:
        model: bare: not wrapped, not sharded, not compiled. It is left as it is.
        example: what it takes: a tensor, a tuple of arguments, or a mapping of keyword arguments. Their first dimension
            is the batch.
        include, exclude: see `find_prunable`. Channels go only where all weights that make them are to be pruned.

    Raises:
        ValueError: the model cannot be run or traced on `example`, nothing can be removed, or see `find_prunable`.
    """
    selection = find_prunable(model, include, exclude)
    allowed, left_out = {tensor.name for tensor in selection.tensors}, dict(selection.left_out)
    try:
        tried, inputs = _prepared(model, example)
        work = measure(tried, inputs)
        with torch.enable_grad():
            found = [*trace(tried, inputs), *heads(tried, {layer.tensor for layer in work})]
    except Exception as error:  # whatever a model raises, and what tracing stumbles over
        raise ValueError(f"the channels of {type(model).__name__} cannot be traced: {reason(error)}") from error
    reasons: dict[str, str] = {}
    good: list[Traced] = []
    unfit = _unfit(model)
    for group in found:
        outside = [name for name in group.makers if name not in allowed]
        why = group.problem or (f"{outside[0]} is {left_out.get(outside[0], 'not pruned')}" if outside else None)
        why = why or next((unfit(name) for name, *_ in group.links if unfit(name)), None)
        if why is None:
            good.append(group)
        else:
            reasons[group.name] = why
    with torch.random.fork_rng(devices=[]):
        trial = _Trial(tried, inputs)
        while failing := trial.failing(good):
            reasons |= failing
            good = [group for group in good if group.name not in failing]
    channels = _channels(tried, good, work, reasons)
    if not channels.groups:
        raise ValueError(
            f"no channel of {type(model).__name__} can be removed: "
            + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        )
    return channels


def _prepared(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """A copy of a model to trace and to try, and what it takes: in float64, or in float32 if it insists on that."""
    # Frozen parameters would hide what follows from them.
    copied = copy.deepcopy(model).cpu().eval().requires_grad_(True)
    try:
        with torch.no_grad():
            run(copied.double(), inputs := moved(example, torch.float64))
    except RuntimeError:
        copied, inputs = copied.float(), moved(example, torch.float32)
    return copied, inputs


def _channels(model: nn.Module, found: Sequence[Traced], work: Sequence[Work], left_out: Mapping[str, str]) -> Channels:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    owners: dict[str, dict[int, Tensor]] = {}
    groups: list[ChannelGroup] = []
    begin = 0
    for group in found:
        units = group.units()
        size = max(units) + 1
        for name, dim, indices, roots in group.links:
            owner = owners.setdefault(name, {}).setdefault(dim, torch.full((state[name].shape[dim],), -1))
            owner[torch.tensor(indices)] = begin + torch.tensor(units)[torch.tensor(roots)]
        groups.append(ChannelGroup(group.name, begin, size, group.size // size, tuple(dict.fromkeys(group.makers))))
        begin += size
    return Channels(
        tuple(groups),
        owners,
        frozenset(scored for group in found for scored in group.scored),
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        frozenset(name for name, _ in model.named_parameters()),
        tuple(work),
        dict(left_out),
    )


def _unfit(model: nn.Module) -> Callable[[str], str | None]:
    """Says of a parameter or buffer why nothing can be removed from it, if it cannot."""
    names: dict[Tensor, set[tuple[nn.Module, str]]] = {}
    state: dict[str, Tensor] = dict(model.named_buffers())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        names.setdefault(parameter, set()).add((model.get_submodule(owner), leaf))
        state[name] = parameter

    def why(name: str) -> str | None:
        if name not in state:
            return f"{name}, which hangs on it, is no parameter but computed"
        if (tensor := state[name]) not in names:
            return None  # a buffer
        if len(names[tensor]) > 1:
            return f"{name}, which hangs on it, is shared by several layers"
        return None if tensor.requires_grad else f"{name}, which hangs on it, is frozen (requires_grad is False)"

    return why


class _Trial:
    """Removes some units from copies of a model, and looks at what comes out."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self._model = model
        self._example = example
        self._trains = self._runs_in_training()

    def failing(self, groups: Sequence[Traced]) -> dict[str, str]:
        """The groups that do not stand being removed in part, and why, found by halving.

        Raises:
            ValueError: each of two halves does, and not both together.
        """
        if not groups or (why := self._problem(groups)) is None:
            return {}
        if len(groups) == 1:
            return {groups[0].name: why}
        half = len(groups) // 2
        found = self.failing(groups[:half]) | self.failing(groups[half:])
        if not found:
            raise ValueError(f"the channels of {type(self._model).__name__} cannot be removed together: {why}")
        return found

    def _problem(self, groups: Sequence[Traced]) -> str | None:
        """Tried with few, half and most of the units, since some shapes fit by chance."""
        channels = _channels(self._model, groups, (), {})
        generator = torch.Generator().manual_seed(0)
        for share in (0.5, 0.2, 0.8):
            kept = torch.rand(channels.units, generator=generator) < share
            for group in channels.groups:
                kept[group.begin], kept[group.begin + group.size - 1] = True, False
            tried = copy.deepcopy(self._model)
            _stir(tried, generator)
            dense = self._outputs(tried)
            zero(tried, channels, kept)
            masked = self._outputs(tried)
            try:
                resize(tried, positions(channels, torch.ones_like(kept), kept))
                shrunk = self._outputs(tried)
                if self._trains and share == 0.5:
                    self._outputs(tried.train())
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                return f"without some of them the model does not run: {reason(error)}"
            for before, one, other in zip(dense, masked, shrunk, strict=True):
                if one.shape != other.shape:
                    return f"without some of them the output has shape {tuple(other.shape)}, not {tuple(one.shape)}"
                if not one.numel():
                    continue
                # Channels of a model that was never trained may hardly matter, so against what it matters they go.
                effect, difference = ((one - two).abs().max() for two in (before, other))
                if not difference <= EFFECT * effect + NOISE[one.dtype] * one.abs().max():
                    return (
                        f"without some of them the model does not compute the same: outputs differ by {difference:.2g}"
                    )
        return None

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        return [output for output in tensors(run(model, self._example)) if output.is_floating_point()]

    def _runs_in_training(self) -> bool:
        """Whether the model runs in training mode too, where it may use layers that it does not use otherwise."""
        try:
            self._outputs(copy.deepcopy(self._model).train())
        except Exception:  # batch norm wants more than one value, losses want labels
            return False
        return True


def _stir(model: nn.Module, generator: torch.Generator) -> None:
    """Give factors, biases and running means what training may: of a model freshly made many are 0, and hide things."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.empty_like(buffer).uniform_(-0.1, 0.1, generator=generator))


def zero(model: nn.Module, channels: Channels, kept: Tensor) -> None:
    """Set the parameters of all units but those `kept` to 0 in a bare model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim in channels.owners.get(name, {}):
                gone = (~channels.along(name, dim, kept)).nonzero()[:, 0]
                parameter.index_fill_(dim, gone.to(parameter.device), 0)
