"""Which tensors of a model have a dimension in common, so that its indices can be reordered in all of them at once.

A convolution or linear layer makes channels; norms, activations, pools and sums carry them on; the next layers take
them. The model is traced (`torch.fx`) and run once, and channels are followed through what is known to leave them in
their places. Whatever else they run into, they are left alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ELEMENTWISE: frozenset[Any] = frozenset({
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.softplus, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.dropout, torch.relu, torch.sigmoid, torch.tanh,
    "relu", "relu_", "sigmoid", "tanh", "contiguous", "clone",
})  # fmt: skip
POOLS: frozenset[Any] = frozenset({
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
})  # fmt: skip
BINARY: frozenset[Any] = frozenset({
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul,
    torch.add, torch.sub, torch.mul, "add", "add_", "sub", "sub_", "mul", "mul_",
})  # fmt: skip
FLATTEN: frozenset[Any] = frozenset({nn.Flatten, torch.flatten, "flatten", "view", "reshape"})
MEAN: frozenset[Any] = frozenset({torch.mean, "mean"})


@dataclass(frozen=True)
class Use:
    """A dimension of a parameter or buffer that runs over channels: index i * times + j belongs to channel i.

    Attributes:
        name: of the tensor, as in the model's `state_dict()`.
        takes: whether they are the input of a layer; else they are made or carried on.
    """

    name: str
    dim: int
    times: int
    takes: bool


@dataclass(frozen=True)
class Chain:
    """Everything that has to be reordered alike with some channels.

    Attributes:
        channels: how many.
        uses: all tensors of the model that run over them.
        fixed: why they must stay in their order; None where they need not.
    """

    channels: int
    uses: tuple[Use, ...]
    fixed: str | None

    @torch.no_grad()
    def reorder(self, model: nn.Module, order: Sequence[int]) -> None:
        """Let channel `order[i]` come to place i, in all tensors of `model`."""
        state = model.state_dict(keep_vars=True)
        for use in self.uses:
            tensor = state[use.name]
            index = torch.tensor(order, device=tensor.device)[:, None] * use.times
            index = (index + torch.arange(use.times, device=tensor.device)).view(-1)
            tensor.copy_(tensor.index_select(use.dim, index))


def find_chains(model: nn.Module, inputs: Sequence[Any]) -> list[Chain]:
    """All chains of channels, in the order in which the model makes them.

    Args:
        model: what is run; its batch norms must be in evaluation mode, or they count the inputs.
        inputs: of its `forward`.

    Raises:
        ValueError: it cannot be traced, or has weights that are not reached, of which nothing is known then.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # whatever a forward raises where it meets a proxy
        raise ValueError(f"{type(model).__name__} cannot be traced: {error}") from error
    reached = [str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
    for name, _ in model.named_parameters():
        if not any(name == target or name.startswith(f"{target}.") for target in reached):
            raise ValueError(f"{name} is not reached from the inputs, so it is unknown which channels it takes")
    follower = _Follower(traced)
    with torch.no_grad():
        follower.run(*inputs)
    return follower.chains(model)


@dataclass(frozen=True)
class _Along:
    """A dimension of an activation that runs over the channels `axis`, each `times` in a row."""

    axis: int
    dim: int
    times: int = 1


class _Follower(fx.Interpreter):
    """Runs a model and notes which channels its values run over. Channels that must be ordered alike share an axis."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self._parents: list[int] = []
        self._channels: list[int] = []
        self._fixed: dict[int, str] = {}
        self._uses: list[tuple[int, Use]] = []
        self._along: dict[fx.Node, _Along | None] = {}
        self._shapes: dict[fx.Node, torch.Size] = {}
        self._called: set[str] = set()
        self._taken: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._shapes[n] = result.shape
        self._along[n] = self._follow(n, result)
        return result

    def chains(self, model: nn.Module) -> list[Chain]:
        """What was found, once all has run."""
        owners: dict[int, int] = {}
        for tensor in (state := model.state_dict(keep_vars=True)).values():
            owners[id(tensor)] = owners.get(id(tensor), 0) + 1
        for axis, use in self._uses:
            if owners[id(state[use.name])] > 1 or use.name in self._taken:
                self._fix(axis, f"{use.name} is used at several places")
        fixed = {self._root(axis): why for axis, why in self._fixed.items()}
        roots = dict.fromkeys(self._root(axis) for axis in range(len(self._parents)))
        return [
            Chain(
                self._channels[root],
                tuple(use for axis, use in self._uses if self._root(axis) == root),
                fixed.get(root),
            )
            for root in roots
        ]

    def _follow(self, node: fx.Node, result: Any) -> _Along | None:
        """What the value of a node runs over; None where that is unknown, and what it was made of has been fixed."""
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        kind: Any = type(module) if module is not None else node.target
        sources = [self._along[source] for source in node.all_input_nodes]
        along: _Along | None = None
        if node.op == "get_attr":
            self._taken.add(str(node.target))
        if module is not None and node.target in self._called:
            for axis, use in self._uses:
                if use.name.startswith(f"{node.target}."):
                    self._fix(axis, f"{node.target} is called more than once")
        elif node.op == "call_module" and kind in (*CONVOLUTIONS, nn.Linear, *BATCH_NORMS, nn.LayerNorm):
            self._called.add(str(node.target))
            along = self._through_layer(node, module)
            if along is not None:
                return along
        elif not isinstance(result, Tensor) and (kind in ("size", "dim") or kind is getattr):
            return None
        elif kind in BINARY:
            along = self._joined(node)
        elif isinstance(result, Tensor) and sources and (source := sources[0]) is not None and not any(sources[1:]):
            along = self._carried(node, kind, source, self._shapes[node.all_input_nodes[0]], result)
        if along is None:
            for source in sources:
                if source is not None:
                    what = "the output" if node.op == "output" else f"{node.name}, which may mix or move them"
                    self._fix(source.axis, f"they run into {what}")
        return along

    def _through_layer(self, node: fx.Node, layer: Any) -> _Along | None:
        """Behind a layer with weights: what it makes of its input, or carries on."""
        source, shape = self._along[node.all_input_nodes[0]], self._shapes[node.all_input_nodes[0]]
        last = len(shape) - 1
        name = str(node.target)
        if isinstance(layer, nn.LayerNorm):
            if source is not None and source.dim == last and len(layer.normalized_shape) == 1:
                return self._noted(source, name, layer, ("weight", "bias"))
            return None
        if isinstance(layer, BATCH_NORMS):
            if source is not None and source.dim == 1:
                return self._noted(source, name, layer, ("weight", "bias", "running_mean", "running_var"))
            return None
        dim = last if isinstance(layer, nn.Linear) else 1
        batched = isinstance(layer, nn.Linear) or len(shape) == layer.weight.dim()
        fits = source is not None and source.dim == dim and batched
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        if groups > 1:
            if fits and source is not None and groups == layer.in_channels == layer.out_channels:
                return self._noted(source, name, layer, ("weight", "bias"))
            return None
        if source is not None and not fits:
            self._fix(source.axis, f"{name} mixes other dimensions of what they make")
        elif source is not None:
            self._uses.append((source.axis, Use(f"{name}.weight", 1, source.times, True)))
        if not batched:
            return None
        made = _Along(self._new_axis(len(layer.weight)), dim)
        return self._noted(made, name, layer, ("weight", "bias"))

    def _carried(self, node: fx.Node, kind: Any, source: _Along, shape: torch.Size, result: Any) -> _Along | None:
        """Behind a function of one value that leaves channels where they are."""
        if kind in ELEMENTWISE:
            return source
        if kind in POOLS and source.dim == 1 and len(result.shape) == len(shape) > 2:
            return source
        if kind in FLATTEN and source.dim == 1 and tuple(result.shape) == (shape[0], math.prod(shape[1:])):
            return _Along(source.axis, 1, source.times * math.prod(shape[2:]))
        if kind in MEAN:
            given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            dims = [given] if isinstance(given, int) else list(given) if isinstance(given, Sequence) else []
            gone = [dim % len(shape) for dim in dims if isinstance(dim, int)]
            if gone and source.dim not in gone:
                kept = len(result.shape) == len(shape)
                return _Along(
                    source.axis, source.dim - (0 if kept else sum(d < source.dim for d in gone)), source.times
                )
        return None

    def _joined(self, node: fx.Node) -> _Along | None:
        """Behind a sum or product of values, whose channels must then be ordered alike."""
        values = [source for source in node.all_input_nodes if source in self._shapes]
        found = [self._along[value] for value in values]
        # Shapes are aligned at their ends.
        places = {along.dim - len(self._shapes[value]) for value, along in zip(values, found, strict=True) if along}
        if not values or None in found or len(places) != 1:
            return None
        (place,) = places
        wide = [a for value, a in zip(values, found, strict=True) if a is not None and self._shapes[value][place] > 1]
        if not wide or len({(a.times, self._channels[self._root(a.axis)]) for a in wide}) != 1:
            return None
        for along in wide[1:]:
            self._parents[self._root(along.axis)] = self._root(wide[0].axis)
        return _Along(wide[0].axis, len(self._shapes[node]) + place, wide[0].times)

    def _noted(self, along: _Along, name: str, layer: nn.Module, tensors: Sequence[str]) -> _Along:
        for tensor in tensors:
            if getattr(layer, tensor) is not None:
                self._uses.append((along.axis, Use(f"{name}.{tensor}", 0, along.times, False)))
        return along

    def _new_axis(self, channels: int) -> int:
        self._parents.append(len(self._parents))
        self._channels.append(channels)
        return self._parents[-1]

    def _root(self, axis: int) -> int:
        while self._parents[axis] != axis:
            axis = self._parents[axis]
        return axis

    def _fix(self, axis: int, why: str) -> None:
        self._fixed.setdefault(axis, why)
