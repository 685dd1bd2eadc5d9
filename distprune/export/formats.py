"""The formats, and how each is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from distprune.export import onnx, program, two_four
from distprune.export.shrunk import shrunk
from distprune.export.source import Source
from distprune.models.packed import save_packed
from distprune.structured import kept_of, layout
from distprune.training.logits import logits_of, repeated, to_device
from distprune.training.whole import metadata, plain_state


def write(source: Source, form: str, folder: Path, int8: bool, calibration: int) -> dict[str, Any]:
    """Write one format to a folder; what else is to be known of it, JSON values.

    Args:
        source: of the model.
        form: one of `FORMATS`.
        folder: is there, and empty.
        int8: quantise it too; for onnx.
        calibration: samples for that.

    Raises:
        ConfigError: the model does not allow the format.
    """
    about = FORMATS[form](source, folder)
    if int8:
        onnx.quantize(source, folder / "model.onnx", calibration)
        for file in folder.glob("model.onnx*"):  # and its weights, where they lie beside it
            file.unlink()
        about |= {"quantized": "int8", "calibration": min(calibration, len(source.train))}
    return about


def _write_plain(source: Source, folder: Path) -> dict[str, Any]:
    _save(source.model, folder)
    return {}


def _write_packed(source: Source, folder: Path) -> dict[str, Any]:
    kept = kept_of(source.model)
    save_packed(source.model.state_dict(), folder / "model.safetensors", layout(kept) if kept else None)
    return {}


def _write_shrunk(source: Source, folder: Path) -> dict[str, Any]:
    model = shrunk(source)
    _save(model, folder)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def _write_onnx(source: Source, folder: Path) -> dict[str, Any]:
    onnx.write_onnx(source, folder)
    return {"inputs": source.names or ["images"]}


def _write_program(source: Source, folder: Path) -> dict[str, Any]:
    program.write_program(source, folder)
    return {"inputs": source.names or ["images"]}


def _write_two_four(source: Source, folder: Path) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    two_four.need_gpu(device)
    model = source.model.half().to(device)
    inputs = to_device(repeated(two_four.halved(source.held_out.first_inputs()), 64), device)
    with torch.no_grad():
        taken = two_four.inputs_of_layers(model, lambda: logits_of(model, inputs))
        choices = two_four.choose(model, taken, two_four.time_layer)
    sparse = [name for name, choice in choices.items() if choice.sparse]
    dense = {name: choice.why for name, choice in choices.items() if not choice.sparse}
    _save(model, folder)
    return {"sparse": sparse, "dense": dense, "gpu": torch.cuda.get_device_name(device)}


FORMATS: dict[str, Callable[[Source, Path], dict[str, Any]]] = {
    "safetensors": _write_plain,
    "packed": _write_packed,
    "onnx": _write_onnx,
    "torch-export": _write_program,
    "2:4": _write_two_four,
    "shrunk": _write_shrunk,
}


def _save(model: nn.Module, folder: Path) -> None:
    save_file(plain_state(model, 0), folder / "model.safetensors", metadata(kept_of(model)))
