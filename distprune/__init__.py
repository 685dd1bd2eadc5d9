"""distprune prunes neural networks while they train, on many GPUs at once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distprune.pruning import CubicSchedule, Pruner, PruneReport, find_prunable

__version__ = "0.1.0"
__all__ = ["CubicSchedule", "PruneReport", "Pruner", "find_prunable"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `distprune --help` must not wait for it.
    if name in __all__:
        return getattr(import_module("distprune.pruning"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
