"""A folder that one process at a time writes to. Files appear in it whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from distprune.errors import ConfigError


class Folder:
    """A folder for the results of one job. Files are written under a temporary name and moved into place."""

    key: ClassVar[str]
    """What names it on the command line, for messages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock: FileLock | None = None

    @property
    def nearest(self) -> Path:
        """The folder, or the nearest above it that is there."""
        path = self.path.absolute()
        return next(place for place in (path, *path.parents) if place.exists())

    def unwritable(self) -> str | None:
        """What stands against writing to it, before anything is written; None where nothing does."""
        if self.nearest.is_dir() and os.access(self.nearest, os.W_OK):
            return None
        return f"{self.key}: cannot write to {self.path}: {self.nearest} is not a folder that can be written"

    def claim(self) -> None:
        """Make the folder ready for one process to write, until that ends.

        Raises:
            ConfigError: another process writes to it, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{self.key}: another process writes to {self.path}; wait for it, or choose another {self.key}"
            ) from None
        except OSError as error:
            raise ConfigError(f"{self.key}: cannot write to {self.path}: {error.strerror}") from None

    def release(self) -> None:
        """Let others write to the folder again."""
        if self._lock is not None:
            self._lock.release()

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` as a JSON file."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with self.into_place(name) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def into_place(self, name: str) -> Iterator[Path]:
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
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return content if isinstance(content, dict) else None
