"""Checkpoints: safetensors written by torch.distributed.checkpoint, whole or not there, readable on any topology.

    checkpoints/step-00001200/   shard-*.safetensors   tensors, each rank what it holds
                                 state.json            everything that is not a tensor
                                 manifest.json         size and SHA-256 of every other file
    checkpoints/latest           the name of the newest

A checkpoint is written under a name that starts with a dot, synced, and renamed; older ones are deleted only after
that. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
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
        rank, world_size: of this process.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, keep: int) -> None:
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._keep = keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], spared: Sequence[int] = ()) -> None:
        """Write a checkpoint, then delete all but the newest `keep`, those of the steps in `spared`, and later ones.

        Raises:
            CheckpointError: it could not be written on some rank; those written before are whole.
        """
        final = self._folder / f"step-{step:08d}"
        partial = self._folder / f".{final.name}.partial"
        problem = self._try(lambda: self._prepare(partial))
        problem = problem or self._try(lambda: self._write(partial, tensors))
        problem = problem or self._try(lambda: self._seal(partial, final, state))
        if problem:
            self._try(lambda: self._discard(partial))
            raise CheckpointError(f"cannot write the checkpoint of step {step}: {problem}")
        self._try(lambda: self._purge(final.name, spared))

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, chosen by rank 0; damaged ones are named in its log and passed over."""
        found: list[Any] = [None]
        for path in self._all() if self._rank == 0 else []:
            try:
                _verify(path)
            except (OSError, ValueError, TypeError, AttributeError, KeyError, CheckpointError) as error:
                logger.warning(f"checkpoint {path} is damaged and is passed over: {error}")
                continue
            found = [(path.name, json.loads((path / STATE).read_text(encoding="utf-8")))]
            break
        if self._world_size > 1:
            dist.broadcast_object_list(found, 0)
        if found[0] is None:
            return None
        name, state = found[0]
        return Checkpoint(self._folder / name, state["step"], state)

    def load(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors` in place, whatever ranks and shards they were saved from.

        Raises:
            CheckpointError: they are not those of the checkpoint.
        """
        problem = self._try(
            lambda: load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(checkpoint.path)),
                no_dist=self._world_size == 1,
            )
        )
        if problem:
            raise CheckpointError(f"cannot load {checkpoint.path}: {problem}")

    def _prepare(self, partial: Path) -> None:
        if self._rank == 0:
            for left in self._folder.glob(".step-*.partial"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)

    def _write(self, partial: Path, tensors: dict[str, Tensor]) -> None:
        # The format knows no memory formats such as channels_last; reading copies into whatever is there.
        tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        save(tensors, storage_writer=writer, no_dist=self._world_size == 1)

    def _seal(self, partial: Path, final: Path, state: dict[str, Any]) -> None:
        if self._rank > 0:
            return
        _write_synced(partial / STATE, json.dumps(state, indent=2))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(partial.iterdir())}
        _write_synced(partial / MANIFEST, json.dumps(files, indent=2))
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self._folder)
        _write_synced(self._folder / f".{LATEST}.partial", final.name + "\n")
        (self._folder / f".{LATEST}.partial").replace(self._folder / LATEST)

    def _discard(self, partial: Path) -> None:
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)

    def _purge(self, newest: str, spared: Sequence[int]) -> None:
        if self._rank > 0:
            return
        names = {f"step-{step:08d}" for step in spared}
        # Those of later steps are what was passed over when the run went on.
        later = [path for path in self._all() if path.name > newest]
        older = [path for path in self._all() if path.name <= newest and path.name not in names]
        for path in later + older[self._keep :]:
            shutil.rmtree(path)

    def _all(self) -> Iterator[Path]:
        """Checkpoints by name, the newest first."""
        yield from sorted(self._folder.glob("step-*"), reverse=True)

    def _try(self, action: Any) -> str | None:
        """Run `action` on every rank; what went wrong on the first rank where something did, told to all."""
        try:
            action()
            problem = None
        except (Exception, CheckpointException) as error:
            failures = error.failures if isinstance(error, CheckpointException) else {}
            cause = next((failure for failure, _ in failures.values()), error)
            reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
            problem = f"rank {self._rank}: {reason}" if self._world_size > 1 else reason
        if self._world_size == 1:
            return problem
        problems: list[str | None] = [None] * self._world_size
        dist.all_gather_object(problems, problem)
        return next((p for p in problems if p is not None), None)


def _verify(path: Path) -> None:
    """Raise unless every file of the manifest is there with its size and checksum, and no other."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    found = {p.name for p in path.iterdir()} - {MANIFEST}
    if found != manifest.keys():
        raise CheckpointError(f"its files are not those of the manifest: {sorted(found ^ manifest.keys())}")
    for name, entry in manifest.items():
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes, not {entry['bytes']}")
        if _sha256(path / name) != entry["sha256"]:
            raise CheckpointError(f"{name} has another checksum than when it was written")
    if not isinstance(json.loads((path / STATE).read_text(encoding="utf-8")).get("step"), int):
        raise CheckpointError(f"{STATE} names no step")


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
