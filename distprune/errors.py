"""Errors that are the user's to mend."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class ConfigError(ValueError):
    """The command line, the configuration or what it names is wrong. Ends a command with exit code 2.

    Args:
        faults: one line each: where, what, what instead.
        source: the file the faults are in, if it is one.
    """

    def __init__(self, *faults: str, source: str | None = None) -> None:
        self.faults = faults
        count = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        head = f"{source}: {count}" if source else count
        super().__init__("\n".join([head, *(f"  - {fault}" for fault in faults)]))


class MissingError(ConfigError):
    """Data or weights that `distprune prepare` fetches are not here, and cannot be fetched from here."""


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def remedy(error: ConfigError, words: Sequence[str]) -> str:
    """The line that says which command fetches what is missing, or nothing.

    Args:
        error: what ended a command.
        words: configuration and overrides of that command.
    """
    if not isinstance(error, MissingError):
        return ""
    needed = [word for word in words if not word.startswith(("run.", "tracking."))]
    command = shlex.join(["distprune", "prepare", *needed])
    return f"\nWhere there is a network, with the same HF_HOME and DISTPRUNE_CACHE, this fetches it: {command}"
