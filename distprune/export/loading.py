"""Exports read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distprune.config import load_config
from distprune.data import Inputs
from distprune.errors import ConfigError
from distprune.export import onnx, program, two_four
from distprune.models import build_model, load_weights
from distprune.training.logits import logits_of

FIGURES = "figures.json"


def load_model(folder: str | Path) -> nn.Module:
    """The model of an export as safetensors, packed or shrunk, in evaluation mode on the CPU; of one as 2:4, in half
    precision on the GPU, with sparse weights.

    Raises:
        ConfigError: the folder holds none of these, or what its config.yaml names is missing.
    """
    folder = Path(folder)
    about = read_figures(folder)
    if not (folder / "model.safetensors").exists():
        raise ConfigError(f"{folder} holds {about['format']}, which runs by itself; see its README.md")
    config = load_config(folder / "config.yaml")
    model = build_model(config.model.name, config.model.args, about["outputs"], task=config.data.task).eval()
    load_weights(model, str(folder / "model.safetensors"), str(folder))
    if about["format"] == "2:4":
        two_four.need_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        model = model.half().cuda()
        two_four.apply(model, about["sparse"])
    return model


def load_function(folder: Path, device: torch.device) -> Callable[[Inputs], Tensor]:
    """Any export as a function from inputs to logits, without gradients; ONNX and what is read by `load_model` as 2:4
    choose their device.

    Args:
        folder: of the export.
        device: of the inputs.
    """
    about = read_figures(folder)
    if about["format"] == "onnx":
        (path,) = folder.glob("*.onnx")
        return onnx.Session(path)
    if about["format"] == "torch-export":
        return program.read_program(folder / "model.pt2", about["inputs"], device)
    model, is_sparse = load_model(folder).to(device), about["format"] == "2:4"

    def run(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            logits: Tensor = logits_of(model, two_four.halved(inputs) if is_sparse else inputs)
            return logits.float() if is_sparse else logits

    return run


def read_figures(folder: Path) -> dict[str, Any]:
    """What is known of an export.

    Raises:
        ConfigError: the folder holds none.
    """
    try:
        found: dict[str, Any] = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        exports = sorted(path.parent.name for path in folder.glob(f"export/[!.]*/{FIGURES}"))
        more = f"; it is a run folder with exports {', '.join(exports)}" if exports else ""
        raise ConfigError(f"{folder} holds no export: there is no {FIGURES} in it{more}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no export: {error}") from None
    return found
