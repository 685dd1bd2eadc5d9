"""Checkpoints: safetensors written by torch.distributed.checkpoint, whole or not there, readable on any topology.

    checkpoints/step-00001200/   shard-*.safetensors   tensors, each rank what it holds
                                 state.json            everything that is not a tensor
                                 manifest.json         size and SHA-256 of every other file
    checkpoints/latest           the name of the newest
    checkpoints/best, ...        the name of one that is kept for good

A checkpoint is written under a name that starts with a dot, synced, and renamed; older ones are deleted only after
that. No file is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distprune.tracking.logs import logger

STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that are there can be read."""


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]


class Checkpoints:
    """The folder of a run's checkpoints. Every method is called on all ranks.

    Args:
        folder: where they lie.
        keep: how many of the newest to keep.
        group: a gloo group of all ranks that nothing else uses meanwhile; None for one rank.
    """

    def __init__(self, folder: Path, keep: int, group: dist.ProcessGroup | None) -> None:
        self._folder = folder
        self._keep = keep
        self._group = group
        self._rank = dist.get_rank(group) if group is not None else 0

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], marks: Mapping[str, int]
    ) -> None:
        """Write a checkpoint, then delete all but the newest `keep`, those that are marked, and later ones.

        Args:
            step: of the run.
            tensors: by name, plain or sharded; of plain ones the first rank's are written.
            state: JSON values.
            marks: steps whose checkpoints are kept for good, by a name that becomes that of a file which says so.

        Raises:
            CheckpointError: it could not be written on some rank; those written before are whole.
        """
        final = self._folder / _name(step)
        partial = self._folder / f".{final.name}.partial"
        problem = self._try(lambda: self._prepare(partial))
        problem = problem or self._try(lambda: self._write(partial, tensors))
        problem = problem or self._try(lambda: self._seal(partial, final, state))
        if problem:
            self._try(lambda: self._discard(partial))
            raise CheckpointError(f"cannot write the checkpoint of step {step}: {problem}")
        for tidy in (self._point, self._purge):
            if problem := self._try(lambda tidy=tidy: tidy(final.name, marks)):  # type: ignore[misc]
                logger.warning(f"{final} is whole, but its folder cannot be tidied: {problem}")

    def newest(self, before: int | None = None) -> Checkpoint | None:
        """The newest whole checkpoint, of a step below `before`, chosen by rank 0.

        Damaged ones are named in its log and passed over.
        """
        found: list[Any] = [None]
        for path in self._all() if self._rank == 0 else []:
            try:
                state = _verified_state(path)
            except (OSError, ValueError, TypeError, AttributeError, KeyError, CheckpointError) as error:
                logger.warning(f"checkpoint {path} is damaged and is passed over: {error}")
                continue
            if before is None or state["step"] < before:
                found = [(path.name, state)]
                break
        if self._group is not None:
            dist.broadcast_object_list(found, 0, group=self._group)
        if found[0] is None:
            return None
        name, state = found[0]
        return Checkpoint(self._folder / name, state["step"], state)

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place, whatever ranks and shards they were saved from.

        Raises:
            CheckpointError: they are not those of the checkpoint.
        """
        reader = HuggingFaceStorageReader(str(checkpoint.path))
        problem = self._try(
            lambda: load(tensors, storage_reader=reader, process_group=self._group, no_dist=self._group is None)
        )
        if problem:
            raise CheckpointError(f"cannot load {checkpoint.path}: {problem}")

    def _prepare(self, partial: Path) -> None:
        if self._rank == 0:
            for left in [*self._folder.glob(".step-*.partial"), *self._folder.glob(".step-*.replaced")]:
                shutil.rmtree(left)
            partial.mkdir(parents=True)

    def _write(self, partial: Path, tensors: Mapping[str, Tensor]) -> None:
        # The format knows no memory formats such as channels_last; reading copies into whatever is there.
        contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        save(contiguous, storage_writer=writer, process_group=self._group, no_dist=self._group is None)

    def _seal(self, partial: Path, final: Path, state: Mapping[str, Any]) -> None:
        if self._rank > 0:
            return
        _write_synced(partial / STATE, json.dumps(state, indent=2))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(partial.iterdir())}
        _write_synced(partial / MANIFEST, json.dumps(files, indent=2))
        _sync(partial)
        replaced = self._folder / f".{final.name}.replaced"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _sync(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _point(self, name: str, marks: Mapping[str, int]) -> None:
        if self._rank == 0:
            for pointer, target in {LATEST: name, **{m: _name(step) for m, step in marks.items()}}.items():
                _write_synced(self._folder / f".{pointer}.partial", target + "\n")
                (self._folder / f".{pointer}.partial").replace(self._folder / pointer)

    def _discard(self, partial: Path) -> None:
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _purge(self, newest: str, marks: Mapping[str, int]) -> None:
        if self._rank > 0:
            return
        names = {_name(step) for step in marks.values()}
        # Those of later steps are what was passed over when the run went on.
        later = [path for path in self._all() if path.name > newest]
        older = [path for path in self._all() if path.name <= newest and path.name not in names]
        for path in later + older[self._keep :]:
            shutil.rmtree(path)

    def _all(self) -> Iterator[Path]:
        """Checkpoints by name, the newest first."""
        yield from sorted(self._folder.glob("step-*"), reverse=True)

    def _try(self, action: Callable[[], None]) -> str | None:
        """Run `action` on every rank; what went wrong on the first rank where something did, told to all."""
        try:
            action()
            problem = None
        except (Exception, CheckpointException) as error:
            failures = error.failures if isinstance(error, CheckpointException) else {}
            cause = next((failure for failure, _ in failures.values()), error)
            reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
            problem = f"rank {self._rank}: {reason}" if self._group is not None else reason
        if self._group is None:
            return problem
        problems: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        return next((p for p in problems if p is not None), None)


class Writing(threading.Thread):
    """A save in the background; whatever goes wrong is kept until somebody asks."""

    def __init__(self, save: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._save = save
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Save."""
        try:
            self._save()
        except BaseException as error:
            self._error = error

    def result(self) -> None:
        """Wait for the end.

        Raises:
            CheckpointError: it could not be written.
        """
        self.join()
        if self._error is not None:
            raise self._error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _verified_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, if every file of its manifest is there with its size and checksum, and no other."""
    text = (path / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    if text != json.dumps(manifest, indent=2):
        raise CheckpointError(f"{MANIFEST} is not as it was written")
    found = {p.name for p in path.iterdir()} - {MANIFEST}
    if found != manifest.keys():
        raise CheckpointError(f"its files are not those of the manifest: {sorted(found ^ manifest.keys())}")
    for name, entry in manifest.items():
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes, not {entry['bytes']}")
        if _sha256(path / name) != entry["sha256"]:
            raise CheckpointError(f"{name} has another checksum than when it was written")
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if _name(state["step"]) != path.name:
        raise CheckpointError(f"{STATE} is of step {state['step']}")
    return state


def _sha256(path: Path) -> str:
    """The checksum of a file, which is synced to disk first."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
