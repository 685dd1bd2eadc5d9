"""The command `distprune`. Heavy imports stay inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

STOPPED_EARLY = 75
"""The exit code of what was stopped and goes on when it is called again (EX_TEMPFAIL)."""
SPARSITIES = "0.5,0.7,0.8,0.9,0.95,0.98,0.99"
OVERRIDES: dict[str, Any] = {"nargs": "*", "metavar": "section.key=value", "help": "settings that replace the file's"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 the command line or configuration is wrong, 75
    stopped where the same command goes on, 130 stopped otherwise."""
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    words, rest = parser.parse_known_args(argv)
    # argparse takes overrides only where they stand in one piece.
    if any(word.startswith("-") for word in rest) or (rest and "config" not in words):
        words.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    words.overrides += rest
    words.typed = argv[1:]
    try:
        with _signals_raise():
            return int(words.run(words))
    except KeyboardInterrupt:
        goes_on = words.run is _validate
        if int(os.environ.get("RANK", 0)) == 0:
            more = "; the same command goes on" if goes_on else ""
            print(f"distprune: stopped by a signal{more}", file=sys.stderr)
        return STOPPED_EARLY if goes_on else 130


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that it ends its own processes and leaves nothing half written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Exact(argparse.ArgumentParser):
    """Takes no abbreviations: --sub must not submit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def _parser() -> argparse.ArgumentParser:
    parser = _Exact(
        prog="distprune",
        description="Prune neural networks while they train, on many GPUs at once.",
        epilog="On several GPUs or nodes: accelerate launch -m distprune.train CONFIG.yaml",
    )
    parser.add_argument("--version", action="version", version=f"distprune {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Exact)

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int],
        what: str,
        takes: str = "config",
        of: str = "a YAML file, see configs/",
        epilog: str | None = None,
        more: dict[str, Any] = OVERRIDES,
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, epilog=epilog)
        command.add_argument("config", metavar=takes, help=of)
        command.add_argument("overrides", **more)
        command.set_defaults(run=run, parser=command)
        return command

    add("train", _train, "train and prune in this process")
    add("plan", _plan, "show what a run would do, and doubts about it")
    add(
        "evaluate",
        _evaluate,
        "count the accuracy of a run's weights, or a configuration's",
        takes="target",
        of="a run folder, or a YAML file whose model.weights are evaluated",
    )
    analyze = add(
        "analyze",
        _analyze,
        "what a run has brought: zeros, work, sizes, latency, accuracy",
        takes="run",
        of="the folder of a finished run",
        epilog="See docs/analysis.md.",
    )
    analyze.add_argument("--batch-sizes", default="1,64", metavar="N,N,...", help="of latency (default 1,64)")
    analyze.add_argument("--threads", type=int, metavar="N", help="that compute on the CPU (default: as torch does)")
    analyze.add_argument("--seconds", type=float, default=2.0, metavar="S", help="per form and batch size (default 2)")
    analyze.add_argument("--json", action="store_true", help="print JSON in place of tables")
    export = add(
        "export",
        _export,
        "write a run's model in another form, and check it",
        takes="run",
        of="the folder of a finished run",
        epilog="See docs/export.md.",
    )
    export.add_argument(
        "--format", required=True, metavar="F", help="safetensors, packed, onnx, torch-export, 2:4 or shrunk"
    )
    export.add_argument("--quantize", choices=["int8"], help="weights and activations in 8 bits; of onnx")
    export.add_argument("--calibration", type=int, default=512, metavar="N", help="samples for that (default 512)")
    export.add_argument("--max-drop", type=float, metavar="P", help="points that int8 and 2:4 may lose (default 0.5)")
    export.add_argument("--out", metavar="DIR", help="folder (default: RUN_DIR/export/FORMAT)")
    add(
        "validate",
        _validate,
        "compare a run's dense and pruned model by set and by class",
        takes="run",
        of="a run folder",
        epilog="With corrupted images too: distprune validate RUN eval.corruptions=true. See docs/validation.md.",
    )
    report = add(
        "report",
        _report,
        "show a run, or several beside each other, on a page of HTML",
        takes="RUN_DIR",
        of="a run folder",
        epilog="See docs/report.md.",
        more={"nargs": "*", "metavar": "RUN_DIR", "help": "more runs, to compare"},
    )
    report.add_argument(
        "--out", metavar="FILE", help="the page (default: RUN_DIR/report.html; of several ./report.html)"
    )
    sensitivity = add(
        "sensitivity",
        _sensitivity,
        "prune each layer alone, and propose a sparsity for each",
        epilog="On several GPUs: accelerate launch -m distprune.cli sensitivity CONFIG. See docs/sensitivity.md.",
    )
    sensitivity.add_argument(
        "--sparsities", default=SPARSITIES, metavar="S,S,...", help=f"at which each is measured (default {SPARSITIES})"
    )
    sensitivity.add_argument("--out", metavar="DIR", help="folder for what is found (default: run.dir-sensitivity)")
    add("prepare", _prepare, "fetch a run's data and weights ahead, where there is a network")
    slurm = add("slurm", _slurm, "check a run and print its batch script, or submit it", epilog="See docs/slurm.md.")
    slurm.add_argument("--nodes", default="1", metavar="N", help="nodes, or a range such as 1-4 (default 1)")
    slurm.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="and so many processes (default 0)")
    slurm.add_argument("--processes-per-node", type=int, metavar="P", help="on nodes without GPUs (default 1)")
    slurm.add_argument("--cpus-per-task", type=int, metavar="C", help="per node (default: 1 + data.workers a process)")
    slurm.add_argument(
        "--time", default="24:00:00", metavar="T", help="of one start (default 24:00:00); a run may take many"
    )
    slurm.add_argument("--partition", metavar="P", help="where it waits")
    slurm.add_argument("--account", metavar="A", help="whose time it takes")
    slurm.add_argument("--name", help="of the job (default: that of the file)")
    slurm.add_argument("--array", metavar="TABLE", help="a table such as configs/grid.yaml, a task per combination")
    slurm.add_argument("--at-once", type=int, metavar="N", help="tasks of the array that may run at a time")
    slurm.add_argument("--launch", metavar="FILE", help="accelerate's configuration (default: launch/multi_node.yaml)")
    slurm.add_argument("--container", metavar="IMAGE", help="run in a container, by pyxis")
    slurm.add_argument("--mounts", metavar="SRC:DST,...", help="of the container (default: the current folder)")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="such as --sbatch=--mem=0")
    slurm.add_argument("--submit", action="store_true", help="submit it")
    board = commands.add_parser("dashboard", help="make the workspace of W&B in which runs are looked at")
    board.add_argument("--entity", metavar="E", help="team or user (default: yours)")
    board.add_argument("--project", default="distprune", metavar="P", help="project (default: distprune)")
    board.add_argument("--save-to", metavar="FILE.json", help="write it to a file instead, without a network")
    board.add_argument("--json", action="store_true", help="print it instead, without a network")
    board.set_defaults(run=_dashboard, parser=board, overrides=[])
    return parser


def _version() -> str:
    from distprune import __version__

    return __version__


def _train(words: argparse.Namespace) -> int:
    from distprune.train import main as train

    return train([words.config, *words.overrides])


def _plan(words: argparse.Namespace) -> int:
    from distprune.analysis.plan import print_plan

    return _answer(lambda: print_plan(words.config, words.overrides), words)


def _evaluate(words: argparse.Namespace) -> int:
    from distprune.analysis.evaluate import print_evaluation

    return _answer(lambda: print_evaluation(words.config, words.overrides), words)


def _analyze(words: argparse.Namespace) -> int:
    from distprune.analysis.analyze import print_analysis

    options = (words.batch_sizes, words.threads, words.seconds, words.json)
    return _answer(lambda: print_analysis(words.config, words.overrides, *options), words)


def _export(words: argparse.Namespace) -> int:
    from distprune.export.export import ExportError, print_export

    options = (words.format, words.quantize is not None, words.calibration, words.max_drop, words.out)
    try:
        return _answer(lambda: print_export(words.config, words.overrides, *options), words)
    except ExportError as error:
        print(f"distprune: {error}", file=sys.stderr)
        return 1


def _validate(words: argparse.Namespace) -> int:
    from distprune.analysis.validate import print_validation

    return _answer(lambda: print_validation(words.config, words.overrides), words)


def _report(words: argparse.Namespace) -> int:
    from distprune.report.page import print_report

    return _answer(lambda: print_report([words.config, *words.overrides], words.out), words)


def _sensitivity(words: argparse.Namespace) -> int:
    from distprune.analysis.sensitivity import print_sensitivity
    from distprune.errors import reason
    from distprune.train import report
    from distprune.training.liveness import is_lost_rank
    from distprune.training.stopping import Stopped

    try:
        return _answer(lambda: print_sensitivity(words.config, words.overrides, words.sparsities, words.out), words)
    except (Stopped, KeyboardInterrupt) as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"distprune: {str(stop) or 'stopped by a signal'}; the same command goes on", file=sys.stderr)
        return STOPPED_EARLY
    except Exception as error:
        if not is_lost_rank(error):
            raise
        report(f"another rank has ended: {reason(error)}; the same command goes on")
        return 1


def _prepare(words: argparse.Namespace) -> int:
    from distprune.cluster.prepare import prepare

    return _answer(lambda: prepare(words.config, words.overrides), words)


def _slurm(words: argparse.Namespace) -> int:
    from distprune.cluster.submit import SubmitError, slurm

    try:
        return _answer(lambda: slurm(words), words)
    except SubmitError as error:
        print(f"distprune: {error}", file=sys.stderr)
        return 1


def _dashboard(words: argparse.Namespace) -> int:
    from distprune.errors import ConfigError

    try:
        from distprune.tracking.dashboard import dashboard

        dashboard(words.entity, words.project, words.save_to, words.json)
    except ConfigError as error:
        print(f"distprune: {error}", file=sys.stderr)
        return 2
    return 0


def _answer(command: Callable[[], None], words: argparse.Namespace) -> int:
    """Run a command that prints its answer; what is wrong with its input goes to stderr."""
    from distprune.errors import ConfigError, remedy

    try:
        command()
    except ConfigError as error:
        from distprune.train import report

        config = f"{words.config}/config.yaml" if os.path.isdir(words.config) else words.config
        report(f"{error}{remedy(error, [config, *words.overrides])}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
