"""An export, loaded in a process of its own and evaluated beside the model that it was made of.

    python -m distprune.export.check FOLDER RUN_DIR [section.key=value ...]

prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from distprune.data import PADDING, Inputs
from distprune.export.loading import load_function, read_figures
from distprune.export.source import Source
from distprune.training.finished import FinishedRun
from distprune.training.logits import logits_of, to_device
from distprune.training.tasks import rows


def check(folder: Path, run: FinishedRun) -> dict[str, Any]:
    """Evaluate an export and the model of its run on the whole evaluation split.

    Returns:
        top1 and original_top1 (percent), loss and original_loss, samples (or tokens), agree (the share of these with
        the same first class), max_difference (of logits), largest (of the model's logits).
    """
    source = Source.of(run)
    device = torch.device("cuda" if read_figures(folder)["format"] == "2:4" else "cpu")
    exported = load_function(folder, device)
    sums = torch.zeros(6, dtype=torch.float64)
    difference = largest = 0.0
    # One sample alone, then batches as they come: any number must do.
    with torch.no_grad():
        first = _first(source.held_out.first_inputs())
        _logits(exported, first, device)
        batches = tqdm(source.held_out.eval_batches(alone=True)(), desc="checking", unit="batch", disable=None)
        for inputs, labels in batches:
            mine, _ = rows(_logits(exported, inputs, device), labels)
            theirs, known = rows(logits_of(source.model, inputs), labels)
            there = known != PADDING
            mine, theirs, known = mine[there], theirs[there], known[there]
            difference = max(difference, float((mine - theirs).abs().max()))
            largest = max(largest, float(theirs.abs().max()))
            sums += torch.tensor(
                [
                    float((mine.argmax(1) == known).sum()),
                    float((theirs.argmax(1) == known).sum()),
                    float(F.cross_entropy(mine, known, reduction="sum")),
                    float(F.cross_entropy(theirs, known, reduction="sum")),
                    float((mine.argmax(1) == theirs.argmax(1)).sum()),
                    len(known),
                ],
                dtype=torch.float64,
            )
    right, right_before, loss, loss_before, agree, samples = sums.tolist()
    return {
        "top1": 100 * right / samples,
        "original_top1": 100 * right_before / samples,
        "loss": loss / samples,
        "original_loss": loss_before / samples,
        "samples": int(samples),
        "agree": agree / samples,
        "max_difference": difference,
        "largest": largest,
    }


def _logits(exported: Callable[[Inputs], Tensor], inputs: Inputs, device: torch.device) -> Tensor:
    return exported(to_device(inputs, device)).cpu().float()


def _first(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[:1]
    return {name: value[:1] for name, value in inputs.items()}


if __name__ == "__main__":
    folder, run, *overrides = sys.argv[1:]
    print(json.dumps(check(Path(folder), FinishedRun(run, overrides))))
