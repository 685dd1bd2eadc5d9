"""Packed weights: which elements are there as bits, and those elements one behind the other; exact to the bit.

A packed file is a .safetensors file. Its header has one entry of metadata, `packed`: JSON with `version` (1), `shapes`
(of the tensors that are packed, by name) and `channels` (what was removed from the model, or null; see
`distprune.structured.layout`). Of a packed tensor NAME there are

- `bits/NAME`: uint8, 1-D; bit i % 8, least significant first, of byte i // 8 is set where element i, in row-major
  order, is left; bits behind the last element are 0;
- `values/NAME`: 1-D, of the tensor's type: the elements that are left, in that order.

Elements whose bits are all 0 are not left, so -0.0 is, and so is every NaN. Other tensors stand under their own name,
as they are: those that this would not make smaller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distprune.pruning import masks as mask_ops

VERSION = 1


def save_packed(state: Mapping[str, Tensor], path: str | Path, channels: Mapping[str, Any] | None = None) -> None:
    """Write tensors to a packed file.

    Args:
        state: by name, of any shape and type, on any device.
        path: of the file, which is replaced.
        channels: what was removed from the model, for `load_weights`.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        flat = tensor.detach().cpu().contiguous().flatten()
        left = _left(flat)
        values = flat[left]
        if _bytes(values) + -(-len(flat) // 8) < _bytes(flat):
            tensors[f"bits/{name}"] = mask_ops.pack(left[None])[0]
            tensors[f"values/{name}"] = values
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = flat.view(tensor.shape).clone()  # tensors that share memory are refused
    about = {"version": VERSION, "shapes": shapes, "channels": channels}
    # One entry, since the order of several is not always the same.
    save_file(tensors, path, {"packed": json.dumps(about)})


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a packed file, by name, on the CPU.

    Raises:
        ValueError: it is no packed file, of another version, or its parts do not fit each other.
    """
    with safe_open(path, "pt") as file:
        about = about_packed(file.metadata())
        if about is None:
            raise ValueError(f"{path} is not packed")
        state = {}
        for name, shape in about["shapes"].items():
            state[name] = _unpacked(file.get_tensor(f"bits/{name}"), file.get_tensor(f"values/{name}"), shape, name)
        packed = {f"{part}/{name}" for part in ("bits", "values") for name in state}
        return state | {name: file.get_tensor(name) for name in file.keys() if name not in packed}  # noqa: SIM118


def about_packed(metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    """What the header of a packed file says; None of another file.

    Raises:
        ValueError: it is of another version.
    """
    if metadata is None or "packed" not in metadata:
        return None
    about: dict[str, Any] = json.loads(metadata["packed"])
    if about["version"] != VERSION:
        raise ValueError(f"it is packed in version {about['version']}, and this distprune reads version {VERSION}")
    return about


def _unpacked(bits: Tensor, values: Tensor, shape: list[int], name: str) -> Tensor:
    whole = torch.zeros(shape, dtype=values.dtype)
    left = torch.empty((1, whole.numel()), dtype=torch.bool)
    mask_ops.check_packed(bits[None], left, name)
    mask_ops.unpack(bits[None], left)
    if int(left.sum()) != len(values):
        raise ValueError(f"{name} has {int(left.sum())} bits, but {len(values)} values")
    whole.view(-1)[left[0]] = values
    return whole


def _left(flat: Tensor) -> Tensor:
    """Which elements have a bit that is set."""
    if flat.numel() == 0:
        return torch.zeros(0, dtype=torch.bool)
    return (flat.view(torch.uint8).view(len(flat), -1) != 0).any(1)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
