"""The run folder: what lies where, who may write, and what state the run is in."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distprune.training.folder import Folder

State = Literal["running", "done", "preempted", "failed"]
OF_ONE_RUN = (
    "metrics.jsonl", "histograms.jsonl", "wandb_id", "dense.safetensors", "best.safetensors", "validation.json",
    "validation-so-far.json", "stop",
)  # fmt: skip


class RunFolder(Folder):
    """A folder that holds one run."""

    key = "run.dir"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def histograms(self) -> Path:
        """Of the weights of layers: one JSON object per update of the masks."""
        return self.path / "histograms.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        """The final weights."""
        return self.path / "model.safetensors"

    @property
    def dense(self) -> Path:
        """The model before its first weight was pruned."""
        return self.path / "dense.safetensors"

    @property
    def best(self) -> Path:
        """The best weights at the final sparsity, where they are asked for and not the final ones."""
        return self.path / "best.safetensors"

    @property
    def stop_file(self) -> Path:
        """Whoever makes this file asks the run to stop."""
        return self.path / "stop"

    @property
    def checkpoints(self) -> Path:
        """See `distprune.training.checkpoint`."""
        return self.path / "checkpoints"

    @property
    def masks(self) -> Path:
        """The final masks, packed."""
        return self.path / "masks.safetensors"

    @property
    def validation(self) -> Path:
        """The dense and the pruned model side by side."""
        return self.path / "validation.json"

    @property
    def validation_so_far(self) -> Path:
        """The sets that are done, of a validation that is not."""
        return self.path / "validation-so-far.json"

    @property
    def heartbeats(self) -> Path:
        """See `distprune.training.liveness`."""
        return self.path / "heartbeats"

    @property
    def wandb_id(self) -> Path:
        """The id of the run at Weights & Biases."""
        return self.path / "wandb_id"

    @property
    def logs(self) -> Path:
        """A log file per rank."""
        return self.path / "logs"

    def began_with(self) -> dict[str, Any]:
        """The configuration that a run here began with."""
        return cast(dict[str, Any], yaml.safe_load(self.config.read_text(encoding="utf-8")))

    def status(self) -> dict[str, Any] | None:
        """state, step, steps and error of the run, or None where there is none yet."""
        return self._read_json("status.json")

    def summary(self) -> dict[str, Any] | None:
        """The last word of a run that is done."""
        return self._read_json("summary.json")

    def validated_before(self, of: dict[str, Any]) -> dict[str, Any]:
        """Figures of sets by name, where a start before this one was stopped in the same validation, which `of` tells.

        Both are JSON values.
        """
        found = self._read_json(self.validation_so_far.name) or {}
        return cast(dict[str, Any], found["sets"]) if found.get("of") == of else {}

    def keep_validation(self, of: dict[str, Any], sets: dict[str, Any]) -> None:
        """Write figures of sets for `validated_before`."""
        self.write_json(self.validation_so_far.name, {"of": of, "sets": sets})

    def write_validation(self, sets: dict[str, Any]) -> None:
        """Write the figures of all sets."""
        self.write_json(self.validation.name, {"sets": sets})
        self.validation_so_far.unlink(missing_ok=True)

    def tracker_id(self) -> str | None:
        """The id of the run at Weights & Biases, once it has one."""
        return self.wandb_id.read_text(encoding="utf-8") if self.wandb_id.exists() else None

    def is_done(self) -> bool:
        """Whether the run ended well."""
        return (self.status() or {}).get("state") == "done"

    def clear(self, config: str) -> None:
        """Delete what a start left that wrote no checkpoint; for the same `config` its id at W&B stays."""
        same = self.config.exists() and self.config.read_text(encoding="utf-8") == config
        for name in OF_ONE_RUN:
            if not (same and name == self.wandb_id.name):
                (self.path / name).unlink(missing_ok=True)

    def go_back_to(self, step: int, with_step: bool, with_update: bool) -> None:
        """Drop logged steps behind `step`: they will be logged again. So will be those of that step itself, unless
        they were logged before its checkpoint was written: figures `with_step`, histograms `with_update`."""
        self.stop_file.unlink(missing_ok=True)
        self._cut(self.metrics, step, with_step)
        if self.histograms.exists():
            self._cut(self.histograms, step, with_update)

    def _cut(self, path: Path, step: int, with_step: bool) -> None:
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = []
        for row in rows:
            try:
                at = json.loads(row)["trainer/step"]
            except json.JSONDecodeError:
                break  # the last line of a process that was killed while it wrote
            if at < step or (with_step and at == step):
                kept.append(row + "\n")
        self.write_text(path.name, "".join(kept))

    def write_status(self, state: State, step: int, steps: int, error: str | None = None) -> None:
        """Say what state the run is in."""
        self.write_json("status.json", {"state": state, "step": step, "steps": steps, "error": error})

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write a safetensors file of contiguous tensors in CPU memory."""
        with self.into_place(name) as partial:
            try:
                save_file(tensors, partial, metadata)
            except SafetensorError as error:
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]) if number else errno.EIO, str(error), str(self.path / name)) from None
            partial.chmod(permissions())


def permissions() -> int:
    """Of a new file; safetensors lets nobody else read its own."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
