"""docs/scaling.md, of what `scaling.py` measured."""

from __future__ import annotations

from typing import Any

from link_model import Sample, errors, fit, samples
from markdown import origins, table
from plots import curves

HEAD = """# Scaling

How an update and a training step depend on ranks, weights, links and sparsity. Made by `benchmarks/page.py` from what
`benchmarks/scaling.py` measured.
"""


def scaling(found: dict[str, Any]) -> str:
    """docs/scaling.md."""
    parts = {name: part["figures"] for name, part in found["parts"].items()}
    lines = [HEAD, f"{origins(found['parts'])}.\n", "## An update over ranks\n"]
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
        "\nThe other half of an update, in which masks are cut and fingerprinted and weights and momentum zeroed,\n"
        "each replica does for itself, and the ranks of one machine share its memory. Of shards (FSDP2) each rank\n"
        "does its own part alone.\n",
        "## What an update sends\n",
        "Of shards on two ranks, collectives of one update and the bytes handed to them:\n",
        *table(
            "weights | collectives | bytes",
            [f"{int(m) * 10**6:,} | {one['collectives']} | {one['bytes']:,}" for m, one in parts["traffic"].items()],
        ),
        "",
    ]
    return "\n".join([*lines, *links(parts["links"])])


def links(found: dict[str, Any]) -> list[str]:
    """The model of step time, and what it says of other clusters."""
    measured = samples(found)
    model = fit(measured)
    left_out = errors(measured)
    rows = [
        f"{one.gbit:g} | {one.sparsity:g} | {one.ms:.0f} | {model(one):.0f} | {100 * error:+.0f} %"
        for one, error in zip(measured, left_out, strict=True)
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
    weights, compute = 25.6e6, 300.0
    nodes, wires, sparse = (2, 4, 8, 16), (0.2, 1.0, 10.0), (0.8, 0.9, 0.95)
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
        "    step = compute + max(wire * sent * 32 bits / rate, each * sent + all * weights)\n"
        "    sent = 2 (n - 1) / n * kept\n",
        f"Fitted to steps of {found[next(iter(found))]['weights']:,} weights between two hosts: compute "
        f"{model.compute:.0f} ms, wire {model.wire:.2f}, each {model.each:.2f} and all\n{model.all:.2f} ms a million; "
        "`all` counts where something is pruned. Errors are those at a measurement of a model that was fitted to the\n"
        f"others: at most {100 * max(map(abs, left_out)):.0f} %. The second term is seen on fast links only.\n",
        *table("Gbit/s | sparsity | measured, ms | model, ms | error", rows),
        f"\n![Milliseconds a step by sparsity, measured and by the model]({picture})\n",
        f"What it says of ResNet-50 ({weights:,.0f} weights) with {compute:.0f} ms of compute a step: so many times as "
        "fast as dense, by\nnodes with one link each:\n",
        *table(f"Gbit/s | sparsity | {' | '.join(f'{count} nodes' for count in nodes)}", guesses),
        "\n`python benchmarks/link_model.py --weights 25.6e6 --sparsity 0.9 --nodes 4 --gbit 10 --compute-ms 300` "
        "answers for other figures.\n",
        "**Limits.** Two hosts of one core each, gloo, float32, one thread that packs and trains: on GPUs handling\n"
        "takes other times, and with more cores the exchange hides behind the backward pass, so that only what does\n"
        "not fit there counts. More than two nodes are the arithmetic of a ring and were not measured; latencies of\n"
        "many small buckets and links that are shared are left out.\n",
    ]
