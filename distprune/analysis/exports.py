"""Exports as forms to be timed, each beside the dense model exported the same way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from distprune.analysis.latency import Form, of_model
from distprune.errors import ConfigError
from distprune.export import two_four
from distprune.export.formats import write
from distprune.export.loading import FIGURES, load_function, load_model, read_figures
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
        is_shrunk: whether the run's own model is without its pruned channels.
    """

    def __init__(self, folder: Path, dense: Source | None, scratch: Path, is_shrunk: bool) -> None:
        self._is_shrunk = is_shrunk
        self._folders = [path.parent for path in sorted(folder.glob(f"[!.]*/{FIGURES}"))]
        self._dense = dense
        self._scratch = scratch

    def forms(self, device: torch.device) -> list[Form]:
        """Those that compute otherwise than their model does: ONNX on a CPU, 2:4 on a GPU, others on both."""
        forms = []
        for folder in self._folders:
            about = read_figures(folder)
            runs_on = {"onnx": ("cpu",), "2:4": ("cuda",), "torch-export": ("cpu", "cuda")}
            runs_on["shrunk"] = () if self._is_shrunk else ("cpu", "cuda")
            if device.type not in runs_on.get(about["format"], ()):
                continue
            if about["format"] == "shrunk":
                forms.append(of_model("shrunk", load_model(folder).to(device), device, peer="dense"))
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
