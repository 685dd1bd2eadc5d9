"""What hangs together, followed through Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch_pruning
from torch import Tensor, nn
from torch_pruning._helpers import _HybridIndex
from torch_pruning.ops import OPTYPE
from torch_pruning.pruner.function import MultiheadAttentionPruner

from distprune.structured.attention import ThinAttention
from distprune.structured.example import run, tensors
from distprune.structured.shrink import is_depthwise

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
ATTENTION = (nn.MultiheadAttention, ThinAttention)
MOST_PLACES = 1024
"""Of one channel in one layer. A flattened map of 32 x 32 has as many; what is reshaped to and fro has no end."""


@dataclass
class Traced:
    """A group as it is found: for each tensor and dimension, indices and the channels of the maker they hang on."""

    name: str
    size: int
    makers: list[str] = field(default_factory=list)
    links: list[tuple[str, int, list[int], list[int]]] = field(default_factory=list)
    scored: set[tuple[str, int]] = field(default_factory=set)
    ties: list[list[int]] = field(default_factory=list)
    """Channels that can only go together."""
    problem: str | None = None
    """Why none can go."""
    is_taken: bool = False
    """Whether a layer takes its channels in."""

    def units(self) -> list[int]:
        """The unit of each channel, numbered in the order of their first."""
        parent = list(range(self.size))

        def root(channel: int) -> int:
            while parent[channel] != channel:
                parent[channel] = parent[parent[channel]]
                channel = parent[channel]
            return channel

        for tie in self.ties:
            for other in tie[1:]:
                low, high = sorted((root(tie[0]), root(other)))
                parent[high] = low
        numbers: dict[int, int] = {}
        return [numbers.setdefault(root(channel), len(numbers)) for channel in range(self.size)]

    def tie(self, indices: Sequence[int], roots: Sequence[int], like: Sequence[int]) -> None:
        """Let channels go together on which indices hang that are `like` each other."""
        together: dict[int, list[int]] = {}
        for _, root, kind in zip(indices, roots, like, strict=True):
            together.setdefault(kind, []).append(root)
        self.ties += together.values()

    def link(
        self,
        module: nn.Module,
        name: str,
        leaf: str,
        dim: int,
        indices: list[int],
        roots: list[int],
        scored: bool = False,
    ) -> None:
        """Note what of a tensor, if the module has it, hangs on which channels."""
        if getattr(module, leaf, None) is not None:
            key = f"{name}.{leaf}" if name else leaf
            self.links.append((key, dim, indices, roots))
            if scored:
                self.scored.add((key, dim))


def trace(model: nn.Module, example: Any) -> Iterator[Traced]:
    """All groups of channels that convolutions and linear layers make, those that cannot be removed with the reason.

    Args:
        model: bare, in eval mode, on the CPU; all parameters require gradients.
        example: what it takes.
    """
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(
            model, example, forward_fn=run, output_transform=_differentiable, verbose=False,
            customized_pruners={ThinAttention: MultiheadAttentionPruner()},
        )  # fmt: skip
    yield from _Follower(graph, model).groups()


def _differentiable(outputs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(outputs) if tensor.requires_grad]


class _Follower:
    """Follows channels through the dependency graph of a model."""

    def __init__(self, graph: Any, model: nn.Module) -> None:
        self._graph = graph
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._widths = _head_widths(model)
        attentions = [module for module in model.modules() if isinstance(module, ATTENTION)]
        self._inside = {module for attention in attentions for module in attention.modules()}
        self._seen: set[nn.Module] = set()

    def groups(self) -> Iterator[Traced]:
        """Of all layers, those that make the same channels together."""
        layers = [m for m in self._names if isinstance(m, (*CONVOLUTIONS, nn.Linear)) and m not in self._inside]
        for module in self._graph.module2node:
            if module in layers and module not in self._seen and not is_depthwise(module):
                yield self._follow(module)
        for module in layers:
            if module not in self._graph.module2node:
                problem = "it is not called as a layer, so nobody sees what hangs on it"
                yield Traced(self._names[module], 1, problem=problem)

    def _follow(self, maker: Any) -> Traced:
        """All that hangs on the channels that `maker` makes.

        Channels are followed from operation to operation until nothing new is reached, or something from which none can
        be removed.
        """
        size = maker.out_features if isinstance(maker, nn.Linear) else maker.out_channels
        group = Traced(self._names[maker], size)
        start = (self._graph.module2node[maker], self._graph.get_pruner_of_module(maker).prune_out_channels)
        reached = {start: dict.fromkeys(_HybridIndex(i, i) for i in range(size))}
        waiting = [(*start, list(reached[start]))]
        group.problem = self._problem(start[0], waiting[0][2], False)
        while waiting and group.problem is None:
            node, removes, channels = waiting.pop()
            for dependency in node.dependencies:
                if group.problem is None and dependency.is_triggered_by(removes):
                    mapped = channels
                    for mapping in dependency.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    place = dependency.target, dependency.handler
                    there = reached.setdefault(place, {})
                    new = [channel for channel in dict.fromkeys(mapped) if channel not in there]
                    there.update(dict.fromkeys(new))
                    if new:
                        waiting.append((*place, new))
                        group.problem = self._problem(dependency.target, new, len(there) > MOST_PLACES * size)
        for (node, removes), pairs in reached.items():
            is_output = self._graph.is_out_channel_pruning_fn(removes)
            if is_output and pairs and isinstance(node.module, nn.Module):
                self._seen.add(node.module)
            if group.problem is None and pairs and node.module in self._names:
                width = self._widths.get(node.module)
                _link(group, node.module, self._names[node.module], is_output, list(pairs), width)
        if group.problem is None:
            if not group.is_taken:
                group.problem = "nothing in the model takes its channels: they are its outputs"
            elif len(set(group.units())) == 1:
                group.problem = "its channels can only go all together"
        return group

    def _problem(self, node: Any, channels: Sequence[Any], endless: bool) -> str | None:
        """Why nothing can be removed from what was reached, if so."""
        module, name = node.module, self._names.get(node.module)
        if isinstance(module, nn.Parameter):
            return f"{self._parameters[id(module)]} hangs on it, which is no layer's"
        if node.type == OPTYPE.OUTPUT:
            return "its channels are outputs of the model"
        if node.type == OPTYPE.SPLIT:
            return "its channels are split in parts whose sizes the model knows"
        if endless or any(channel.root_idx is None for channel in channels):
            return "its channels are reshaped, and where they end up is not known"
        if isinstance(module, nn.LayerNorm):
            return f"{name} normalises over its channels"
        if isinstance(module, nn.GroupNorm):
            return f"{name} normalises over groups of its channels"
        if isinstance(module, CONVOLUTIONS) and module.transposed and module.groups > 1 and not is_depthwise(module):
            return f"{name} is a transposed convolution in groups"
        if isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels:
            if not is_depthwise(module):
                return f"{name} has one channel left in each of its groups"
        known = (*CONVOLUTIONS, nn.Linear, *PER_CHANNEL, nn.PReLU)
        if name is not None and not isinstance(module, known):
            return f"{name} is a {type(module).__name__}, from which no channel can be removed"
        return None


def _link(group: Traced, module: Any, name: str, is_output: bool, pairs: Sequence[Any], width: int | None) -> None:
    """Add to a group what hangs on it in one layer; `width` is that of its heads, if it makes such."""
    indices, roots = [pair.idx for pair in pairs], [pair.root_idx for pair in pairs]
    group.tie(indices, roots, indices)  # an index on which two channels have a hold
    if isinstance(module, CONVOLUTIONS):
        _link_convolution(group, module, name, is_output, indices, roots)
    elif isinstance(module, nn.Linear):
        group.link(module, name, "weight", 0 if is_output else 1, indices, roots, scored=True)
        if is_output:
            group.makers.append(f"{name}.weight")
            group.link(module, name, "bias", 0, indices, roots)
            if width is not None:
                group.tie(indices, roots, [index // width for index in indices])
        group.is_taken |= not is_output
    elif isinstance(module, PER_CHANNEL):
        group.link(module, name, "weight", 0, indices, roots, scored=True)
        for leaf in ("bias", "running_mean", "running_var"):
            group.link(module, name, leaf, 0, indices, roots)
    elif module.num_parameters > 1:
        group.link(module, name, "weight", 0, indices, roots)


def _link_convolution(
    group: Traced, module: Any, name: str, is_output: bool, indices: list[int], roots: list[int]
) -> None:
    outputs, inputs = (1, 0) if module.transposed else (0, 1)
    if is_depthwise(module):
        # Input and output at once. It makes nothing of its own.
        group.link(module, name, "weight", 0, indices, roots, scored=True)
        group.link(module, name, "bias", 0, indices, roots)
    elif is_output:
        group.makers.append(f"{name}.weight")
        if module.groups > 1:
            size = module.out_channels // module.groups
            group.tie(indices, roots, [index % size for index in indices])
        group.link(module, name, "weight", outputs, indices, roots, scored=True)
        group.link(module, name, "bias", 0, indices, roots)
    else:
        group.is_taken = True
        if module.groups > 1:
            # Every group of a grouped convolution sees as many inputs, so of each the same one goes.
            size = module.in_channels // module.groups
            indices = [index % size for index in indices]
            group.tie(indices, roots, indices)
        group.link(module, name, "weight", inputs, indices, roots, scored=True)


def _head_widths(model: nn.Module) -> dict[nn.Module, int]:
    """The width of heads that linear layers make, in attention as Hugging Face's models have it."""
    widths: dict[nn.Module, int] = {}
    for module in model.modules():
        width = getattr(module, "attention_head_size", None) or getattr(module, "head_dim", None)
        if isinstance(width, int) and not isinstance(module, ATTENTION):
            widths |= {child: width for child in module.children() if isinstance(child, nn.Linear)}
    return widths


def heads(model: nn.Module, called: Set[str]) -> Iterator[Traced]:
    """The heads of attention."""
    for name, module in model.named_modules():
        if not isinstance(module, ATTENTION):
            continue
        width = module.head_dim
        size = module.num_heads * width
        group = Traced(name, size, [f"{name}.in_proj_weight"])
        own_inputs = isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn)
        if module.in_proj_weight is None or own_inputs:
            group.problem = "attention with its own widths, biases or zeros of keys and values"
        elif f"{name}.in_proj_weight" not in called:
            group.problem = "it is not called as a layer, so nobody sees what hangs on it"
        elif module.num_heads == 1:
            group.problem = "it has one head"
        else:
            group.ties += [list(range(begin, begin + width)) for begin in range(0, size, width)]
            rows, roots = list(range(3 * size)), list(range(size)) * 3
            group.link(module, name, "in_proj_weight", 0, rows, roots, scored=True)
            group.link(module, name, "in_proj_bias", 0, rows, roots)
            group.link(module.out_proj, f"{name}.out_proj", "weight", 1, roots[:size], roots[:size], scored=True)
        yield group
