"""Accuracy on several sets, on corrupted images, and by class."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from distprune.report import figures
from distprune.report.cells import SMALL_DROP, column, difference, number, percent, points, text
from distprune.report.gather import Run
from distprune.report.parts import Column, Figure, Item, Table, Words

WORST = 20
KINDS = ("noise", "blur", "brightness", "contrast", "jpeg")
STRENGTHS = (1, 2, 3)


def evaluation_sets(run: Run) -> Iterator[Item]:
    """What `distprune validate` has counted."""
    if run.validation is None:
        command = shlex.join(["distprune", "validate", str(run.path)])
        yield Words("Accuracy on each set, and where dense and pruned disagree, is counted by", command)
        return
    sets: dict[str, dict[str, Any]] = run.validation["sets"]
    plain = {name: found for name, found in sets.items() if _corruption(name) is None}
    yield Table(
        "Dense and pruned side by side",
        (
            column("set"),
            Column("samples"),
            Column("dense"),
            Column("pruned"),
            Column("difference"),
            Column("agree"),
            Column("lost"),
            Column("gained"),
        ),
        [
            (
                text(name),
                number(found["samples"]),
                percent(_top1(found, "dense")),
                percent(_top1(found, "pruned")),
                points(difference(_top1(found, "pruned"), _top1(found, "dense"))),
                number(found.get("agree")),
                number(found.get("lost")),
                number(found.get("gained")),
            )
            for name, found in plain.items()
        ],
        note="Lost: the dense model was right and the pruned one is wrong. Gained: the reverse.",
    )
    if run.config["data"]["task"] == "images" and len(plain) == len(sets):
        command = shlex.join(["distprune", "validate", str(run.path), "eval.corruptions=true"])
        yield Words("Corrupted images are evaluated by", command)
    yield from _corruptions(sets)
    yield from _classes(plain)


def _corruptions(sets: dict[str, dict[str, Any]]) -> Iterator[Item]:
    found = {corruption: sets[name] for name in sets if (corruption := _corruption(name)) is not None}
    drops = {key: difference(_top1(one, "dense"), _top1(one, "pruned")) for key, one in found.items()}
    known = [drop for drop in drops.values() if drop is not None]
    if not found:
        return
    largest = max([*known, SMALL_DROP])
    rows = [
        (
            text(kind),
            number(strength),
            percent(_top1(one, "dense")),
            percent(_top1(one, "pruned")),
            points(
                None if (drop := drops[kind, strength]) is None else -drop,
                None if drop is None else max(drop, 0) / largest,
            ),
        )
        for (kind, strength), one in found.items()
    ]
    columns = (column("corruption"), Column("strength"), Column("dense"), Column("pruned"), Column("difference"))
    yield Table("Corrupted images", columns, rows, note="Shaded by what pruning costs on them.")


def _classes(sets: dict[str, dict[str, Any]]) -> Iterator[Item]:
    for name, found in sets.items():
        classes = [
            {**one, "drop": one["dense"] - one["pruned"]}
            for one in found["classes"]
            if one["dense"] is not None and one["pruned"] is not None
        ]
        if not classes:
            continue
        classes.sort(key=lambda one: -one["drop"])
        worst = classes[:WORST]
        of = f"the worst {WORST} of {len(classes)} classes" if len(classes) > WORST else f"{len(classes)} classes"
        yield Figure(
            f"Points lost by class, {name}",
            f"Class {worst[0]['name']} loses most: {worst[0]['drop']:.2f} points.",
            figures.bars(
                [{"label": str(one["name"]), "value": one["drop"], "text": f"{one['drop']:.2f}"} for one in worst],
                "points lost",
            ),
            note=f"{of[0].upper()}{of[1:]}; a bar to the left is a class that gained.",
        )
        yield Table(
            f"Classes, {name}",
            (column("class"), Column("samples"), Column("dense"), Column("pruned"), Column("difference")),
            [
                (
                    text(one["name"]),
                    number(one["samples"]),
                    percent(one["dense"]),
                    percent(one["pruned"]),
                    points(-one["drop"]),
                )
                for one in worst
            ],
            wide=False,
        )


def _corruption(name: str) -> tuple[str, int] | None:
    kind, _, strength = name.rpartition("-")
    return (kind, int(strength)) if kind in KINDS and strength.isdigit() and int(strength) in STRENGTHS else None


def _top1(found: dict[str, Any], form: str) -> float | None:
    return (found.get(form) or {}).get("top1")
