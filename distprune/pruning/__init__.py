"""The core: exact, distributed pruning. Needs torch and nothing else."""

from distprune.pruning.agreement import MaskMismatchError, WeightMismatchError, compare_replicas
from distprune.pruning.allocation import (
    Allocation,
    ErdosRenyiKernel,
    GlobalAllocation,
    LampAllocation,
    TableAllocation,
    UniformAllocation,
)
from distprune.pruning.blocks import BlockPattern, Blocks, Columns, Rows
from distprune.pruning.gradsync import GradientSync
from distprune.pruning.holder import LayerSparsity, MaskHolder, PruneReport
from distprune.pruning.limits import Bounds
from distprune.pruning.patterns import NM, Pattern
from distprune.pruning.permute import Permutations, find_permutations, permute_channels
from distprune.pruning.prunable import Prunable, Selection, find_prunable
from distprune.pruning.pruner import Pruner
from distprune.pruning.rounds import Attempt, RoundsSchedule
from distprune.pruning.schedule import (
    CosineSchedule,
    CubicSchedule,
    ExponentialSchedule,
    GradualSchedule,
    LinearSchedule,
    OneShotSchedule,
    PolynomialSchedule,
    Schedule,
)
from distprune.pruning.scores import GradientScore, Movement, Piece, Random, Score, Taylor, magnitude
from distprune.pruning.threshold import NonFiniteError

__all__ = [
    "NM",
    "Allocation",
    "Attempt",
    "BlockPattern",
    "Blocks",
    "Bounds",
    "Columns",
    "CosineSchedule",
    "CubicSchedule",
    "ErdosRenyiKernel",
    "ExponentialSchedule",
    "GlobalAllocation",
    "GradientScore",
    "GradientSync",
    "GradualSchedule",
    "LampAllocation",
    "LayerSparsity",
    "LinearSchedule",
    "MaskHolder",
    "MaskMismatchError",
    "Movement",
    "NonFiniteError",
    "OneShotSchedule",
    "Pattern",
    "Permutations",
    "Piece",
    "PolynomialSchedule",
    "Prunable",
    "PruneReport",
    "Pruner",
    "Random",
    "RoundsSchedule",
    "Rows",
    "Schedule",
    "Score",
    "Selection",
    "TableAllocation",
    "Taylor",
    "UniformAllocation",
    "WeightMismatchError",
    "compare_replicas",
    "find_permutations",
    "find_prunable",
    "magnitude",
    "permute_channels",
]
