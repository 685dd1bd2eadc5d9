"""docs/benchmarks.md, docs/scaling.md and plots from benchmarks/results: what was measured, beside what was asked.

python benchmarks/page.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from common import RESULTS
from jobs import ABLATIONS, JOBS, name_of
from markdown import cell, origins, read, table, where
from plots import DOCS, bars
from scaling_page import scaling

NOT_MEASURED = "not measured"
HEAD = """# Benchmarks

Scripts in `benchmarks/` put distprune and what else does the job side by side, in turns, in one run on one machine, and
write `benchmarks/results/*.json`; this page is made of those by `benchmarks/page.py`. Times say little about another
machine; ratios, medians of those within a round, say more. What needs a GPU is run by `benchmarks/gpu.sh`, which also
proves each of its pieces on a CPU (`--dry-run`).
"""
CASES = {
    "pruner-resnet20": ("a loop with `Pruner` at 90 %, update every 100 steps, ResNet-20, batch 128", 1.02),
    "pruner-resnet50": ("the same, update every 10 steps, ResNet-50 at 224, batch 16", 1.02),
    "trainer": ("the main job without pruning, batches in memory", 1.02),
    "pipeline": ("the main job, input pipeline included, beside a loop with torchvision's", 1.05),
    "teacher": ("the main job with a teacher, beside a loop that runs the teacher forward", 1.05),
}


def main() -> None:
    parts = [
        HEAD, section("update", update),
        section("update_xeon", partial(update, title="### The same on another CPU", name="update_xeon")),
        section("step", step), section("start", start), section("gradients", gradients), accuracy(), ablations(), gpu(),
    ]  # fmt: skip
    for name, text in (("benchmarks", "\n".join(parts)), ("scaling", scaling(read("scaling")))):
        path = DOCS / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        print(path)


def section(name: str, written: Callable[[dict[str, Any]], str]) -> str:
    """A part of the page, of what was measured."""
    return written(read(name)) if (RESULTS / f"{name}.json").exists() else ""


def update(
    found: dict[str, Any], title: str = "## An update of the masks", name: str = "update", command: str = ""
) -> str:
    """An update of the masks."""
    rows = []
    for weights, model in found["models"].items():
        for form, one in model["forms"].items():
            ratio = model["ratios"][form]
            told = (
                "{median:#.2g} ({low:#.2g}-{high:#.2g})"
                if ratio["median"] < 1
                else "{median:.1f} ({low:.1f}-{high:.1f})"
            )
            told = told.format(**ratio)
            told = {"update": f"takes {told} reads", "read (sum)": ""}.get(form, told)
            rows.append(f"{weights} | {form} | {one['median_ms']:.1f} | {one['bytes_per_weight']:.2f} | {told}")
    times = {
        weights: {f: one["median_ms"] for f, one in model["forms"].items()}
        for weights, model in found["models"].items()
    }
    picture = bars(name, times, "milliseconds", logarithmic=True)
    lines = [
        f"{title}\n",
        f"`python benchmarks/update.py{command}`: scores, the exact global threshold, masks, weights and one momentum "
        "buffer\nzeroed, masks counted and fingerprinted, by `Pruner.step()` in the last half of a cubic schedule to "
        "90 %; the same\nsparsity by `torch.nn.utils.prune.global_unstructured`, and by concatenation and `kthvalue` "
        "written by hand.\n",
        f"{where(found)}.\n",
        *table("model | form | ms | bytes a weight, beside masks | update is faster by", rows),
        f"\n![Milliseconds of an update and of its peers]({picture})\n",
    ]
    return "\n".join(lines)


def step(found: dict[str, Any], title: str = "## A training step") -> str:
    """What a step costs."""
    rows = []
    for name, (what, asked) in CASES.items():
        if name not in found["cases"]:
            continue
        one = found["cases"][name]
        ratio = f"{one['ratio']:.3f} ({one['low']:.3f}-{one['high']:.3f})"
        rows.append(f"{what} | {one['ours_ms']:.1f} | {one['by_hand_ms']:.1f} | {ratio} | {asked:.2f}")
    lines = [
        f"{title}\n",
        "`python benchmarks/step.py`: beside the same step of a loop written by hand with accelerate, in turns in one "
        "process.\nRatios of times, medians and quartiles; `most` is what was asked for.\n",
        f"{origins(found['cases'])}.\n",
        *table("what | ms | by hand, ms | ratio | most", rows),
    ]
    return "\n".join(lines) + "\n"


def start(found: dict[str, Any]) -> str:
    """The time to the first step."""
    lines = [
        "## Start\n",
        "`python benchmarks/start.py`: from `accelerate launch` to the end of the first step, ResNet-18, two "
        "processes.\n",
        f"{where(found)}.\n",
        f"`distprune.train` {found['ours_s']:.1f} s, a plain script {found['plain_s']:.1f} s: {found['ratio']:.2f} "
        f"times ({found['low']:.2f}-{found['high']:.2f}), asked at most 1.15.\n`distprune --help`: "
        f"{found['help_s']:.2f} s.\n",
    ]
    return "\n".join(lines)


def gradients(found: dict[str, Any]) -> str:
    """What travels between ranks."""
    rows = []
    for sparsity, ways in found["sparsities"].items():
        for way, one in ways.items():
            exchange = f"{one['exchange_ms']:.0f} | {one['exchange_ratio']:.2f}" if "exchange_ms" in one else "|"
            whole = f"{one['mbytes']:.1f} | {one['step_ms']:.0f} | {one['step_ratio']:.2f}"
            rows.append(f"{sparsity} | {way} | {whole} | {exchange}")
    times = {
        f"sparsity {s}": {way: one["step_ms"] for way, one in ways.items()} for s, ways in found["sparsities"].items()
    }
    picture = bars("gradients", times, "milliseconds a step")
    lines = [
        "## Gradients between two hosts\n",
        f"`python benchmarks/gradients.py`: two network namespaces with a link of {found['rate']}, a model of "
        f"{found['weights']:,} weights,\n{found['batch']} samples a rank. `ddp` is DistributedDataParallel by itself, "
        "the others are `GradientSync` ([pruning](pruning.md)). Bytes are\nthe link's. Other links and sparsities: "
        "[scaling](scaling.md).\n",
        f"{where(found)}.\n",
        *table("sparsity | way | MB a step | step, ms | faster by | exchange, ms | faster by", rows),
        f"\n![Milliseconds a step]({picture})\n",
    ]
    return "\n".join(lines)


def accuracy() -> str:
    """Every job that has something to compare with."""
    rows = []
    for name, job in JOBS.items():
        if job.asked is None and job.published is None:
            continue
        path = RESULTS / f"accuracy-{name}.json"
        ours, seconds, origin = NOT_MEASURED, "", ""
        if path.exists():
            found = read(f"accuracy-{name}")
            low, high = found["eval/top1 range"]
            ours = f"{found['eval/top1 mean']:.2f} ({low:.2f}-{high:.2f})"
            ours += f", {len(found['runs'])} seeds" if len(found["runs"]) > 1 else ", one seed"
            seconds = f"{statistics.mean(run['wall_s'] for run in found['runs']):.0f}"
            origin = f"{found['commit']}, {found['machine'].get('gpu', found['machine']['processor'])}"
        published = f"{job.published[0]:.2f}, {job.published[1]}" if job.published else "none"
        asked = "" if job.asked is None else f"{job.asked:.2f}"
        rows.append(f"`{name}` | {published} | {asked} | {ours} | {seconds} | {origin}")
    lines = [
        "## Accuracy\n",
        "`python benchmarks/accuracy.py NAME`; settings are in the configuration that `JOBS` there names, and in the "
        "results. Top-1 in\npercent on the test images, looked at once, of the last step; mean, range and seeds. Jobs "
        "with `short` in their names are\nthe same with fewer epochs, as two CPU cores can do them.\n",
        *table("job | best published | asked | measured | seconds a run | commit, machine", rows),
    ]
    return "\n".join(lines) + "\n"


def ablations() -> str:
    """What each part brings."""
    lines = [
        "## What each part brings\n",
        "Jobs of `benchmarks/accuracy.py` whose names begin with `ablation`: the same pruning, with one thing changed "
        "at a time.\nTop-1 in percent on the test images.\n",
    ]
    for title, (begins, variants) in ABLATIONS.items():
        rows, places = [], list[str]()
        for variant in variants:
            if not (RESULTS / f"accuracy-{name_of(begins, variant)}.json").exists():
                rows.append(f"{variant} | {NOT_MEASURED} | | | | |")
                continue
            found = read(f"accuracy-{name_of(begins, variant)}")
            places.append(where(found))
            low, high = found["eval/top1 range"]
            dense, seconds = (statistics.mean(run[key] for run in found["runs"]) for key in ("dense/top1", "wall_s"))
            accuracies = " | ".join(f"{value:.2f}" for value in (found["eval/top1 mean"], low, high, dense))
            rows.append(f"{variant} | {accuracies} | {len(found['runs'])} | {seconds:.0f}")
        lines += [f"### {title}\n", *[f"{place}.\n" for place in ["; ".join(dict.fromkeys(places))] if place]]
        lines += [*table("variant | mean | lowest | highest | dense | seeds | seconds a run", rows), ""]
    return "\n".join(lines)


def gpu() -> str:
    """What was measured on one."""
    on_gpu = partial(update, title="### An update on a GPU", name="update_gpu", command=" --device cuda")
    parts = [
        section("update_gpu", on_gpu), section("step_gpu", partial(step, title="### A training step on a GPU")),
        section("topologies", topologies), section("two_four", two_four),
    ]  # fmt: skip
    measured = [part for part in parts if part]
    return "\n".join(["## On a GPU\n", *(measured or [f"{NOT_MEASURED.capitalize()}.\n"])])


def topologies(found: dict[str, Any]) -> str:
    """Ways to run the main job."""
    ways = found["ways"]
    rows = [
        f"{way} | {'passed' if one['passed'] else 'failed'} | {one['at_once']} | {cell(one['said'])}"
        for way, one in ways.items()
    ]
    lines = [
        "### Ways of a GPU\n",
        "`python benchmarks/topologies.py`: short runs of the main job, so many of them at once on one GPU, which "
        "therefore say\nlittle of speed.\n",
        f"{origins(ways)}.\n", *table("way | outcome | at once | figures", rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


def two_four(found: dict[str, Any]) -> str:
    """Kernels for 2:4."""
    rows = [
        f"{layer} | {one['dense_ms']:.3f} | {cell(one['cusparselt'])} | {cell(one['cutlass'])}"
        for layer, one in found["layers"].items()
    ]
    lines = [
        "### 2:4\n",
        "`python benchmarks/two_four.py`: linear layers in half precision, by kernels for 2:4 weights; each is "
        "one call from Python.\n",
        f"{where(found)}.\n", *table("layer | dense, ms | cuSPARSELt is faster by | CUTLASS", rows), "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
