"""Physical removal: parameters, buffers and optimizer state with fewer channels, in the model as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distprune.structured.attention import ThinAttention
from distprune.structured.channels import Channels

Kept = Mapping[str, Mapping[int, Tensor]]
"""By tensor and dimension: which indices are left (int64, 1-D, ascending)."""

_KEPT = "_distprune_kept"
_DEPTHWISE = "_distprune_depthwise"


def kept_of(model: nn.Module) -> Kept:
    """What is left of a bare model, in indices of the model as it was made; empty where nothing was removed."""
    kept: Kept = getattr(model, _KEPT, {})
    return kept


def note_kept(model: nn.Module, kept: Kept) -> None:
    """Note what is left of a bare model, for `kept_of`."""
    setattr(model, _KEPT, kept)


def composed(before: Kept, where: Kept) -> Kept:
    """Of what was left `before`, the indices `where`."""
    noted = {name: dict(dims) for name, dims in before.items()}
    for name, dims in where.items():
        mine = noted.setdefault(name, {})
        for dim, index in dims.items():
            mine[dim] = mine[dim][index] if dim in mine else index
    return noted


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution has a filter of its own for each channel, or had as it was made: with one channel left it
    cannot be told from others, nor can one in groups of which each has one channel left."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    return getattr(module, _DEPTHWISE, 1 < module.groups == module.in_channels == module.out_channels)


def layout(kept: Kept) -> dict[str, Any]:
    """JSON values that say which indices are left, for `shrink_like`."""
    lists: dict[str, int] = {}
    tensors = {
        name: {str(dim): lists.setdefault(_ranges(index), len(lists)) for dim, index in dims.items()}
        for name, dims in kept.items()
    }
    return {"kept": list(lists), "tensors": tensors}


def kept_of_layout(layout: Mapping[str, Any]) -> Kept:
    """What `layout` was given."""
    indices = [_indices(text) for text in layout["kept"]]
    return {name: {int(dim): indices[place] for dim, place in dims.items()} for name, dims in layout["tensors"].items()}


def shrink_like(model: nn.Module, layout: Mapping[str, Any]) -> None:
    """Take away from a bare model, freshly made, what was taken away from the one whose `layout` is given.

    Raises:
        ValueError: the layout is of another model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kept = kept_of_layout(layout)
    for name, dims in kept.items():
        for dim, index in dims.items():
            if name not in shapes or dim >= len(shapes[name]) or int(index.max()) >= shapes[name][dim]:
                raise ValueError(f"the channels that were removed are of another model: {name} has no such dimensions")
    resize(model, kept)
    note_kept(model, kept)


def positions(channels: Channels, before: Tensor, after: Tensor) -> Kept:
    """Where in the tensors as they are the indices lie that are to be left; -1 where they are not there.

    Args:
        channels: of the model.
        before: which units are in the tensors (bool).
        after: which are to be.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name, dims in channels.owners.items():
        found[name] = {}
        for dim in dims:
            there, wanted = (channels.along(name, dim, units) for units in (before, after))
            found[name][dim] = torch.where(there, there.cumsum(0) - 1, -1)[wanted]
    return found


def resize(model: nn.Module, where: Kept, optimizer: Optimizer | None = None) -> None:
    """Give the tensors of a bare model, and what `optimizer` knows of them, the indices `where` along dimensions.

    Every parameter becomes a new one, also those that keep their size, so that no wrapper of the model as it was keeps
    hold of one. Gradients are dropped.

    Args:
        model: bare, not sharded.
        where: see `positions`; at -1 there are zeros.
        optimizer: a torch optimizer that trains the model.
    """
    _thin_attention(model, where)
    new: dict[int, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        if id(old) not in new:
            new[id(old)] = nn.Parameter(select(old, where.get(name, {})), old.requires_grad)
            if optimizer is not None and old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[new[id(old)]] = {
                    key: _select_state(value, old, where.get(name, {})) for key, value in state.items()
                }
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new[id(old)])
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [new.get(id(p), p) for p in group["params"]]
    for name, buffer in list(model.named_buffers()):
        if name in where:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            persistent = leaf not in module._non_persistent_buffers_set
            module.register_buffer(leaf, select(buffer, where[name]), persistent)
    for module in model.modules():
        _refit(module)


def select(tensor: Tensor, where: Mapping[int, Tensor]) -> Tensor:
    """The indices `where` along dimensions of a tensor, zeros at -1; on new memory, in the memory format it has."""
    chosen = tensor.detach()
    for dim, index in where.items():
        index = index.to(chosen.device)
        chosen = chosen.index_select(dim, index.clamp(min=0))
        if bool((index < 0).any()):
            chosen.index_fill_(dim, (index < 0).nonzero()[:, 0], 0)
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    back = sorted(range(tensor.dim()), key=by_stride.__getitem__)
    return chosen.permute(by_stride).clone(memory_format=torch.contiguous_format).permute(back)


def _select_state(value: Any, parameter: Tensor, where: Mapping[int, Tensor]) -> Any:
    """What an optimizer knows of a parameter: one value for each element, or for each row or column (Adafactor)."""
    if not isinstance(value, Tensor) or value.dim() != parameter.dim():
        return value
    return select(value, {dim: index for dim, index in where.items() if value.shape[dim] == parameter.shape[dim]})


def _thin_attention(model: nn.Module, where: Kept) -> None:
    """Put attention that may have any number of heads in the place of that which loses some."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        rows = where.get(f"{name}.in_proj_weight", {}).get(0)
        if rows is not None and len(rows) < len(module.in_proj_weight):
            owner, _, leaf = name.rpartition(".")
            thin = ThinAttention.like(module)
            thin.__dict__ |= {key: hooks for key, hooks in vars(module).items() if "_hooks" in key}
            setattr(model.get_submodule(owner), leaf, thin)
    for module in model.modules():
        # Its nested tensors are for nn.MultiheadAttention in all layers.
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, ThinAttention) for m in module.modules()):
            module.use_nested_tensor = False


def _refit(module: nn.Module) -> None:
    """Let a module know the sizes that its tensors have."""
    if isinstance(module, nn.modules.conv._ConvNd):
        setattr(module, _DEPTHWISE, is_depthwise(module))
        first, second = module.weight.shape[:2]
        if is_depthwise(module):
            module.groups = module.out_channels = module.in_channels = first
        elif module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = module.weight if module.weight is not None else module.running_mean
        if sized is not None:
            module.num_features = len(sized)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, ThinAttention):
        module.num_heads = len(module.in_proj_weight) // (3 * module.head_dim)


def _ranges(index: Tensor) -> str:
    """Ascending integers as text: 0-4,7,9-15."""
    numbers = index.tolist()
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    bounds = zip([0, *breaks], [*breaks, len(numbers)], strict=True)
    return ",".join(str(numbers[a]) if b - a == 1 else f"{numbers[a]}-{numbers[b - 1]}" for a, b in bounds if b > a)


def _indices(text: str) -> Tensor:
    pairs = [part.partition("-") for part in text.split(",")]
    return torch.tensor([i for a, _, b in pairs for i in range(int(a), int(b or a) + 1)])
