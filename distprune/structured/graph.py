"""Which channels hang together, from Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900), checked by
removing some."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.dependency.index_mapping import _FlattenIndexMapping
from torch_pruning.ops import OPTYPE

from distprune.errors import reason
from distprune.pruning.prunable import find_prunable
from distprune.structured.channels import ChannelGroup, Channels, Work
from distprune.structured.shrink import positions, resize

TOLERANCE = 1e-5
"""Largest difference between a model whose weights are 0 and one without them, of the largest output."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    # Traced without gradients switched off: frozen parameters would hide what follows from them.
    traced = copy.deepcopy(model).float().cpu().eval().requires_grad_(True)
    example = _moved(example)
    try:
        work = _measure(traced, example)
        found = [*_traced_groups(traced, example), *_heads(traced)]
    except Exception as error:  # whatever a model raises, and what tracing stumbles over
        raise ValueError(f"the channels of {type(model).__name__} cannot be traced: {reason(error)}") from error
    reasons: dict[str, str] = {}
    good: list[_Group] = []
    for group in found:
        outside = [name for name in group.makers if name not in allowed]
        why = group.problem or (f"{outside[0]} is {left_out.get(outside[0], 'not pruned')}" if outside else None)
        if why is None:
            good.append(group)
        else:
            reasons[group.name] = why
    reasons |= _failing(traced, example, good)
    channels = _channels(traced, [group for group in good if group.name not in reasons], work, reasons)
    if not channels.groups:
        raise ValueError(
            f"no channel of {type(model).__name__} can be removed: "
            + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        )
    return channels


def _failing(model: nn.Module, example: Any, groups: Sequence[_Group]) -> dict[str, str]:
    """The groups that do not stand being removed in part, and why, found by halving."""
    if not groups or (why := _difference(model, example, _channels(model, groups, (), {}))) is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: why}
    half = len(groups) // 2
    failing = _failing(model, example, groups[:half]) | _failing(model, example, groups[half:])
    if not failing:
        raise ValueError(f"its channels cannot be removed together: {why}")
    return failing


@dataclass
class _Group:
    """A group as it is found: for each tensor and dimension, indices and the channels of the maker they hang on."""

    name: str
    size: int
    makers: list[str] = field(default_factory=list)
    links: list[tuple[str, int, list[int], list[int]]] = field(default_factory=list)
    scored: set[tuple[str, int]] = field(default_factory=set)
    tied: list[Callable[[int], int]] = field(default_factory=list)
    """Each says of a channel with which others it must go: those it gives the same number."""
    problem: str | None = None
    is_taken: bool = False
    """Whether a layer takes its channels in."""

    def units(self) -> list[int]:
        """The unit of each channel, numbered in the order of their first."""
        parent = list(range(self.size))

        def root(channel: int) -> int:
            while parent[channel] != channel:
                channel = parent[channel]
            return channel

        for tie in self.tied:
            first: dict[int, int] = {}
            for channel in range(self.size):
                a, b = sorted((root(channel), root(first.setdefault(tie(channel), channel))))
                parent[b] = a
        numbers: dict[int, int] = {}
        return [numbers.setdefault(root(channel), len(numbers)) for channel in range(self.size)]


def _traced_groups(model: nn.Module, example: Any) -> Iterator[_Group]:
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model, example, forward_fn=_run, output_transform=lambda out: list(_tensors(out)), verbose=False
        )
    names = {module: name for name, module in model.named_modules()}
    inside = {
        m for attention in model.modules() if isinstance(attention, nn.MultiheadAttention) for m in attention.modules()
    }
    seen: set[nn.Module] = set()
    for maker in list(graph.module2node):
        if not isinstance(maker, (*_CONVOLUTIONS, nn.Linear)) or maker in seen | inside or _is_depthwise(maker):
            continue
        # Of one channel first: what cannot be removed is mostly reached by much else, and all of it a long list.
        group = _reach(graph, maker, names, seen) or _follow(graph, maker, 1, names, seen)
        if group.problem is None:
            group = _follow(graph, maker, len(maker.weight), names, seen)
            if not group.is_taken:
                group.problem = "nothing in the model takes its channels: they are its outputs"
            elif len(set(group.units())) == 1:
                group.problem = "its channels can only go all together"
        yield group
    for module, name in names.items():
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear)) and module not in graph.module2node and module not in inside:
            yield _Group(name, 1, problem="it is not called as a layer, so nobody sees what hangs on it")


def _reach(graph: Any, maker: Any, names: Mapping[nn.Module, str], seen: set[nn.Module]) -> _Group | None:
    """A group that cannot be removed, if channels are reshaped on the way, found without following each of them.

    Reshaped to and fro, as windows are in attention, one channel becomes many, and these again, without end.
    """
    node = graph.module2node[maker]
    group, waiting, reached = (
        _Group(names[maker], 1),
        [(node, graph.get_pruner_of_module(maker).prune_out_channels)],
        set(),
    )
    is_reshaped, outputs = False, {maker}
    while waiting:
        node, removes = waiting.pop()
        for dependency in node.dependencies:
            if dependency.is_triggered_by(removes) and dependency not in reached:
                reached.add(dependency)
                waiting.append((dependency.target, dependency.handler))
                is_reshaped |= any(isinstance(m, _FlattenIndexMapping) for m in dependency.index_mapping)
                is_output = graph.is_out_channel_pruning_fn(dependency.handler)
                if is_output and isinstance(dependency.target.module, nn.Module):
                    outputs.add(dependency.target.module)
                _link(group, dependency, [], [], names, is_output)
    if not is_reshaped or group.problem is None:
        return None
    seen |= outputs
    return group


def _follow(graph: Any, maker: Any, channels: int, names: Mapping[nn.Module, str], seen: set[nn.Module]) -> _Group:
    """What hangs on the first `channels` channels that `maker` makes; layers that make them too are `seen`."""
    removes = graph.get_pruner_of_module(maker).prune_out_channels
    group = _Group(names[maker], channels)
    for item in graph.get_pruning_group(maker, removes, list(range(channels))):
        is_output = graph.is_out_channel_pruning_fn(item.dep.handler)
        if is_output and isinstance(item.dep.target.module, nn.Module):
            seen.add(item.dep.target.module)
        _link(group, item.dep, item.idxs, item.root_idxs, names, is_output)
    return group


def _link(
    group: _Group,
    dependency: Any,
    indices: list[int],
    roots: list[int],
    names: Mapping[nn.Module, str],
    is_output: bool,
) -> None:
    """Add to a group what hangs on it in one layer: `indices` of its channels, on the channels `roots` of the maker."""
    module, kind = dependency.target.module, dependency.target.type
    if isinstance(module, nn.Parameter):
        group.problem = group.problem or f"a parameter of shape {tuple(module.shape)}, of no layer, hangs on it"
        return
    name = names.get(module)
    if kind == OPTYPE.OUTPUT:
        group.problem = group.problem or "its channels are outputs of the model"
    if name is None:
        return  # an operation without parameters
    if any(root is None for root in roots):
        group.problem = group.problem or f"how {name} hangs on it is not known"
    elif isinstance(module, _CONVOLUTIONS):
        _link_convolution(group, module, name, is_output, indices, roots)
    elif isinstance(module, nn.Linear):
        _add(group, module, name, "weight", 0 if is_output else 1, indices, roots, scored=True)
        if is_output:
            group.makers.append(f"{name}.weight")
            _add(group, module, name, "bias", 0, indices, roots)
        group.is_taken |= not is_output
    elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        _add(group, module, name, "weight", 0, indices, roots, scored=True)
        for leaf in ("bias", "running_mean", "running_var"):
            _add(group, module, name, leaf, 0, indices, roots)
    elif isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            _add(group, module, name, "weight", 0, indices, roots)
    elif isinstance(module, nn.LayerNorm):
        group.problem = group.problem or f"{name} normalises over its channels"
    elif isinstance(module, nn.GroupNorm):
        group.problem = group.problem or f"{name} normalises over groups of its channels"
    else:
        group.problem = group.problem or f"{name} is a {type(module).__name__}, from which no channel can be removed"


def _link_convolution(
    group: _Group, module: Any, name: str, is_output: bool, indices: list[int], roots: list[int]
) -> None:
    outputs, inputs = (1, 0) if module.transposed else (0, 1)
    if _is_depthwise(module):
        # Input and output at once. It makes nothing of its own.
        _add(group, module, name, "weight", 0, indices, roots, scored=True)
        _add(group, module, name, "bias", 0, indices, roots)
        return
    if module.groups > 1 and module.transposed:
        group.problem = group.problem or f"{name} is a transposed convolution in groups"
        return
    if is_output:
        group.makers.append(f"{name}.weight")
        _tie(group, indices, roots, module.out_channels // module.groups if module.groups > 1 else 0)
        _add(group, module, name, "weight", outputs, indices, roots, scored=True)
        _add(group, module, name, "bias", 0, indices, roots)
        return
    group.is_taken = True
    if module.groups > 1:
        # Every group of a grouped convolution sees as many inputs, so of each the same one goes.
        size = module.in_channels // module.groups
        _tie(group, indices, roots, size)
        indices = [index % size for index in indices]
    _add(group, module, name, "weight", inputs, indices, roots, scored=True)


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, _CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


def _tie(group: _Group, indices: list[int], roots: list[int], size: int) -> None:
    if size:
        offsets = {root: index % size for index, root in zip(indices, roots, strict=True)}
        group.tied.append(lambda channel: offsets.get(channel, -1 - channel))


def _add(
    group: _Group, module: nn.Module, name: str, leaf: str, dim: int, indices: list[int], roots: list[int],
    scored: bool = False,
) -> None:  # fmt: skip
    if getattr(module, leaf, None) is not None:
        key = f"{name}.{leaf}" if name else leaf
        group.links.append((key, dim, indices, roots))
        if scored:
            group.scored.add((key, dim))


def _heads(model: nn.Module) -> Iterator[_Group]:
    """The heads of nn.MultiheadAttention."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        group = _Group(name, module.embed_dim, [f"{name}.in_proj_weight"])
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            group.problem = "attention with its own widths, biases or zeros of keys and values"
        elif module.num_heads == 1:
            group.problem = "it has one head"
        else:
            width, size = module.head_dim, module.embed_dim
            group.tied.append(partial(_head_of, width))
            rows, roots = list(range(3 * size)), list(range(size)) * 3
            _add(group, module, name, "in_proj_weight", 0, rows, roots, scored=True)
            _add(group, module, name, "in_proj_bias", 0, rows, roots)
            _add(group, module.out_proj, f"{name}.out_proj", "weight", 1, roots[:size], roots[:size], scored=True)
        yield group


def _head_of(width: int, channel: int) -> int:
    return channel // width


def _channels(model: nn.Module, found: Sequence[_Group], work: Sequence[Work], left_out: Mapping[str, str]) -> Channels:
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


def _difference(model: nn.Module, example: Any, channels: Channels) -> str | None:
    """How a copy of the model without about half its units differs from one with their weights at 0, if it does."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(channels.units, generator=generator) < 0.5
    for group in channels.groups:
        kept[group.begin] = True
    tried = copy.deepcopy(model)
    zero(tried, channels, kept)
    every = torch.ones_like(kept)
    with torch.no_grad():
        masked = list(_tensors(_run(tried, example)))
        try:
            resize(tried, positions(channels, every, kept))
            shrunk = list(_tensors(_run(tried, example)))
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            return f"without some of them the model does not run: {reason(error)}"
    return compare(masked, shrunk)


def compare(masked: Sequence[Tensor], shrunk: Sequence[Tensor], tolerance: float = TOLERANCE) -> str | None:
    """How outputs of the model without units differ from those with the weights of these units at 0, if they do."""
    for one, other in zip(masked, shrunk, strict=True):
        if one.shape != other.shape:
            return f"without some of them the output has shape {tuple(other.shape)}, not {tuple(one.shape)}"
        largest = float((one - other).abs().max()) if one.numel() else 0.0
        if not largest <= tolerance * max(1.0, float(one.abs().max())):
            return f"without some of them the model does not compute the same: outputs differ by {largest:.2g}"
    return None


def zero(model: nn.Module, channels: Channels, kept: Tensor) -> None:
    """Set the parameters of all units but those `kept` to 0 in a bare model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim in channels.owners.get(name, {}):
                gone = (~channels.along(name, dim, kept)).nonzero()[:, 0]
                parameter.index_fill_(dim, gone.to(parameter.device), 0)


def _measure(model: nn.Module, example: Any) -> list[Work]:
    """Run the model once, and count the multiply-accumulates of its layers."""
    macs: dict[tuple[str, tuple[int, ...]], int] = {}
    batch = len(next(iter(_tensors(example))))

    def count(name: str, dims: tuple[int, ...], amount: int) -> None:
        macs[name, dims] = macs.get((name, dims), 0) + amount

    def convolution(name: str, module: Any, inputs: Any, output: Tensor) -> None:
        passes = inputs[0] if module.transposed else output
        count(f"{name}.weight" if name else "weight", (0, 1), passes.numel() * module.weight[0].numel())

    def linear(name: str, module: Any, inputs: Any, output: Tensor) -> None:
        count(f"{name}.weight" if name else "weight", (0, 1), output.numel() * module.in_features)

    def attention(name: str, module: Any, inputs: Any, output: Any) -> None:
        queries, keys = inputs[0].numel() // module.embed_dim, inputs[1].numel() // module.embed_dim
        seen = inputs[1].shape[1 if module.batch_first else 0]
        rows = f"{name}.in_proj_weight"
        count(rows, (0,), (queries + 2 * keys) * module.embed_dim**2 + 2 * queries * seen * module.embed_dim)
        count(f"{name}.out_proj.weight", (1,), queries * module.embed_dim**2)

    counters = ((_CONVOLUTIONS, convolution), (nn.Linear, linear), (nn.MultiheadAttention, attention))
    hooks = []
    for name, module in model.named_modules():
        for kinds, counter in counters:
            if isinstance(module, kinds):
                hooks.append(
                    module.register_forward_hook(lambda m, i, o, name=name, counter=counter: counter(name, m, i, o))
                )
    try:
        _run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return [Work(name, dims, amount // batch) for (name, dims), amount in macs.items()]


def _run(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _tensors(values: Any) -> Iterable[Tensor]:
    """All floating-point outputs, or all inputs, whatever holds them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _moved(example: Any) -> Any:
    if isinstance(example, Tensor):
        return example.detach().cpu().float() if example.is_floating_point() else example.detach().cpu()
    if isinstance(example, Mapping):
        return {name: _moved(value) for name, value in example.items()}
    return tuple(_moved(value) for value in example) if isinstance(example, (tuple, list)) else example
