"""What the section `prune` of a configuration names, as objects of the library."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from distprune.config.schema import Config, Prune
from distprune.entries import imported
from distprune.errors import ConfigError, reason
from distprune.integrations import hugging_face
from distprune.pruning import (
    NM,
    Allocation,
    Blocks,
    Bounds,
    Columns,
    CosineSchedule,
    CubicSchedule,
    ErdosRenyiKernel,
    ExponentialSchedule,
    GlobalAllocation,
    LampAllocation,
    LinearSchedule,
    Movement,
    Pattern,
    PolynomialSchedule,
    Random,
    Rows,
    Schedule,
    Score,
    TableAllocation,
    Taylor,
    UniformAllocation,
    magnitude,
)
from distprune.pruning.prunable import matching
from distprune.structured import Channels

GRADUAL: dict[str, Callable[[float, int, int, int, float], Schedule]] = {
    "cubic": CubicSchedule,
    "linear": LinearSchedule,
    "exponential": ExponentialSchedule,
    "cosine": CosineSchedule,
}


def make_schedule(prune: Prune, begin: int, end: int) -> Schedule:
    """The gradual schedule that `prune.schedule` names, from optimizer step `begin` to `end`.

    Raises:
        ConfigError: a class of the user's own cannot be made, falls, or does not end with `prune.sparsity`.
    """
    if prune.schedule == "polynomial":
        return PolynomialSchedule(prune.sparsity, begin, end, prune.every, prune.initial, prune.power)
    if prune.schedule in GRADUAL:
        return GRADUAL[prune.schedule](prune.sparsity, begin, end, prune.every, prune.initial)
    make = imported(prune.schedule, "prune.schedule")
    try:
        schedule = make(final=prune.sparsity, begin=begin, end=end, every=prune.every, initial=prune.initial)
        if not isinstance(schedule, Schedule):
            raise TypeError("it needs `final`, `sparsity(step)` and `is_update(step)`")
        levels = [schedule.sparsity(step) for step in range(begin, end + 1) if schedule.is_update(step)]
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"prune.schedule: {prune.schedule} is no schedule: {reason(error)}") from error
    if not levels or levels[-1] != prune.sparsity:
        last = f"{levels[-1]} at its last" if levels else "no"
        raise ConfigError(
            f"prune.schedule: {prune.schedule} has {last} update from step {begin} to {end}; it must end with "
            f"prune.sparsity {prune.sparsity}"
        )
    if levels != sorted(levels):
        raise ConfigError(f"prune.schedule: {prune.schedule} falls; pruned weights stay pruned")
    return schedule


def make_score(config: Config) -> Score:
    """The score that `prune.score` names.

    Raises:
        ConfigError: a function of the user's own cannot be imported.
    """
    known: dict[str, Score] = {
        "magnitude": magnitude,
        "taylor": Taylor(),
        "movement": Movement(),
        "random": Random(config.run.seed),
    }
    name = config.prune.score
    score: Score = known[name] if name in known else imported(name, "prune.score")
    if not isinstance(score, type):
        return score
    try:
        made: Score = score()
    except TypeError as error:
        raise ConfigError(f"prune.score: {name} cannot be made without arguments: {reason(error)}") from error
    return made


def make_allocation(prune: Prune) -> Allocation:
    """The allocation that `prune.allocation` names."""
    if not isinstance(prune.allocation, str):
        return TableAllocation(prune.allocation)
    known: dict[str, Allocation] = {
        "global": GlobalAllocation(),
        "uniform": UniformAllocation(),
        "erk": ErdosRenyiKernel(),
        "lamp": LampAllocation(),
    }
    return known[prune.allocation]


def chosen(prune: Prune, model: nn.Module) -> tuple[list[str], list[str]]:
    """What of a bare model to include and to exclude: as configured, and without heads of models of transformers."""
    pattern = prune.pattern is not None
    return hugging_face.chosen(model, prune.include, prune.exclude, prune.embeddings, pattern=pattern)


def make_pattern(prune: Prune) -> Pattern | None:
    """`prune.pattern`."""
    if prune.pattern in (None, "channels"):
        return None
    assert prune.pattern is not None
    if prune.pattern == "rows":
        return Rows()
    if prune.pattern == "columns":
        return Columns()
    return NM.parse(prune.pattern) if ":" in prune.pattern else Blocks.parse(prune.pattern)


def make_most(prune: Prune, channels: Channels) -> dict[str, float]:
    """The largest share of each group of channels that may go, of `prune.bounds`, whose patterns name what makes them.

    Raises:
        ValueError: a pattern matches nothing.
    """
    makers = {maker: group.name for group in channels.groups for maker in group.makers}
    most: dict[str, float] = {}
    for pattern, limit in prune.bounds.items():
        for maker in matching([pattern], makers, makers):
            most[makers[maker]] = min(limit.max, most.get(makers[maker], 1.0))
    return most


def make_bounds(prune: Prune) -> dict[str, Bounds]:
    """`prune.bounds`."""
    return {pattern: Bounds(limit.min, limit.max) for pattern, limit in prune.bounds.items()}
