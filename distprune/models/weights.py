"""Trained weights from files and addresses into models, checked key by key. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from distprune.cache import cache_folder, is_offline
from distprune.errors import ConfigError, MissingError, reason
from distprune.models.packed import about_packed, load_packed
from distprune.structured.shrink import shrink_like

ENVELOPES = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")
LISTED = 8


def load_weights(model: nn.Module, source: str, key: str = "model.weights") -> None:
    """Fill `model` from a .safetensors file, or from one that `torch.load(weights_only=True)` reads.

    `source` is what `local_file` takes. Envelopes (`state_dict`, `model`) and the prefixes of DDP and torch.compile are
    taken off. From a file of a model without some of its channels, as distprune writes it, the model loses them first.

    Raises:
        ConfigError: the file cannot be read, or keys or shapes do not fit; lists them. The model is unchanged.
        MissingError: see `local_file`.
    """
    path = local_file(source, key)
    content, removed = _read(path, key)
    if removed is not None:
        try:
            shrink_like(model, removed)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ConfigError(f"{key}: {path} does not fit {type(model).__name__}: {error}") from None
    own = model.state_dict()
    state = _strip(content, own)
    # A counter that checkpoints of old torch versions lack and that inference does not read.
    state = {n: own[n] for n in own if n.endswith("num_batches_tracked")} | state
    # Files of transformers name tied weights once.
    tied = {id(value): state[name] for name, value in _named(model) if name in state}
    state = {name: tied[id(value)] for name, value in _named(model) if id(value) in tied} | state
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


def local_file(source: str, key: str) -> Path:
    """The file of `source`: a path, an https:// address, or torchvision:NAME such as ResNet50_Weights.IMAGENET1K_V1.

    What comes from the network is fetched once into the cache, by one process while others wait, and compared with
    the hash in its name where that has one (resnet50-0676ba61.pth).

    Raises:
        ConfigError: torchvision has no such weights, or they cannot be fetched.
        MissingError: they are not in the cache, and HF_HUB_OFFLINE forbids to fetch them or there is no network.
    """
    url = _torchvision_url(source.partition(":")[2], key) if source.startswith("torchvision:") else source
    if not url.startswith(("https://", "http://")):
        return Path(source).expanduser()
    name = Path(urlsplit(url).path).name
    if not name or url.endswith("/"):
        raise ConfigError(f"{key}: {url} names no file")
    # Many files have the same name.
    folder = cache_folder() / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    if path.exists():
        return path
    if is_offline():
        raise MissingError(f"{key}: {url} is not in {folder}, and HF_HUB_OFFLINE forbids to fetch it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{path.name}.lock"):
            if not path.exists():
                mark = re.search(r"-(?=\d*[a-f])([0-9a-f]{8,})\.", path.name)  # not a date
                torch.hub.download_url_to_file(url, str(path), mark[1] if mark else None, progress=False)
    except (OSError, RuntimeError) as error:
        unreachable = isinstance(error, URLError) and not isinstance(error, HTTPError)
        raise (MissingError if unreachable else ConfigError)(f"{key}: cannot fetch {url}: {error}") from None
    return path


def _torchvision_url(name: str, key: str) -> str:
    from torchvision.models import get_weight

    try:
        return str(get_weight(name).url)
    except (ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{key}: torchvision has no weights {name!r}: {error}") from None


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and which channels are left where some were removed."""
    removed = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            about = about_packed(metadata)
            content = load_file(path) if about is None else load_packed(path)
            removed = json.loads(metadata["channels"]) if "channels" in metadata else (about or {}).get("channels")
        else:
            content = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(f"{key}: cannot read {path}: it holds other things than tensors") from None
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {reason(error) if path.exists() else 'no such file'}") from None
    for envelope in ENVELOPES:
        if isinstance(content, dict) and isinstance(content.get(envelope), dict):
            content = content[envelope]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ConfigError(f"{key}: {path} holds no state_dict (tensors by name)")
    return dict(content), removed


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by all their names."""
    return model.named_parameters(remove_duplicate=False)


def _strip(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take wrappers' prefixes off, in whatever order they were put on, until names are the model's own."""
    while not own.keys() & state.keys():
        prefix = next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
