"""Trained weights from files into models, checked key by key. Nothing is unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distprune.errors import ConfigError

ENVELOPES = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")
LISTED = 8


def load_weights(model: nn.Module, path: str, key: str = "model.weights") -> None:
    """Fill `model` from a .safetensors file, or from one that `torch.load(weights_only=True)` reads.

    Envelopes (`state_dict`, `model`) and the prefixes of DDP and torch.compile are taken off.

    Raises:
        ConfigError: the file cannot be read, or keys or shapes do not fit; lists them. The model is unchanged.
    """
    own = model.state_dict()
    state = _strip(_read(Path(path).expanduser(), key), own)
    # A counter that checkpoints of old torch versions lack and that inference does not read.
    state = {n: own[n] for n in own if n.endswith("num_batches_tracked")} | state
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{n} {tuple(state[n].shape)}, here {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    faults = [
        f"{what}: {', '.join(names[:LISTED])}{f' and {len(names) - LISTED} more' if len(names) > LISTED else ''}"
        for what, names in (("missing", missing), ("not in the model", extra), ("other shapes", shapes))
        if names
    ]
    if faults:
        raise ConfigError(f"{key}: {path} does not fit {type(model).__name__}; {'; '.join(faults)}")
    model.load_state_dict(state)


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(f"{key}: cannot read {path}: it holds other things than tensors") from None
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, AttributeError, SafetensorError) as error:
        text = str(error).strip()
        reason = "no such file" if not path.exists() else text.splitlines()[0] if text else type(error).__name__
        raise ConfigError(f"{key}: cannot read {path}: {reason}") from None
    for envelope in ENVELOPES:
        if isinstance(content, dict) and isinstance(content.get(envelope), dict):
            content = content[envelope]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ConfigError(f"{key}: {path} holds no state_dict (tensors by name)")
    return dict(content)


def _strip(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take wrappers' prefixes off, in whatever order they were put on, until names are the model's own."""
    while not own.keys() & state.keys():
        prefix = next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
