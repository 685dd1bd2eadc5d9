"""The run folder: what lies where, who may write, and what state the run is in."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distprune.errors import ConfigError

State = Literal["running", "done", "preempted", "failed"]
OF_ONE_RUN = ("metrics.jsonl", "wandb_id", "teacher.safetensors", "stop")


class RunFolder:
    """A folder that holds one run. Files are written under a temporary name and moved into place."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock: FileLock | None = None

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        """The final weights."""
        return self.path / "model.safetensors"

    @property
    def teacher(self) -> Path:
        """The dense model of a run that trained it, kept for the starts that follow."""
        return self.path / "teacher.safetensors"

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

    @property
    def nearest(self) -> Path:
        """The folder, or the nearest above it that is there."""
        path = self.path.absolute()
        return next(place for place in (path, *path.parents) if place.exists())

    def began_with(self) -> dict[str, Any]:
        """The configuration that a run here began with."""
        return cast(dict[str, Any], yaml.safe_load(self.config.read_text(encoding="utf-8")))

    def status(self) -> dict[str, Any] | None:
        """state, step, steps and error of the run, or None where there is none yet."""
        return self._read_json("status.json")

    def summary(self) -> dict[str, Any] | None:
        """The last word of a run that is done."""
        return self._read_json("summary.json")

    def tracker_id(self) -> str | None:
        """The id of the run at Weights & Biases, once it has one."""
        return self.wandb_id.read_text(encoding="utf-8") if self.wandb_id.exists() else None

    def is_done(self) -> bool:
        """Whether the run ended well."""
        return (self.status() or {}).get("state") == "done"

    def claim(self) -> None:
        """Make the folder ready for one process to write, until that ends.

        Raises:
            ConfigError: another process trains here, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"run.dir: another process trains in {self.path}; wait for it, or choose another run.dir"
            ) from None
        except OSError as error:
            raise ConfigError(f"run.dir: cannot write to {self.path}: {error.strerror}") from None

    def clear(self, config: str) -> None:
        """Delete what a start left that wrote no checkpoint; for the same `config` its id at W&B stays."""
        same = self.config.exists() and self.config.read_text(encoding="utf-8") == config
        for name in OF_ONE_RUN:
            if not (same and name == self.wandb_id.name):
                (self.path / name).unlink(missing_ok=True)

    def go_back_to(self, step: int, with_step: bool) -> None:
        """Drop logged steps behind `step`, and that itself unless `with_step`: they will be logged again."""
        self.stop_file.unlink(missing_ok=True)
        rows = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        kept = []
        for row in rows:
            try:
                at = json.loads(row)["trainer/step"]
            except json.JSONDecodeError:
                break  # the last line of a process that was killed while it wrote
            if at < step or (with_step and at == step):
                kept.append(row + "\n")
        self.write_text(self.metrics.name, "".join(kept))

    def release(self) -> None:
        """Let others write to the folder again."""
        if self._lock is not None:
            self._lock.release()

    def write_status(self, state: State, step: int, steps: int, error: str | None = None) -> None:
        """Say what state the run is in."""
        self.write_json("status.json", {"state": state, "step": step, "steps": steps, "error": error})

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` as a JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with self._into_place(name) as partial:
            partial.write_text(text, encoding="utf-8")

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write a safetensors file of contiguous tensors in CPU memory."""
        with self._into_place(name) as partial:
            try:
                save_file(tensors, partial, metadata)
            except SafetensorError as error:
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]) if number else errno.EIO, str(error), str(self.path / name)) from None
            partial.chmod(0o666 & ~_umask())

    @contextmanager
    def _into_place(self, name: str) -> Iterator[Path]:
        """A path to write to, which becomes the file `name` when all is written, and is gone when it could not be."""
        partial = self.path / f".{name}.{os.getpid()}.partial"
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.path / name)
        finally:
            partial.unlink(missing_ok=True)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
            return None
        return content if isinstance(content, dict) else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
