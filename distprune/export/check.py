"""An export, loaded in a process of its own and evaluated beside the model that it was made of.

    python -m distprune.export.check FOLDER RUN_DIR [section.key=value ...]

prints one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distprune.data import Inputs
from distprune.export.loading import load_function, read_figures
from distprune.export.source import Source
from distprune.training.finished import FinishedRun
from distprune.training.logits import logits_of, repeated, to_device
from distprune.training.validation import compare


class _Kept(nn.Module):
    """A function of inputs as a model that keeps its last logits."""

    def __init__(self, run: Callable[[Inputs], Tensor]) -> None:
        super().__init__()
        self._run = run
        self.logits = torch.empty(0)

    def forward(self, *images: Tensor, **texts: Tensor) -> Tensor:
        self.logits = self._run(texts or images[0])
        return self.logits


def check(folder: Path, run: FinishedRun) -> dict[str, Any]:
    """Evaluate an export and the model of its run on the whole evaluation split.

    Returns:
        top1 and original_top1 (percent), loss and original_loss, samples (or tokens), agree (the share of these with
        the same first class), max_difference (of logits), largest (of the model's logits).
    """
    source = Source.of(run)
    device = torch.device("cuda" if read_figures(folder)["format"] == "2:4" else "cpu")
    compute = load_function(folder, device)
    exported = _Kept(lambda inputs: compute(to_device(inputs, device)).cpu().float())
    original = _Kept(lambda inputs: logits_of(source.model, inputs))
    difference = largest = 0.0

    def look() -> None:
        nonlocal difference, largest
        difference = _greater(difference, exported.logits - original.logits)
        largest = _greater(largest, original.logits)

    with torch.no_grad():  # one sample alone, then batches as they come: any number must do
        logits_of(exported, repeated(source.held_out.first_inputs(), 1))
    batches = tqdm(source.held_out.eval_batches(alone=True)(), desc="checking", unit="batch", disable=None)
    found = compare(original, exported, batches, (), source.accelerator, look)
    return {
        "top1": found["pruned"]["top1"],
        "original_top1": found["dense"]["top1"],
        "loss": found["pruned"]["loss"],
        "original_loss": found["dense"]["loss"],
        "samples": found["samples"],
        "agree": found["agree"] / found["samples"],
        "max_difference": difference,
        "largest": largest,
    }


def _greater(known: float, values: Tensor) -> float:
    """The largest magnitude so far; NaN once there was one."""
    most = float(values.abs().max())
    return most if math.isnan(most) or most > known else known


if __name__ == "__main__":
    folder, run, *overrides = sys.argv[1:]
    print(json.dumps(check(Path(folder), FinishedRun(run, overrides))))
