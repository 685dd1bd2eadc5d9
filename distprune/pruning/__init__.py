"""The core: exact, distributed magnitude pruning. Needs torch and nothing else."""

from distprune.pruning.agreement import MaskMismatchError, WeightMismatchError, compare_replicas
from distprune.pruning.prunable import Prunable, Selection, find_prunable
from distprune.pruning.pruner import LayerSparsity, Pruner, PruneReport
from distprune.pruning.schedule import CubicSchedule, Schedule
from distprune.pruning.threshold import NonFiniteError

__all__ = [
    "CubicSchedule",
    "LayerSparsity",
    "MaskMismatchError",
    "NonFiniteError",
    "Prunable",
    "PruneReport",
    "Pruner",
    "Schedule",
    "Selection",
    "WeightMismatchError",
    "compare_replicas",
    "find_prunable",
]
