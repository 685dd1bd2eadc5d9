"""Plain words about what pruning a model has brought: what got smaller, what got faster, what did not and why."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from distprune.analysis.latency import Timing
from distprune.units import in_bytes

UNSTEADY = 1.5
"""Ratios of times that differ so much between rounds say nothing."""


def in_words(
    run: str,
    pattern: str | None,
    totals: Mapping[str, Mapping[str, int]],
    sizes: Mapping[str, int],
    timings: Sequence[Timing],
    accuracy: Mapping[str, Any] | None,
) -> list[str]:
    """Sentences, the most important first.

    Args:
        run: the folder, for commands.
        pattern: `prune.pattern`.
        totals: of the model, dense and pruned: parameters, nonzero, macs, effective_macs.
        sizes: bytes by form; "dense" may be missing.
        timings: of all forms, devices and batches.
        accuracy: of the evaluation split, dense and pruned; see `distprune.training.validation`.
    """
    return [
        *_smaller(run, totals, sizes),
        *_faster(run, pattern, totals, timings),
        *_accuracy(accuracy),
    ]


def _smaller(run: str, totals: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int]) -> list[str]:
    dense, pruned = totals["dense"], totals["pruned"]
    words = []
    if pruned["parameters"] < dense["parameters"]:
        words.append(
            f"The model has {_share(pruned['parameters'], dense['parameters'])} of the parameters and "
            f"{_share(pruned['macs'], dense['macs'])} of the multiply-accumulates, and its file is as much smaller."
        )
    packed, whole = sizes["packed"], sizes.get("dense", sizes["pruned"])
    if packed < 0.9 * sizes["pruned"]:
        words.append(
            f"The file of the weights stores zeros like any number ({in_bytes(sizes['pruned'])}); packed it takes "
            f"{in_bytes(packed)}, {_share(packed, whole)} of dense: distprune export {shlex.quote(run)} --format "
            "packed."
        )
    elif pruned["parameters"] == dense["parameters"]:
        words.append("Nothing got smaller: too few weights are zero for a bitmask to pay.")
    return words


def _faster(
    run: str, pattern: str | None, totals: Mapping[str, Mapping[str, int]], timings: Sequence[Timing]
) -> list[str]:
    if timings and not any(timing.form == "dense" for timing in timings):
        return [f"The dense model was not kept ({run}/dense.safetensors), so no time is compared with its."]
    words = []
    for device in dict.fromkeys(timing.device for timing in timings):
        own = [timing for timing in timings if timing.device == device]
        shrunk = [timing for timing in own if timing.form == "shrunk"]
        masked = [timing for timing in own if timing.form == "masked"]
        if shrunk:
            words.append(_of_shrunk(device, shrunk, totals))
        if masked and not shrunk:
            words.append(_of_masked(device, masked, pattern, totals))
        for timing in max_batch(own):
            if not timing.form.startswith("dense") and timing.form not in ("masked", "shrunk") and timing.verdict:
                words.append(
                    f"On {device} {timing.form} is {_times(timing)} dense at batch {timing.batch}{_beside(timing)}."
                )
    return words


def _of_shrunk(device: str, shrunk: Sequence[Timing], totals: Mapping[str, Mapping[str, int]]) -> str:
    fewer = totals["dense"]["macs"] / max(1, totals["pruned"]["macs"])
    by_batch = ", ".join(f"{t.speedup:.2f} times at batch {t.batch}" for t in shrunk)
    best = max(t.speedup for t in shrunk)
    if all(t.verdict <= 0 for t in shrunk):
        if any(t.verdict == 0 and t.speedup_high > UNSTEADY * t.speedup_low for t in shrunk):
            spread = ", ".join(f"{t.speedup_low:.2f}-{t.speedup_high:.2f} at batch {t.batch}" for t in shrunk)
            return (
                f"Whether the model without its channels is faster on {device} cannot be told: the machine had other "
                f"work, and its rounds differ ({by_batch}; {spread}). Measure again when it is idle, or for longer "
                "(--seconds)."
            )
        return (
            f"Without its channels the model is not faster on {device} ({by_batch}), though it multiplies {fewer:.2f} "
            "times less: its layers are bound by memory or by starting kernels. Larger batches, or "
            "prune.channels.multiple=8 (or 16), may help."
        )
    more = ""
    if best < 0.9 * fewer:
        more = (
            f"; it multiplies {fewer:.2f} times less, but normalisations, activations and sums take the time they took"
            if best > 1
            else ""
        )
    return f"On {device} the model without its channels is faster than dense: {by_batch}{more}."


def _of_masked(
    device: str, masked: Sequence[Timing], pattern: str | None, totals: Mapping[str, Mapping[str, int]]
) -> str:
    by_batch = ", ".join(f"{_ratio(t)} at batch {t.batch}" for t in masked)
    effective = _share(totals["pruned"]["effective_macs"], totals["dense"]["macs"])
    remedy = {
        "2:4": "2:4 is for the sparse tensor cores of NVIDIA GPUs from Ampere on: distprune export --format 2:4 there",
        "channels": "channels that stay as zeros cost what they cost: distprune export --format shrunk removes them",
    }.get(
        pattern or "",
        "for time prune whole channels (prune.pattern=channels, docs/channels.md), or 2:4 for GPUs that have sparse "
        "tensor cores (prune.pattern=2:4)",
    )
    return (
        f"Nothing got faster on {device} by zeros alone ({by_batch}): dense kernels multiply by zeros as by any "
        f"number, though only {effective} of the multiply-accumulates are by others; {remedy}."
    )


def _accuracy(accuracy: Mapping[str, Any] | None) -> list[str]:
    if accuracy is None or accuracy["dense"] is None:
        return []
    before, after, samples = accuracy["dense"]["top1"], accuracy["pruned"]["top1"], accuracy["samples"]
    words = [
        f"Accuracy went from {before:.2f} to {after:.2f} % ({after - before:+.2f} points): of {samples:,} samples "
        f"{accuracy['lost']:,} were lost and {accuracy['gained']:,} gained."
    ]
    drops = [(kind["dense"] - kind["pruned"], kind["name"]) for kind in accuracy["classes"] if kind["samples"]]
    if drops and (worst := max(drops))[0] > 1.5 * max(before - after, 0.5):
        words.append(f"The class that lost most is {worst[1]} ({-worst[0]:+.2f} points); see distprune validate.")
    return words


def max_batch(timings: Sequence[Timing]) -> list[Timing]:
    """Those of the largest batch."""
    most = max((timing.batch for timing in timings), default=0)
    return [timing for timing in timings if timing.batch == most]


def _beside(timing: Timing) -> str:
    """How much of that pruning has brought."""
    if timing.gain is None or timing.gain_low is None or timing.gain_high is None:
        return ""
    if timing.gain_low <= 1 <= timing.gain_high:
        return ", as the dense model run the same way is: pruning has no part in it that can be told"
    return f", and {timing.gain:.2f} times as fast as the dense model run the same way"


def _ratio(timing: Timing) -> str:
    return f"{timing.speedup:.2f} times as fast" if timing.verdict else "no difference that can be told"


def _times(timing: Timing) -> str:
    if timing.verdict > 0:
        return f"{timing.speedup:.2f} times as fast as"
    return f"{1 / timing.speedup:.2f} times slower than"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"
