"""`distprune export`: write one form of a run's model, and evaluate it in a process of its own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from distprune.config import dump_config
from distprune.entries import near
from distprune.errors import ConfigError
from distprune.export.card import write_card
from distprune.export.formats import FORMATS, write
from distprune.export.loading import FIGURES, read_figures
from distprune.export.source import Source
from distprune.training.finished import FinishedRun
from distprune.training.run_folder import permissions
from distprune.units import in_bytes

TOLERANCES = {"safetensors": 0.0, "packed": 0.0, "shrunk": 1e-5, "onnx": 1e-4, "torch-export": 1e-4}
"""How much logits may differ from the model's, a fraction of the largest; other formats compute in fewer bits."""
MAX_DROP = 0.5
"""Points of top-1 that other formats may lose unless told otherwise."""
BESIDE = ("config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt")
"""What else a run of transformers leaves, by which its folder is a model."""


class ExportError(RuntimeError):
    """An export does not compute what its model does; nothing was kept of it."""


def print_export(
    path: str,
    overrides: Sequence[str],
    form: str,
    int8: bool,
    calibration: int,
    max_drop: float | None,
    out: str | None,
) -> None:
    """Export, check, and print a table.

    Args:
        path: the run folder.
        overrides: see `FinishedRun`.
        form: one of `FORMATS`.
        int8: quantise it.
        calibration: samples for that.
        max_drop: points of top-1 that formats of fewer bits may lose; None for `MAX_DROP`.
        out: the folder; by default RUN_DIR/export/FORMAT.

    Raises:
        ConfigError: lists what is wrong with the arguments, or says why the model does not allow the format.
        ExportError: it was written, and does not compute what the model does.
    """
    run = _checked(path, overrides, form, int8, calibration, max_drop)
    max_drop = MAX_DROP if max_drop is None else max_drop
    name = form.replace(":", "-") + ("-int8" if int8 else "")
    folder = Path(out).expanduser() if out is not None else run.folder.path / "export" / name
    _refuse_others(folder, form, int8)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {folder}: {error.strerror}") from None
    try:
        figures = _export(run, form, int8, calibration, max_drop, partial, [path, *overrides])
        refuse(form, int8, figures, max_drop)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _print(figures, run, folder)


def _refuse_others(folder: Path, form: str, int8: bool) -> None:
    """Refuse to replace what is no export of this form.

    Raises:
        ConfigError: says what is there.
    """
    if not folder.exists():
        return
    if not (folder / FIGURES).exists():
        raise ConfigError(f"--out: {folder} is there and holds no export; choose another")
    there = read_figures(folder)
    if there["format"] != form or ("quantized" in there) != int8:
        kind = there["format"] + " in int8" * ("quantized" in there)
        raise ConfigError(f"--out: {folder} holds an export as {kind}; choose another, or delete it")


def _export(
    run: FinishedRun, form: str, int8: bool, calibration: int, max_drop: float, folder: Path, words: Sequence[str]
) -> dict[str, Any]:
    began = time.perf_counter()
    with tqdm(total=3, desc="reading", bar_format="{desc} |{bar}| {n_fmt}/{total_fmt}", disable=None) as bar:
        source = Source.of(run)
        bar.update()
        bar.set_description("writing")
        about = {"format": form, "outputs": source.train.outputs, **write(source, form, folder, int8, calibration)}
        files = {}
        for file in sorted(folder.iterdir()):
            file.chmod(permissions())
            files[file.name] = file.stat().st_size
        (folder / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
        if form == "safetensors":
            for pattern in BESIDE:
                for file in run.folder.path.glob(pattern):
                    shutil.copy(file, folder / file.name)
        (folder / FIGURES).write_text(json.dumps(about), encoding="utf-8")
        bar.update()
        bar.set_description("checking")
        checked = _in_a_fresh_process(folder, words)
        bar.update()
    dense = run.folder.dense
    figures = {
        **about,
        "files": files,
        "bytes": sum(files.values()),
        "pruned_bytes": run.folder.model.stat().st_size,
        "dense_bytes": dense.stat().st_size if dense.exists() else run.folder.model.stat().st_size,
        **checked,
        "seconds": time.perf_counter() - began,
    }
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    options = f" --quantize int8 --calibration {calibration}" if int8 else ""
    if int8 or form not in TOLERANCES:
        options += f" --max-drop {max_drop:g}"
    command = f"distprune export {shlex.join(words)} --format {form}{options}"
    (folder / "README.md").write_text(write_card(source, form, int8, figures, command), encoding="utf-8")
    return figures


def _in_a_fresh_process(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "distprune.export.check", str(folder), *words],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,  # Ctrl-C is for this process, which ends the other
    )
    if ended.returncode != 0:
        raise ExportError(f"the export cannot be run in a process of its own (exit code {ended.returncode}, see above)")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def refuse(form: str, int8: bool, figures: Mapping[str, Any], max_drop: float) -> None:
    """Refuse an export that is another model.

    Raises:
        ExportError: logits differ by more than the format explains, or top-1 by more than `max_drop` points.
    """
    lost = figures["original_top1"] - figures["top1"]
    if (int8 or form not in TOLERANCES) and lost > max_drop:
        raise ExportError(
            f"the export loses {lost:.2f} points of top-1, more than --max-drop {max_drop:g}; nothing was kept"
            f"{'; more --calibration samples may help' if int8 else ''}"
        )
    if int8 or form not in TOLERANCES:
        return
    allowed = TOLERANCES[form] * max(1.0, figures["largest"])
    if not figures["max_difference"] <= allowed:
        raise ExportError(
            f"the logits of the export differ by {figures['max_difference']:.2g} from the model's, more than "
            f"{allowed:.2g}; nothing was kept"
        )


def _print(figures: Mapping[str, Any], run: FinishedRun, folder: Path) -> None:
    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "dense", "pruned", "this export"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    table.add_row(
        "top-1, %", f"{run.summary['dense/top1']:.2f}", f"{figures['original_top1']:.2f}", f"{figures['top1']:.2f}"
    )
    table.add_row("loss", "", *(_loss(figures[key]) for key in ("original_loss", "loss")))
    table.add_row("size", *(in_bytes(figures[key]) for key in ("dense_bytes", "pruned_bytes", "bytes")))
    share = figures["bytes"] / figures["dense_bytes"]
    table.add_row(
        "of dense", "", f"{100 * figures['pruned_bytes'] / figures['dense_bytes']:.1f} %", f"{100 * share:.1f} %"
    )
    console.print(table)
    console.print(
        f"Checked in a process of its own on {figures['samples']:,} samples: the largest difference of a logit is "
        f"{figures['max_difference']:.2g} (of {figures['largest']:.3g}), and {100 * figures['agree']:.2f} % have the "
        "same first class.",
        markup=False,
    )
    if (left := figures.get("dense")) and figures["format"] == "2:4":
        console.print(f"{len(left)} layers stay dense; {FIGURES} says why.", markup=False)
    files = [*figures["files"], "config.yaml", "README.md", FIGURES]
    console.print(f"\n{folder}: {', '.join(files)}", soft_wrap=True, markup=False)


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _checked(
    path: str, overrides: Sequence[str], form: str, int8: bool, calibration: int, max_drop: float | None
) -> FinishedRun:
    faults = []
    if form not in FORMATS:
        faults.append(f"--format: no format {form!r}{near(form, list(FORMATS))}")
    if int8 and form != "onnx" and form in FORMATS:
        faults.append(f"--quantize: int8 goes with --format onnx, not with {form}")
    if max_drop is not None and form in TOLERANCES and not int8:
        faults.append(f"--max-drop: is for formats of fewer bits; {form} must compute what its model does")
    if calibration < 1:
        faults.append(f"--calibration: takes one sample at least, got {calibration}")
    if max_drop is not None and not max_drop >= 0:
        faults.append(f"--max-drop: takes points, 0 or more, got {max_drop:g}")
    if faults:
        raise ConfigError(*faults)
    run = FinishedRun(path, overrides)
    if form == "2:4" and run.config.prune.pattern not in ("2:4", "1:4"):
        raise ConfigError(
            f"--format: 2:4 takes weights of which two of four are zero, and {path} pruned "
            f"{run.config.prune.pattern or 'single weights'}; prune.pattern=2:4 prunes so"
        )
    return run
