"""The workspace of Weights & Biases in which runs are looked at, as code: `distprune dashboard`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distprune.errors import ConfigError
from distprune.training.folder import Folder

NAME = "distprune"
STEP = "trainer/step"
INSTALL = "pip install 'distprune[wandb]'"


def dashboard(entity: str | None, project: str, save_to: str | None, as_json: bool) -> None:
    """Make the workspace at W&B and print its address; or write it to a file, or print it, which needs no network.

    Raises:
        ConfigError: wandb-workspaces is not installed; W&B is not logged in to, cannot be reached or refuses it; or the
            file cannot be written.
    """
    if as_json or save_to is not None:
        text = json.dumps(view(entity or "", project), indent=2)
        if as_json:
            print(text)
        if save_to is not None:
            _write(Path(save_to), text + "\n")
            print(f"written to {save_to}", file=sys.stderr)
        return
    print(_save(entity, project))


def view(entity: str, project: str) -> dict[str, Any]:
    """What W&B is told of the workspace, as JSON values."""
    described: dict[str, Any] = json.loads(workspace(entity, project)._to_model().model_dump_json(by_alias=True))
    return described


def workspace(entity: str, project: str) -> Any:
    """The workspace: sections of panels, all figures over trainer/step, runs beside each other at the end."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ConfigError(f"distprune dashboard takes wandb-workspaces: {INSTALL}") from None

    def line(title: str, *names: str, **options: Any) -> Any:
        return wr.LinePlot(title=title, x=STEP, y=list(names), **options)

    def lines(title: str, pattern: str, **options: Any) -> Any:
        return wr.LinePlot(**{"title": title, "x": STEP, "metric_regex": pattern, **options})

    def section(name: str, *panels: Any) -> Any:
        return ws.Section(name=name, panels=list(panels), is_open=True)

    def column(name: str, metric: Any, **options: Any) -> Any:
        return wr.ParallelCoordinatesPlotColumn(metric, display_name=name, **options)

    accuracy, sparsity = wr.SummaryMetric("eval/top1"), wr.SummaryMetric("prune/sparsity")
    hours = {"x": "RelativeTime(Process)"}
    return ws.Workspace(
        name=NAME,
        entity=entity,
        project=project,
        settings=ws.WorkspaceSettings(x_axis=STEP),
        auto_generate_panels=True,  # so that histograms, tables and what is logged later are there too
        sections=[
            section(
                "progress",
                lines("loss", "train/loss.*"),
                line("training accuracy, %", "train/top1"),
                line("learning rate", "train/lr"),
                line("gradient norm", "train/grad_norm", log_y=True),
                line("samples/s", "train/samples_per_s"),
            ),
            section(
                "sparsity",
                line("asked for and reached", "prune/target_sparsity", "prune/sparsity", range_y=(0.0, 1.0)),
                line("threshold", "prune/threshold"),
                line("newly pruned", "prune/newly_pruned"),
                line("time of an update, ms", "prune/update_ms"),
                line("rounds", "prune/round", "guard/accepted"),
            ),
            section(
                "sparsity by layer",
                lines("sparsity by layer", "prune/layer/.*", range_y=(0.0, 1.0)),
                wr.WeavePanelSummaryTable(table_name="layers/final"),
            ),
            section(
                "accuracy",
                line("accuracy and that of the dense model, %", "eval/top1", "dense/top1"),
                lines("accuracy on each set, %", "eval/(.+/)?top1"),
                lines("loss on each set", "eval/(.+/)?loss"),
                line("points below the dense model", "guard/drop"),
            ),
            section("channels", line("parameters left", "params/left"), line("multiply-accumulates left", "macs/left")),
            section(
                "system",
                lines("GPU, %", r"system/gpu\.\d+\.gpu", **hours),
                lines("GPU memory, %", r"system/gpu\.\d+\.memoryAllocated", **hours),
                lines("CPU, %", r"system/cpu", **hours),
                lines("memory of the process, MB", r"system/proc\.memory\.rssMB", **hours),
            ),
            section(
                "comparison over runs",
                wr.ScatterPlot(title="accuracy against sparsity", x=sparsity, y=accuracy),
                wr.ParallelCoordinatesPlot(
                    title="settings and results",
                    columns=[
                        column("sparsity asked for", wr.Config("prune.sparsity")),
                        column("schedule", wr.Config("prune.schedule")),
                        column("allocation", wr.Config("prune.allocation")),
                        column("seed", wr.Config("run.seed")),
                        column("sparsity", sparsity),
                        column("points lost", wr.SummaryMetric("eval/top1_drop"), inverted=True),
                        column("accuracy", accuracy),
                    ],
                ),
                wr.BarPlot(title="final accuracy, %", metrics=["eval/top1"], max_bars_to_show=20),
                wr.RunComparer(diff_only=True),
            ),
        ],
    )


def _save(entity: str | None, project: str) -> str:
    """Make it at W&B; its address."""
    import wandb

    from distprune.tracking.wandb import has_key, unreachable

    offline = "`--json` or `--save-to FILE.json` needs neither"
    if not has_key():
        raise ConfigError(f"distprune dashboard: there is no API key of W&B; run `wandb login` first. {offline}")
    if (why := unreachable()) is not None:
        raise ConfigError(f"distprune dashboard: {why}; run it where there is a network. {offline}")
    try:
        owner = entity or wandb.Api().default_entity
        made = workspace(owner, project)
        made.save()
        return str(made.url)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"distprune dashboard: W&B refuses the workspace of {entity or 'you'}/{project}: {error}; is there such a "
            "project, and may you write to it? It is made by the first run, see tracking.wandb.project and entity"
        ) from None


def _write(path: Path, text: str) -> None:
    try:
        with Folder(path.parent).into_place(path.name) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save-to: cannot write {path}: {error.strerror}") from None
