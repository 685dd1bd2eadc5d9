"""Checkpoints: safetensors written by torch.distributed.checkpoint, whole or not there, readable on any topology.

    checkpoints/step-00001200/   shard-*.safetensors   tensors, each rank what it holds
                                 state.json            everything that is not a tensor
                                 manifest.json         size and SHA-256 of every other file
    checkpoints/latest           the name of the newest
    checkpoints/best, ...        the name of one that is kept as long as this file names it

A checkpoint is written under a name that starts with a dot, synced, and renamed; older ones are deleted only after
that. No file is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distprune.tracking.logs import logger

STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
NAME = re.compile(r"step-\d{8,}")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that are there can be read."""


# Other errors of reading, such as those of a network file system, say nothing of the files.
DAMAGE = (
    FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, AttributeError, KeyError,
    CheckpointError,
)  # fmt: skip


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
        self._passed_over: set[str] = set()

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], marks: Mapping[str, int]
    ) -> None:
        """Write a checkpoint, then delete all but the newest `keep`, those that are marked, and later ones.

        Args:
            step: of the run.
            tensors: by name, plain or sharded; what several ranks hold is written by one of them.
            state: JSON values; "marks" is added to them.
            marks: steps whose checkpoints are kept too, by a name that becomes that of a file which says so. Those that
                an older checkpoint was saved with stay as long as it does.

        Raises:
            CheckpointError: it could not be written on some rank; those written before are whole.
        """
        final = self._folder / _name(step)
        partial = self._folder / f".{final.name}.partial"
        problem = self._try(lambda: self._prepare(partial))
        problem = problem or self._try(lambda: self._write(partial, tensors))
        problem = problem or self._try(lambda: self._seal(partial, final, {**state, "marks": dict(marks)}))
        if problem:
            self._try(lambda: self._discard(partial))
            raise CheckpointError(f"cannot write the checkpoint of step {step}: {problem}")
        for tidy in (self._point, self._purge):
            if problem := self._try(lambda tidy=tidy: tidy(final.name, marks)):  # type: ignore[misc]
                logger.warning(f"{final} is whole, but its folder cannot be tidied: {problem}")

    def newest(self, before: int | None = None) -> Checkpoint | None:
        """The newest whole checkpoint, of a step below `before`, chosen by rank 0; None where there is none at all.

        Damaged ones are named in its log and passed over.

        Raises:
            CheckpointError: there are some, but none can be read.
        """
        return self._agreed(lambda: self._find(before))

    def of_step(self, step: int) -> Checkpoint:
        """That of one step.

        Raises:
            CheckpointError: it is not there, or damaged.
        """
        path = self._folder / _name(step)

        def verified() -> tuple[str, dict[str, Any]]:
            self._recover()
            try:
                return path.name, _verified_state(path)
            except DAMAGE as error:
                raise CheckpointError(
                    f"{path}, to which the run must go back, is missing or damaged: {error}"
                ) from None

        checkpoint = self._agreed(verified)
        assert checkpoint is not None
        return checkpoint

    def _agreed(self, find: Callable[[], tuple[str, dict[str, Any]] | None]) -> Checkpoint | None:
        """What rank 0 finds, on all ranks."""
        found: list[Any] = [None]
        if self._rank == 0:
            try:
                found = [find()]
            except (OSError, CheckpointError) as error:
                found = [str(error)]
        if self._group is not None:
            dist.broadcast_object_list(found, 0, group=self._group)
        if isinstance(found[0], str):
            raise CheckpointError(found[0])
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

    def _find(self, before: int | None) -> tuple[str, dict[str, Any]] | None:
        self._recover()
        for path in self._all():
            try:
                state = _verified_state(path)
            except DAMAGE as error:
                logger.warning(f"checkpoint {path} is damaged and is passed over: {error}")
                self._passed_over.add(path.name)
                continue
            if before is None or state["step"] < before:
                return path.name, state
            self._passed_over.add(path.name)
        if self._passed_over:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read; remove that folder to begin again"
            )
        return None

    def _recover(self) -> None:
        """Bring back a checkpoint whose replacement was interrupted, or let the old one go."""
        for old in self._folder.glob(".step-*.replaced"):
            final = self._folder / old.name[1:].removesuffix(".replaced")
            if final.exists():
                shutil.rmtree(old)
            else:
                old.rename(final)

    def _prepare(self, partial: Path) -> None:
        if self._rank == 0:
            self._recover()
            for left in self._folder.glob(".step-*.partial"):
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
        try:
            partial.rename(final)
        finally:
            self._recover()
        _sync(self._folder)

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
        marked = {_name(step) for step in marks.values()}
        # What was passed over, and what is of later steps than the run has gone on from.
        useless = [path for path in self._all() if path.name > newest or path.name in self._passed_over - {newest}]
        older = [path for path in self._all() if path not in useless and path.name not in marked]
        for path in older[: self._keep]:
            with suppress(*DAMAGE):  # nobody can go on from it
                marked |= set(map(_name, json.loads((path / STATE).read_text(encoding="utf-8"))["marks"].values()))
        for path in useless + [path for path in older[self._keep :] if path.name not in marked]:
            shutil.rmtree(path)
        self._passed_over.clear()

    def _all(self) -> list[Path]:
        """Checkpoints by name, the newest first."""
        return sorted((path for path in self._folder.glob("step-*") if NAME.fullmatch(path.name)), reverse=True)

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
    """A save in the background; whatever goes wrong is kept until somebody asks.

    Args:
        save: is called in a thread of its own.
        device: the rank's; a new thread would else use the first GPU of its host.
    """

    def __init__(self, save: Callable[[], None], device: torch.device) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._save = save
        self._device = device
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Save."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
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
