"""torch-export: the graph of a model as torch.export has it, in a .pt2 file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distprune.data import Inputs
from distprune.errors import ConfigError, reason
from distprune.export.source import Logits, Source


def write_program(source: Source, folder: Path) -> Path:
    """Write model.pt2.

    Raises:
        ConfigError: torch cannot trace the model.
    """
    path = folder / "model.pt2"
    wrapped, values = Logits(source.model, source.names).eval(), source.values(source.held_out.first_inputs())
    try:
        with torch.no_grad():
            program = torch.export.export(wrapped, values, dynamic_shapes=(source.dynamic(),))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # lines of code on this machine
        torch.export.save(program, path)
    except Exception as error:  # whatever a tracer meets
        raise ConfigError(
            f"--format: {type(source.model).__name__} cannot be traced by torch.export: {reason(error)}"
        ) from error
    return path


def read_program(path: Path, names: list[str], device: torch.device) -> Callable[[Inputs], Any]:
    """The model of a .pt2 file, as a function.

    Args:
        path: of the file.
        names: of inputs, in order; empty of images.
        device: where it is to run.
    """
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(path)
    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    module = program.module()

    def run(inputs: Inputs) -> Any:
        values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs[name] for name in names)
        with torch.no_grad():
            return module(*values)

    return run
