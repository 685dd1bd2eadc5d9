"""What a configuration names as `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

from distprune.errors import ConfigError


def imported(name: str, key: str) -> Any:
    """The callable that `package.module:name` names.

    Args:
        name: with a colon.
        key: the setting, for messages.

    Raises:
        ConfigError: it cannot be imported, or is not callable.
    """
    module, _, entry = name.partition(":")
    try:
        found = importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}: cannot import {module!r} for {name}: {error}") from error
    if not callable(value := getattr(found, entry, None)):
        raise ConfigError(f"{key}: {module} has no function {entry!r}{near(entry, dir(found))}")
    return value


def near(name: str, known: Sequence[str]) -> str:
    """The end of a message that says which known name is meant, or which there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}" if len(known) < 20 else ""
