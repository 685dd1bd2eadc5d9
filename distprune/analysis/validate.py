"""`distprune validate`: the dense and the pruned model of a finished run side by side, on more sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from distprune.errors import ConfigError
from distprune.tracking import Progress
from distprune.training.checks import check_fit
from distprune.training.devices import is_sharded, make_accelerator
from distprune.training.finished import FinishedRun
from distprune.training.held_out import HeldOut, open_split
from distprune.training.run_folder import RunFolder
from distprune.training.setup import place_frozen
from distprune.training.validation import Figures, validate

WORST = 10
NARROW = 60


def print_validation(path: str, overrides: Sequence[str] = ()) -> None:
    """Compare both models on the sets of a run's configuration, write validation.json anew, print tables.

    Called on all ranks. The same command goes on with the sets that are left where it was interrupted.

    Args:
        path: of the run folder.
        overrides: `section.key=value` words, such as eval.corruptions=true.

    Raises:
        ConfigError: see `FinishedRun`; or what the configuration names is missing, or another process writes there.
    """
    run = FinishedRun(path, overrides)
    config = run.config
    accelerator = make_accelerator(config)
    try:
        train = open_split(config, config.data.train_split, accelerator)
        held_out = HeldOut(config, train, accelerator)

        def ready(model: nn.Module) -> nn.Module:
            placed = place_frozen(model, config, accelerator, is_sharded(accelerator))
            check_fit(placed, held_out.split.first_inputs(), train.outputs, accelerator)
            return placed

        pruned, bare = ready(run.pruned(train)), run.dense(train)
        dense = None if bare is None else ready(bare)
        _claim(run.folder, accelerator)
        about = {"config": config.model_dump(mode="json")}
        (known,) = broadcast_object_list([run.folder.validated_before(about) if accelerator.is_main_process else {}])
        names = [name for name, _ in held_out.sets()]
        progress = Progress(lambda: len(names), unit="set") if accelerator.is_main_process else None

        def show(found: dict[str, Figures]) -> None:
            if progress is not None:
                run.folder.keep_validation(about, found)
                progress.unit = names[len(found) - 1]
                progress.log({"trainer/step": len(found), "eval/top1": found[progress.unit]["pruned"]["top1"]})

        sets = validate(dense, pruned, held_out, accelerator, known=known, keep=show)
        if progress is not None:
            progress.finish(None)
            run.folder.write_validation(sets)
            print_tables(sets, train.what, Console(highlight=False))
            print(f"written to {run.folder.validation}")
    finally:
        run.folder.release()
        if dist.is_initialized():
            dist.destroy_process_group()


def print_tables(sets: dict[str, Figures], what: str, console: Console) -> None:
    """Print accuracy by set, the answers that changed, and the classes that have lost most.

    Args:
        sets: as in validation.json; the first is the evaluation split.
        what: its samples are called.
        console: to print on.
    """
    wide = console.width >= NARROW
    table = _table("Accuracy by set", "set", wide=wide)
    for name, figures in sets.items():
        dense = figures["dense"]
        before = None if dense is None else dense["top1"]
        table.add_row(escape(name), *_cells(figures["samples"], before, figures["pruned"]["top1"], wide))
    console.print(table)
    name, figures = next(iter(sets.items()))
    if figures["dense"] is None:
        console.print("The run has no dense.safetensors, so there is nothing to compare with.")
        return
    unit = "tokens" if not figures["classes"] else what
    changed = figures["samples"] - figures["agree"]
    console.print(
        f"Of {figures['samples']:,} {unit} of {name}, {changed:,} get another answer: {figures['lost']:,} were right "
        f"before, {figures['gained']:,} are right now.",
        markup=False,
    )
    lost = [(one["pruned"] - one["dense"], name, one) for name, found in sets.items() for one in found["classes"]]
    lost = sorted((row for row in lost if row[0] < 0), key=lambda row: row[0])[:WORST]
    if lost:
        table = _table("Classes that lost most", "class", "set", wide=wide)
        for _, name, one in lost:
            table.add_row(escape(one["name"]), escape(name), *_cells(one["samples"], one["dense"], one["pruned"], wide))
        console.print()
        console.print(table)


def _table(title: str, *heads: str, wide: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold", no_wrap=head == "set" and head != heads[0])
    for head in (*(("samples",) if wide else ()), "dense", "pruned", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _cells(samples: int, dense: float | None, pruned: float, wide: bool) -> list[str]:
    """Percent, and points of difference; the number of samples where there is room."""
    before, change = ("-", "-") if dense is None else (f"{dense:.2f}", f"{pruned - dense:+.2f}")
    return [*([f"{samples:,}"] if wide else []), before, f"{pruned:.2f}", change]


def _claim(folder: RunFolder, accelerator: Accelerator) -> None:
    """Let rank 0 take the folder, and every rank know whether it could."""
    faults: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            folder.claim()
        except ConfigError as error:
            faults = [error.faults]
    (found,) = broadcast_object_list(faults)
    if found is not None:
        raise ConfigError(*found)
