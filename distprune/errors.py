"""Errors that are the user's to mend."""

from __future__ import annotations


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
