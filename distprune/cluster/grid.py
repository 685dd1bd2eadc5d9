"""A table of settings, each combination one task of a job array.

    prune.sparsity: [0.8, 0.9, 0.95]
    run.seed: [0, 1]

has six tasks, in this order: (0.8, 0), (0.8, 1), (0.9, 0), ...
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from distprune.config import load_config
from distprune.config.load import read_mapping
from distprune.errors import ConfigError

LONGEST_NAME = 200


@dataclass(frozen=True)
class Task:
    """One run of an array.

    Args:
        name: of its folder, below the run folder of the configuration.
        words: `section.key=value`, one per column of the table.
    """

    name: str
    words: tuple[str, ...]


def read_grid(path: str) -> list[Task]:
    """The tasks of a table, in order.

    Raises:
        ConfigError: the file cannot be read, is no table, or has two tasks that are the same.
    """
    values, _, faults = read_mapping(Path(path), "the table", "a table is a mapping of settings to lists of values")
    if values and all(isinstance(column, dict) for column in values.values()):
        raise ConfigError("this is a configuration; the table comes before it", source=path)
    if "run.dir" in values:
        faults.append("run.dir: each task has its own below run.dir of the configuration; leave it out")
    faults += [
        f"{key}: expected a list of values, such as [0.8, 0.9], got {column!r}"
        for key, column in values.items()
        if not isinstance(column, list) or not column
    ]
    if not values:
        faults.append("the table is empty; give settings with lists of values, such as prune.sparsity: [0.8, 0.9]")
    if faults:
        raise ConfigError(*faults, source=path)
    columns = [[f"{key}={_flow(value)}" for value in column] for key, column in values.items()]
    tasks = [Task(",".join(words).replace("/", "_"), words) for words in itertools.product(*columns)]
    names = [task.name for task in tasks]
    if long := [name for name in names if len(name.encode()) > LONGEST_NAME]:
        raise ConfigError(f"a task would be called {long[0][:80]}..., too long for a folder", source=path)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"several tasks are called {twice[0]}; leave one out", source=path)
    return tasks


def task_words(task: Task, grid: str, path: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of one task: those given, its own, its run folder, and its group at W&B where none is named.

    Args:
        task: of the table `grid`.
        grid: the table's path.
        path, overrides: see `load_config`.

    Raises:
        ConfigError: the configuration is wrong.
    """
    words = [*overrides, *task.words]
    config = load_config(path, words)
    words.append(f"run.dir={_flow(f'{config.run.dir}/{task.name}')}")
    if config.tracking.wandb.group is None:
        words.append(f"tracking.wandb.group={Path(path).stem}-{Path(grid).stem}")
    return words


def _flow(value: object) -> str:
    """A value in YAML, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
