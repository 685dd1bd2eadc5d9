"""Batch scripts, all from the template job.sbatch beside this file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

ABOUT_TRAIN = """\
The main job on a SLURM cluster: one launcher per node, requeued until the run is done.

  sbatch [--nodes=2 --gpus-per-node=8 --time=12:00:00 ...] slurm/train.sbatch CONFIG.yaml [section.key=value ...]

Submit from a folder that all nodes share, with the environment active in which distprune is installed. What these lines
ask for can be replaced on the command line of sbatch. docs/slurm.md says what follows what. Rendered from
distprune/cluster/job.sbatch: edit that, then run python -m distprune.cluster.script.
"""
ABOUT_SWEEP = """\
As slurm/train.sbatch, once for each combination of values in a table, each with its own run folder.

  sbatch --array=0-5 [--nodes=2 ...] slurm/sweep.sbatch configs/grid.yaml CONFIG.yaml [section.key=value ...]

Rendered from distprune/cluster/job.sbatch: edit that, then run python -m distprune.cluster.script.
"""
ALWAYS = ("--open-mode=append", "--requeue")
WARNING_SECONDS = 300
PLAIN = ("--job-name=distprune", "--nodes=1", "--time=24:00:00")


def render(
    about: str,
    options: Sequence[str],
    settings: Mapping[str, str] | None = None,
    words: Sequence[str] = (),
    array: bool = False,
    warning: int = WARNING_SECONDS,
) -> str:
    """A batch script.

    Args:
        about: the comment at its head.
        options: of sbatch, such as `--nodes=2`.
        settings: variables that its environment gets.
        words: its arguments; those on its own command line follow them.
        array: whether its first argument is a table of tasks, of which it runs that of its array index.
        warning: seconds before the time limit at which it asks the run to stop.
    """
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        comment_start_string="<#",  # {# is shell
        comment_end_string="#>",
    )
    environment.filters["quote"] = shlex.quote
    template = environment.from_string(files(__package__).joinpath("job.sbatch").read_text(encoding="utf-8"))
    log = f"--output=slurm-{'%A_%a' if array else '%j'}.log"
    return template.render(
        about=about.splitlines(),
        options=[*options, log, *ALWAYS, f"--signal=B:USR1@{warning}"],
        settings=settings or {},
        words=words,
        array=array,
    )


def plain_scripts() -> dict[str, str]:
    """The scripts that lie ready in slurm/, by name."""
    return {
        "train.sbatch": render(ABOUT_TRAIN, PLAIN),
        "sweep.sbatch": render(ABOUT_SWEEP, PLAIN, array=True),
    }


if __name__ == "__main__":
    from pathlib import Path

    for name, text in plain_scripts().items():
        Path("slurm", name).write_text(text, encoding="utf-8")
