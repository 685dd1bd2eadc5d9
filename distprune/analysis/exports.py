"""Exports as forms to be timed, each beside the dense model exported the same way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from distprune.analysis.latency import Form
from distprune.errors import ConfigError
from distprune.export import two_four
from distprune.export.formats import write
from distprune.export.loading import FIGURES, load_function, read_figures
from distprune.export.source import Source
from distprune.tracking.logs import logger
from distprune.training.logits import logits_of


class Exports:
    """What lies in a run's folder of exports.

    A runtime of its own, such as ONNX Runtime, is faster or slower than torch whether or not a model was pruned. What
    pruning brings there is seen beside the dense model in the same runtime, which is exported for that.

    Args:
        folder: of the exports.
        dense: the dense model, on the CPU; None where it was not kept.
        scratch: a folder for its exports.
    """

    def __init__(self, folder: Path, dense: Source | None, scratch: Path) -> None:
        self._folders = [path.parent for path in sorted(folder.glob(f"[!.]*/{FIGURES}"))]
        self._dense = dense
        self._scratch = scratch

    def forms(self, device: torch.device) -> list[Form]:
        """Those that compute otherwise than their model does: ONNX on a CPU, 2:4 on a GPU, torch-export on both."""
        forms = []
        for folder in self._folders:
            about = read_figures(folder)
            if about["format"] != "torch-export" and about["format"] != ("onnx" if device.type == "cpu" else "2:4"):
                continue
            peer = self._peer(folder.name, about, device)
            if peer is not None:
                forms.append(peer)
            name = None if peer is None else peer.name
            forms.append(Form(folder.name, device, load_function(folder, device), name))
        return forms

    def _peer(self, name: str, about: dict[str, Any], device: torch.device) -> Form | None:
        """The dense model as an export of this name has the pruned one."""
        if self._dense is None:
            return None
        if about["format"] == "2:4":
            model = copy.deepcopy(self._dense.model).half().to(device)
            return Form("dense half", device, lambda inputs: logits_of(model, two_four.halved(inputs)).float())
        folder = self._scratch / name
        if not folder.exists():
            folder.mkdir()
            try:
                known = write(self._dense, about["format"], folder, "quantized" in about, about.get("calibration", 1))
            except ConfigError as error:
                logger.warning(f"the dense model is not compared as {name}: {error}")
                return None
            (folder / FIGURES).write_text(json.dumps({"format": about["format"], **known}), encoding="utf-8")
        return Form(f"dense {name}", device, load_function(folder, device))
