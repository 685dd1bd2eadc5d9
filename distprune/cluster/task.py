"""What the batch scripts ask: the run folder, then the words for the trainer, one a line.

python -m distprune.cluster.task [--grid TABLE --task N] CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distprune.cluster.grid import task_words
from distprune.config import load_config
from distprune.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Print one task; returns 0, or 2 where the configuration or the table is wrong."""
    parser = argparse.ArgumentParser(prog="distprune.cluster.task")
    parser.add_argument("--grid", help="a YAML table, each combination of its values one task")
    parser.add_argument("--task", type=int, help="which of them, from 0 on")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(argv)
    try:
        words = given.overrides
        if given.grid is not None:
            words = task_words(given.grid, given.task, given.config, words)
        run_dir = load_config(given.config, words).run.dir
    except ConfigError as error:
        print(f"distprune: {error}", file=sys.stderr)
        return 2
    print(run_dir, given.config, *words, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
