"""Packed weights: which elements are there as bits, and those elements one behind the other; exact to the bit.

A packed file is a .safetensors file. Its header has one entry of metadata, `packed`: JSON with `version` (1), `tensors`
(those that are packed: name -> [type, shape], types named as by torch) and `channels` (what was removed from the model,
or null; see `distprune.structured.layout`). A packed tensor of n elements is stored as uint8, 1-D:

- n / 8 bytes, rounded up: bit i % 8, least significant first, of byte i // 8 is set where element i, in row-major
  order, is left; bits behind the last element are 0;
- the elements that are left, in that order, each as its bytes in memory (little-endian).

Elements whose bits are all 0 are not left, so -0.0 is, and so is every NaN. Tensors of which this would save little are
stored as they are.
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
LEAST = 128
"""Bytes that packing a tensor must save, since the header says of it what it was."""


def save_packed(state: Mapping[str, Tensor], path: str | Path, channels: Mapping[str, Any] | None = None) -> None:
    """Write tensors to a packed file.

    Args:
        state: by name, of any shape and type, on any device.
        path: of the file, which is replaced.
        channels: what was removed from the model, for `load_weights`.
    """
    stored: dict[str, Tensor] = {}
    packed: dict[str, tuple[str, list[int]]] = {}
    for name, tensor in state.items():
        flat = tensor.detach().cpu().contiguous().flatten()
        left = _left(flat)
        values = flat[left]
        if _bytes(values) + -(-len(flat) // 8) + LEAST <= _bytes(flat):
            stored[name] = torch.cat([mask_ops.pack(left[None])[0], values.view(torch.uint8)])
            packed[name] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        else:
            stored[name] = flat.view(tensor.shape).clone()  # tensors that share memory are refused
    about = {"version": VERSION, "tensors": packed, "channels": channels}
    # One entry, since the order of several is not always the same.
    save_file(stored, path, {"packed": json.dumps(about)})


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a packed file, by name, on the CPU.

    Raises:
        ValueError: it is no packed file, of another version, or its parts do not fit each other.
    """
    with safe_open(path, "pt") as file:
        about = about_packed(file.metadata())
        if about is None:
            raise ValueError(f"{path} is not packed")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, (dtype, shape) in about["tensors"].items():
        state[name] = _unpacked(state[name], dtype, shape, name)
    return state


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


def _unpacked(stored: Tensor, dtype: str, shape: list[int], name: str) -> Tensor:
    whole = torch.zeros(shape, dtype=getattr(torch, dtype))
    left = torch.empty((1, whole.numel()), dtype=torch.bool)
    size = -(-whole.numel() // 8)
    mask_ops.check_packed(stored[None, :size], left, name)
    mask_ops.unpack(stored[None, :size], left)
    count = int(left.sum())
    if len(stored) != size + count * whole.element_size():
        raise ValueError(f"{name} has {count} bits set, but {len(stored) - size} bytes of values")
    whole.view(-1)[left[0]] = stored[size:].clone().view(whole.dtype)
    return whole


def _left(flat: Tensor) -> Tensor:
    """Which elements have a bit that is set."""
    if flat.numel() == 0:
        return torch.zeros(0, dtype=torch.bool)
    return (flat.view(torch.uint8).view(len(flat), -1) != 0).any(1)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
