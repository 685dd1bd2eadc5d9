"""Log files, one per rank; warnings of rank 0 also reach the terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

logger = logging.getLogger("distprune")


def log_path(folder: Path, rank: int) -> Path:
    """The log file of a rank."""
    return folder / f"rank-{rank:05d}.log"


def log_to_file(folder: Path, rank: int) -> None:
    """Write everything this rank logs to its file in `folder`, each line with its rank."""
    # A full disk loses lines of the log and nothing else.
    logging.raiseExceptions = False
    folder.mkdir(parents=True, exist_ok=True)
    form = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    file = logging.FileHandler(log_path(folder, rank), mode="a", encoding="utf-8")
    file.setFormatter(form)
    for earlier in list(logger.handlers):
        logger.removeHandler(earlier)
        earlier.close()
    logger.setLevel(logging.INFO)
    logger.addHandler(file)
    logger.propagate = False
    if rank == 0:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("distprune: %(message)s"))
        logger.addHandler(terminal)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [file]
