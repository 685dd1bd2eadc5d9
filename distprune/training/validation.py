"""The dense and the pruned model side by side: what pruning has forgotten, by set and by class.

Pruning costs rare and hard samples most, which a mean over all hides (Hooker et al. 2019, arXiv:1911.05248).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from distprune.data import PADDING, Batch
from distprune.pruning.collectives import Ranks
from distprune.pruning.prunable import reshard
from distprune.training.buffers import sync_buffers
from distprune.training.held_out import HeldOut
from distprune.training.logits import logits_of
from distprune.training.tasks import rows

Figures = dict[str, Any]
"""Of one set, as in validation.json."""


def validate(
    dense: nn.Module | None,
    pruned: nn.Module,
    held_out: HeldOut,
    accelerator: Accelerator,
    after_batch: Callable[[], None] = lambda: None,
    known: Mapping[str, Figures] | None = None,
    keep: Callable[[dict[str, Figures]], None] = lambda _: None,
) -> dict[str, Figures]:
    """Compare two models on all sets. Called on all ranks.

    Args:
        dense: before pruning, bare or sharded; None where it was not kept.
        pruned: bare or sharded.
        held_out: the sets, see `HeldOut.sets`.
        accelerator: ranks, device and autocast.
        after_batch: called after each batch on all ranks; what it raises ends the validation.
        known: figures of sets that need not be counted again, the same on all ranks.
        keep: called with all figures so far, after each set.

    Returns:
        See `compare`, by name of the set.
    """
    sync_buffers(pruned)
    found: dict[str, Figures] = {}
    for name, batches in held_out.sets():
        if known is not None and name in known:
            found[name] = known[name]
        else:
            found[name] = compare(dense, pruned, batches(), held_out.classes, accelerator, after_batch)
        keep(found)
    return found


def compare(
    dense: nn.Module | None,
    pruned: nn.Module,
    batches: Iterable[Batch],
    classes: Collection[str],
    accelerator: Accelerator,
    after_batch: Callable[[], None] = lambda: None,
) -> Figures:
    """Run both models on the same batches, and count over all ranks, exactly. See `validate`.

    Args:
        batches: of this rank, as many on each; samples and tokens of label `PADDING` are not counted.
        classes: names; none where tokens are foretold.

    Returns:
        samples: how many, each counted once;
        dense, pruned: top1 (percent) and loss (mean cross-entropy, None where it is not finite), or None for no dense;
        classes: of each that has samples name, samples, and percent right of dense and of pruned;
        agree: samples to which both give the same answer; lost: which only dense gets right; gained: which only pruned
        does; None where there is no dense model.
    """
    models = [model for model in (dense, pruned) if model is not None]
    modes = [model.training for model in models]
    device = accelerator.device
    totals = torch.zeros(4, dtype=torch.int64, device=device)  # samples, agree, lost, gained
    of_class = torch.zeros(1 + len(models), max(len(classes), 1), dtype=torch.int64, device=device)
    losses = torch.zeros(len(models), dtype=torch.float64, device=device)
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            for inputs, labels in batches:
                answers, rights = [], []
                for place, model in enumerate(models):
                    logits, flat = rows(logits_of(model, inputs), labels)
                    losses[place] += F.cross_entropy(logits, flat, reduction="sum", ignore_index=PADDING)
                    answers.append(logits.argmax(1))
                    rights.append(answers[-1] == flat)
                counted = flat != PADDING
                first, last = rights[0], rights[-1]
                same = counted & (answers[0] == answers[-1])
                totals += torch.stack([x.sum() for x in (counted, same, first & ~last, last & ~first)])
                # Padding, which is never right, counts as no sample of class 0.
                which = flat.clamp(min=0) if classes else torch.zeros_like(flat)
                for place, marks in enumerate((counted, *rights)):
                    of_class[place].index_add_(0, which, marks.long())
                after_batch()
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
            reshard(model)
    ranks = Ranks()
    return _figures(ranks.sum(totals), ranks.sum(of_class), ranks.sum(losses), classes, dense is not None)


def top1s(sets: Mapping[str, Figures]) -> dict[str, float]:
    """Accuracies under the names of summary.json."""
    return {
        f"validation/{name}/{which}_top1": figures[which]["top1"]
        for name, figures in sets.items()
        for which in ("dense", "pruned")
        if figures[which] is not None
    }


def class_rows(sets: Mapping[str, Figures]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table with all classes of all sets."""
    columns = ["set", "class", "samples", "dense", "pruned"]
    table = [
        [name, *(found[key] for key in ("name", "samples", "dense", "pruned"))]
        for name, figures in sets.items()
        for found in figures["classes"]
    ]
    return columns, table


def _figures(totals: Tensor, of_class: Tensor, losses: Tensor, classes: Collection[str], has_dense: bool) -> Figures:
    samples, *answers = totals.tolist()
    rights, means = of_class[1:].sum(1).tolist(), (losses / samples).tolist()
    whole = [
        {"top1": 100 * right / samples, "loss": mean if math.isfinite(mean) else None}
        for right, mean in zip(rights, means, strict=True)
    ]
    parts = [
        (name, count, [100 * right / count for right in each])
        for name, (count, *each) in zip(classes, of_class.T.tolist(), strict=bool(classes))
        if count
    ]
    return {
        "samples": samples,
        "dense": whole[0] if has_dense else None,
        "pruned": whole[-1],
        "classes": [
            {"name": name, "samples": count, "dense": each[0] if has_dense else None, "pruned": each[-1]}
            for name, count, each in parts
        ],
        **{name: n if has_dense else None for name, n in zip(("agree", "lost", "gained"), answers, strict=True)},
    }
