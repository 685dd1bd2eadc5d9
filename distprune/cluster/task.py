"""What the batch scripts ask: the run folder, then the words for the trainer, each on a line that begins with `task: `.

python -m distprune.cluster.task [--grid TABLE --task N] CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distprune.cluster.grid import read_grid, task_words
from distprune.config import load_config
from distprune.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Print one task; returns 0, or 2 where the configuration or the table is wrong."""
    usage = (
        "sbatch slurm/train.sbatch CONFIG.yaml [section.key=value ...]; slurm/sweep.sbatch TABLE.yaml CONFIG.yaml ..."
    )
    parser = argparse.ArgumentParser(usage=usage, add_help=False)
    parser.add_argument("--grid", help="a YAML table, each combination of its values one task")
    parser.add_argument("--task", type=int, help="which of them, from 0 on")
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(argv)
    if (given.grid is None) != (given.task is None):
        parser.error("--grid and --task go together")
    if given.config is None:
        parser.error("no configuration is given")
    try:
        words = given.overrides
        if given.grid is not None:
            tasks = read_grid(given.grid)
            if not 0 <= given.task < len(tasks):
                raise ConfigError(
                    f"there is no task {given.task}; the table has tasks 0 to {len(tasks) - 1}", source=given.grid
                )
            words = task_words(tasks[given.task], given.grid, given.config, words)
        run_dir = load_config(given.config, words).run.dir or ""
    except ConfigError as error:
        print(f"distprune: {error}", file=sys.stderr)
        return 2
    for word in (Path(run_dir).expanduser(), given.config, *words):
        print(f"task: {word}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
