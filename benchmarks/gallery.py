"""Three real runs, each trained, exported, analysed and reported; docs/gallery.md with pictures of their reports.

    python benchmarks/gallery.py --data FOLDER --models FOLDER --out FOLDER

FOLDER of --data holds mnist/*.parquet and cifar10/*.parquet, that of --models resnet20-12fca82f.th and
resnet56-4bfd9763.th. The runs are short ones for two CPU cores, about a quarter of an hour in all: they show what a
run leaves, not how good it gets. Runs, exports and figures that are in --out already are not made again. Pictures take
a Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import commit, machine, run, write

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "gallery"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
JOBS: dict[str, dict[str, Any]] = {
    "mnist_lenet300": {
        "title": "LeNet-300-100 on MNIST, 98 % of the weights gone",
        "data": "mnist",
        "overrides": ["phases={dense: {epochs: 4, lr: 0.1}, prune: {epochs: 8, lr: 0.1, schedule: constant}, "
                      "finetune: {epochs: 6, lr: 0.1}}", "prune.every=50"],
        "exports": [["packed"], ["onnx"], ["onnx", "--quantize", "int8"]],
    },
    "cifar10_resnet20": {
        "title": "ResNet-20 on CIFAR-10, 90 % of the weights gone",
        "data": "cifar10",
        "weights": "resnet20-12fca82f.th",
        "overrides": ["phases.prune={steps: 500, lr: 0.02, schedule: constant, warmup_steps: 20}",
                      "phases.finetune={steps: 300, lr: 0.02}", "prune.every=10", "eval.every=200",
                      "eval.corruptions=true"],
        "exports": [["packed"], ["onnx"], ["onnx", "--quantize", "int8"]],
    },
    "cifar10_channels": {
        "title": "ResNet-56 on CIFAR-10, half of the multiply-accumulates gone",
        "data": "cifar10",
        "weights": "resnet56-4bfd9763.th",
        "overrides": ["phases.prune={steps: 200, lr: 0.02, schedule: constant, warmup_steps: 20}",
                      "phases.finetune={steps: 200, lr: 0.02}", "prune.every=10", "eval.every=200",
                      "prune.allocation=uniform", "prune.channels.multiple=8"],
        "exports": [["onnx"], ["onnx", "--quantize", "int8"]],
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "models", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    words = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"there is none of {', '.join(BROWSERS)} to take pictures with")
    PICTURES.mkdir(exist_ok=True)
    found = {name: make(name, job, words.data, words.models, words.out) for name, job in JOBS.items()}
    for name in JOBS:
        take_picture(browser, words.out / name / "report.html", PICTURES / f"{name}.png")
    write("gallery", {"machine": machine(), "commit": commit(), "runs": found})
    (ROOT / "docs" / "gallery.md").write_text(page(found), encoding="utf-8")


def make(name: str, job: dict[str, Any], data: Path, models: Path, out: Path) -> dict[str, Any]:
    """One run with its exports, analysis and report; its figures."""
    folder = out / name
    where = ["data.source=parquet", f"data.path={data / job['data']}"]
    if "weights" in job:
        where.append(f"model.weights={models / job['weights']}")
    run(ROOT / "configs" / f"{name}.yaml", folder, [*where, *job["overrides"]])
    exports = {}
    for form in job["exports"]:
        figures = folder / "export" / ("onnx-int8" if "int8" in form else form[0]) / "figures.json"
        if not figures.exists():
            distprune("export", str(folder), "--format", *form)
        exports[figures.parent.name] = json.loads(figures.read_text(encoding="utf-8"))
    if not (folder / "analysis.json").exists():
        distprune("analyze", str(folder), "run.compile=true")
    distprune("report", str(folder))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    analysis = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    kept = ("top1", "original_top1", "loss", "bytes", "dense_bytes", "max_difference", "largest", "agree", "samples")
    return {
        "title": job["title"],
        "overrides": job["overrides"],
        **{key: summary[key] for key in ("dense/top1", "eval/top1", "prune/sparsity", "steps", "wall_s", "versions")},
        "exports": {form: {key: figures[key] for key in kept} for form, figures in exports.items()},
        "totals": analysis["totals"],
        "sizes": analysis["sizes"],
        "latency": analysis["latency"],
        "words": [sentence.replace(str(folder), f"runs/{name}") for sentence in analysis["words"]],
    }


def distprune(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "distprune.cli", *words], check=True)


def take_picture(browser: str, report: Path, picture: Path) -> None:
    """The first screens of a report."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        "--window-size=1280,1700",
        "--virtual-time-budget=9000",
    ]
    subprocess.run(
        [browser, *options, f"--screenshot={picture.resolve()}", report.resolve().as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )


def page(found: dict[str, dict[str, Any]]) -> str:
    """The text of docs/gallery.md."""
    parts = [
        "# Gallery\n",
        "Three short runs on two CPU cores, made by `benchmarks/gallery.py` with real data; they show what a run "
        "leaves, not how good it gets.\nFigures: `benchmarks/results/gallery.json`.\n",
    ]
    for name, done in found.items():
        parts.append(f"## {done['title']}\n")
        parts.append(
            f"`configs/{name}.yaml`, {done['steps']:,} steps in {done['wall_s']:.0f} s: {done['dense/top1']:.2f} -> "
            f"{done['eval/top1']:.2f} %.\n"
        )
        rows = []
        for form, figures in done["exports"].items():
            share, differs = figures["bytes"] / figures["dense_bytes"], figures["max_difference"] / figures["largest"]
            rows.append(
                f"| {form} | {figures['top1']:.2f} | {figures['bytes']:,} | {share:.3f} | {differs:.1e} | "
                f"{100 * figures['agree']:.2f} |"
            )
        head = [
            "| export | top-1, % | bytes | of dense | logits differ by | same class, % |",
            "|---|---|---|---|---|---|",
        ]
        parts.append("\n".join([*head, *rows]) + "\n")
        parts.append(
            "`distprune analyze` says:\n\n" + "\n".join(f"> {sentence}\n>" for sentence in done["words"])[:-2] + "\n"
        )
        parts.append(f"![The report of this run](gallery/{name}.png)\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
