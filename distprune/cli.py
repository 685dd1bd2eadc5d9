"""The command `distprune`. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

OVERRIDES: dict[str, Any] = {"nargs": "*", "metavar": "section.key=value", "help": "settings that replace the file's"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 the command line or configuration is wrong."""
    parser = _parser()
    words = parser.parse_args(argv)
    return int(words.run(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distprune",
        description="Prune neural networks while they train, on many GPUs at once.",
        epilog="On several GPUs or nodes: accelerate launch -m distprune.train CONFIG.yaml",
    )
    parser.add_argument("--version", action="version", version=f"distprune {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train and prune in this process")
    train.add_argument("config", help="a YAML file, see configs/")
    train.add_argument("overrides", **OVERRIDES)
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="show what a run would do, and doubts about it")
    plan.add_argument("config", help="a YAML file, see configs/")
    plan.add_argument("overrides", **OVERRIDES)
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser("evaluate", help="count the accuracy of a run's weights, or a configuration's")
    evaluate.add_argument("target", help="a run folder, or a YAML file whose model.weights are evaluated")
    evaluate.add_argument("overrides", **OVERRIDES)
    evaluate.set_defaults(run=_evaluate)
    return parser


def _version() -> str:
    from distprune import __version__

    return __version__


def _train(words: argparse.Namespace) -> int:
    from distprune.train import main as train

    return train([words.config, *words.overrides])


def _plan(words: argparse.Namespace) -> int:
    from distprune.analysis.plan import print_plan

    return _answer(lambda: print_plan(words.config, words.overrides))


def _evaluate(words: argparse.Namespace) -> int:
    from distprune.analysis.evaluate import print_evaluation

    return _answer(lambda: print_evaluation(words.target, words.overrides))


def _answer(command: Callable[[], None]) -> int:
    """Run a command that prints its answer; what is wrong with its input goes to stderr."""
    from distprune.errors import ConfigError

    try:
        command()
    except ConfigError as error:
        print(f"distprune: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
