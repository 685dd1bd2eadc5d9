"""docs/scaling.md, of what `scaling.py` measured."""

from __future__ import annotations

from typing import Any

from link_model import Sample, errors, fit, samples
from markdown import table, where
from plots import curves

HEAD = """# Scaling

How an update and a training step depend on ranks, weights, links and sparsity. Made by `benchmarks/page.py` from what
`benchmarks/scaling.py` measured.
"""


def scaling(found: dict[str, Any]) -> str:
    """docs/scaling.md."""
    parts = found["parts"]
    lines = [HEAD, f"{where(found)}.\n", "## An update over ranks\n"]
    updates = []
    for name, one in parts["update"].items():
        faster = f"{one['faster']:.2f} ({one['low']:.2f}-{one['high']:.2f})"
        updates.append(f"{name} | {one['ms']['1']:.0f} | {one['ms']['2']:.0f} | {faster}")
    lines += [
        "Replicas (DDP) share the search for the threshold; each then cuts, fingerprints and zeroes all that it holds. "
        "One thread a\nrank, in turns in one launch:\n",
        *table("model | 1 rank, ms | 2 ranks, ms | faster by", updates),
        "\nWeights that the busiest rank looks at to find the threshold of ResNet-50 (counted, for so many simulated "
        "ranks):\n",
        *table("ranks | weights", [f"{ranks} | {count:,}" for ranks, count in parts["work"].items()]),
        "\nSo with many replicas an update takes what cutting and fingerprinting take, about the half of one rank's. "
        "Shards (FSDP2)\nshare all of it.\n",
        "## What an update sends\n",
        "Of shards on two ranks, collectives of one update and the bytes handed to them:\n",
        *table(
            "weights | collectives | bytes",
            [f"{m},000,000 | {one['collectives']} | {one['bytes']:,}" for m, one in parts["traffic"].items()],
        ),
        "",
    ]
    return "\n".join([*lines, *links(parts["links"])])


def links(found: dict[str, Any]) -> list[str]:
    """The model of step time, and what it says of other clusters."""
    measured = samples(found)
    model = fit(measured)
    rows = [
        f"{one.gbit:g} | {one.sparsity:g} | {one.ms:.0f} | {model(one):.0f} | {100 * (model(one) / one.ms - 1):+.0f} %"
        for one in measured
    ]
    rates = sorted({one.gbit for one in measured})
    lines_of = {
        f"{rate:g} Gbit/s": (
            [(o.sparsity, o.ms) for o in measured if o.gbit == rate],
            [(s / 100, model(Sample(2, rate, s / 100, measured[0].weights))) for s in range(1, 99)],
        )
        for rate in rates
    }
    picture = curves("links", lines_of, "sparsity", "milliseconds a step")
    others = ", ".join(f"{100 * error:.0f} % at {rate:g} Gbit/s" for rate, error in errors(measured).items())
    weights, compute = 25.6e6, 300.0
    nodes, wires, sparse = (2, 4, 8, 16), (1.0, 10.0, 25.0, 100.0), (0.8, 0.9, 0.95)
    guesses = []
    for gbit in wires:
        for sparsity in sparse:
            gains = []
            for count in nodes:
                dense, left = (model(Sample(count, gbit, s, weights), compute) for s in (0.0, sparsity))
                gains.append(f"{dense / left:.2f}")
            guesses.append(f"{gbit:g} | {sparsity:g} | {' | '.join(gains)}")
    return [
        "## A step over links and sparsity\n",
        "Time of a step with `train.gradients=packed` (`benchmarks/link_model.py`):\n",
        "    step = compute + wire * 2 (n - 1) / n * 32 bits * kept / rate + each * kept + all * weights\n",
        f"Fitted to steps of {found[next(iter(found))]['weights']:,} weights between two hosts: compute "
        f"{model.compute:.0f} ms, wire {model.wire:.2f}, each {model.each:.2f} and all\n{model.all:.2f} ms a million. "
        f"Largest error where a rate was left out of the fit: {others}.\n",
        *table("Gbit/s | sparsity | measured, ms | model, ms | error", rows),
        f"\n![Milliseconds a step by sparsity, measured and by the model]({picture})\n",
        f"What it says of ResNet-50 ({weights:,.0f} weights) with {compute:.0f} ms of compute a step: so many times as "
        "fast as dense, by\nnodes with one link each:\n",
        *table(f"Gbit/s | sparsity | {' | '.join(f'{count} nodes' for count in nodes)}", guesses),
        "\n`python benchmarks/link_model.py --weights 25.6e6 --sparsity 0.9 --nodes 4 --gbit 10 --compute-ms 300` "
        "answers for other figures.\n",
        "**Limits.** Two hosts of one core each, gloo, float32, one thread that packs: on GPUs packing and handling\n"
        "take other times, and NCCL overlaps the exchange with the backward pass, so that only what does not fit\n"
        "behind it counts. More than two nodes are the arithmetic of a ring and were not measured; latencies of many\n"
        "small buckets and links that are shared are left out.\n",
    ]
