"""What is exported: the pruned model of a finished run, bare, on the CPU, with some inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distprune.config import Config
from distprune.config.schema import TextClassification
from distprune.data import Inputs
from distprune.training.checks import check_fit
from distprune.training.devices import make_accelerator
from distprune.training.finished import FinishedRun
from distprune.training.held_out import open_split
from distprune.training.logits import logits_of
from distprune.training.splits import Split


class Logits(nn.Module):
    """A model as a function of tensors in a fixed order, that returns logits and nothing else.

    Args:
        model: bare.
        names: of its keyword arguments; empty where it takes images.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = list(names)

    def forward(self, *values: Tensor) -> Any:
        return logits_of(self.model, dict(zip(self.names, values, strict=True)) if self.names else values[0])


@dataclass(frozen=True)
class Source:
    """The model of a run, and what it takes.

    Attributes:
        run: which is done.
        accelerator: one process on the CPU.
        train, held_out: splits of its data.
        model: pruned, in evaluation mode.
    """

    run: FinishedRun
    accelerator: Accelerator
    train: Split
    held_out: Split
    model: nn.Module

    @classmethod
    def of(cls, run: FinishedRun) -> Source:
        """Read a run.

        Raises:
            ConfigError: data or weights are not there, or do not fit.
        """
        config = on_cpu(run.config)
        accelerator = make_accelerator(config)
        train = open_split(config, config.data.train_split, accelerator)
        held_out = open_split(config, config.data.eval_split, accelerator)
        model = run.pruned(train).eval()
        check_fit(model, held_out.first_inputs(), train.outputs, accelerator)
        return cls(run, accelerator, train, held_out, model)

    @property
    def names(self) -> list[str]:
        """Of the model's keyword arguments, in the order in which exports take them; empty of images."""
        inputs = self.held_out.first_inputs()
        return [] if isinstance(inputs, Tensor) else sorted(inputs, key=lambda name: (name != "input_ids", name))

    def values(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Inputs in that order, in plain memory."""
        values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs[name] for name in self.names)
        return tuple(value.contiguous(memory_format=torch.contiguous_format) for value in values)

    def dynamic(self) -> tuple[dict[int, Any], ...]:
        """Which dimensions of these may have any size: samples, and tokens of texts."""
        batch, data = torch.export.Dim("batch", min=1), self.run.config.data
        if not isinstance(data, TextClassification):
            return tuple({0: batch} for _ in (self.names or ["images"]))
        tokens = torch.export.Dim("tokens", min=2, max=data.max_length)
        return tuple({0: batch, 1: tokens} for _ in self.names)


def on_cpu(config: Config) -> Config:
    """The same in one process on the CPU, in float32."""
    run = config.run.model_copy(update={"device": "cpu", "precision": "fp32", "compile": False})
    return config.model_copy(update={"run": run})
