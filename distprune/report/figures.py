"""Figures: data in, a Vega-Lite specification out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distprune.report.gather import Points
from distprune.report.parts import Key, Spec
from distprune.report.weights import Counts, Histogram

MOST_POINTS = 400
MOST_COLUMNS = 80
COLOURS = 8
LONGEST_LABEL = 22
HEIGHT, SMALL_HEIGHT = 220, 110
WIDE_RANGE = 30
AUTOSIZE = {"type": "fit-x", "contains": "padding"}


@dataclass(frozen=True)
class Series:
    """A line of values by step."""

    label: str
    points: Points
    dashed: bool = False
    dots: bool = False
    stepped: bool = False
    faint: bool = False


def keys(labels: Sequence[str], dashed: Sequence[str] = ()) -> tuple[Key, ...]:
    """The legend of lines with these labels, which are coloured in this order."""
    return tuple(Key(label, f"--c{i % COLOURS}", label in dashed) for i, label in enumerate(labels))


def lines(
    series: Sequence[Series],
    y: str,
    *,
    number: str = ",.4~g",
    end: float,
    domain: tuple[float, float] | None = None,
    far: bool = False,
    level: tuple[float, str] | None = None,
    shaded: tuple[float, float] | None = None,
) -> Spec:
    """Values by step.

    Args:
        series: coloured in their order.
        y: title of the axis.
        end: the last step of the axis.
        number: a format of d3 for values.
        domain: least and greatest value that is drawn; all values if None.
        far: whether values may be drawn on a logarithmic scale, if they range far.
        level: a value and its name, drawn as a line across.
        shaded: from and to which step the ground is shaded.
    """
    values = [value for one in series for _, value in one.points if value is not None]
    scale: Spec = {"zero": True} if domain is None else {"zero": False, "domain": list(domain), "nice": False}
    axis: Spec = {"format": number, "tickCount": 5}
    if far and values and min(values) > 0 and max(values) > WIDE_RANGE * min(values):
        decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        scale = {"type": "log", "domain": [10.0 ** decades[0], 10.0 ** decades[-1]]}
        axis = {"format": "~g", "values": [10.0**power for power in decades]}
    labels = [one.label for one in series]
    rows = [
        {"x": step, "y": _rounded(value), "s": one.label, "d": one.dots}
        for one in series
        for step, value in thinned(one.points)
    ]
    x = {
        "field": "x",
        "type": "quantitative",
        "title": "step",
        "axis": {"tickCount": 6},
        "scale": {"domain": [0, end], "nice": False},
    }
    colour = _colour(labels)
    tooltip = [
        {"field": "s", "type": "nominal", "title": " "},
        {"field": "x", "type": "quantitative", "title": "step", "format": ",d"},
        {"field": "y", "type": "quantitative", "title": y, "format": number},
    ]
    layers: list[Spec] = []
    if shaded is not None:
        layers.append(
            {
                "data": {"values": [{"x": shaded[0], "x2": shaded[1]}]},
                "mark": {"type": "rect", "color": "var(--shade)", "tooltip": False},
                "encoding": {"x": x, "x2": {"field": "x2"}},
            }
        )
    if level is not None:
        layers.append(
            {
                "data": {"values": [{"y": level[0], "s": level[1]}]},
                "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3], "strokeWidth": 1.5},
                "encoding": {
                    "y": {"field": "y", "type": "quantitative"},
                    "tooltip": [tooltip[0], tooltip[2]],
                },
            }
        )
    for one in series:
        layers.append(
            {
                "transform": [{"filter": {"field": "s", "equal": one.label}}],
                "mark": {
                    "type": "line",
                    "clip": True,
                    "strokeWidth": 1 if one.faint else 1.75,
                    "opacity": 0.45 if one.faint else 1,
                    "interpolate": "step-after" if one.stepped else "linear",
                    **({"strokeDash": [5, 4]} if one.dashed else {}),
                },
                "encoding": {"x": x, "y": {"field": "y", "type": "quantitative"}, "color": colour},
            }
        )
    layers.append(
        {
            "params": [{"name": "near", "select": {"type": "point", "on": "pointerover", "nearest": True}}],
            "mark": {"type": "point", "filled": True, "size": 45, "clip": True},
            "encoding": {
                "x": x,
                "y": {"field": "y", "type": "quantitative"},
                "color": colour,
                "opacity": {
                    "condition": [{"param": "near", "empty": False, "value": 1}, {"test": "datum.d", "value": 0.9}],
                    "value": 0,
                },
                "tooltip": tooltip,
            },
        }
    )
    return {
        "width": "container",
        "autosize": AUTOSIZE,
        "height": HEIGHT,
        "data": {"values": rows},
        "encoding": {"y": {"scale": scale, "title": y, "axis": axis}},
        "layer": layers,
    }


def heat_map(layers: Mapping[str, Points]) -> Spec:
    """The sparsity of each layer at each update, as shades from none (0) to full (1)."""
    steps = sorted({step for points in layers.values() for step, _ in points})
    if len(steps) > MOST_COLUMNS:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    by_step = [dict(points) for points in layers.values()]
    width = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) or 1
    rows = [
        {"x": step, "x2": after, **{f"l{i}": _rounded(values.get(step)) for i, values in enumerate(by_step)}}
        for step, after in zip(steps, [*steps[1:], steps[-1] + width], strict=True)
    ]
    names = [
        {"key": f"l{i}", "layer": name, "label": label}
        for i, (name, label) in enumerate(zip(layers, short(list(layers)), strict=True))
    ]
    return {
        "width": "container",
        "autosize": AUTOSIZE,
        "height": len(layers) * max(3, min(18, 900 // len(layers))),
        "data": {"values": rows},
        "transform": [
            {"fold": [row["key"] for row in names], "as": ["key", "sparsity"]},
            {"lookup": "key", "from": {"data": {"values": names}, "key": "key", "fields": ["layer", "label"]}},
        ],
        "mark": {"type": "rect", "color": "var(--heat)"},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": "step",
                "axis": {"tickCount": 8, "grid": False},
                "scale": {"nice": False, "zero": False},
            },
            "x2": {"field": "x2"},
            "y": {
                "field": "label",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"labelOverlap": "greedy", "labelLimit": 150, "grid": False},
            },
            "opacity": {
                "field": "sparsity",
                "type": "quantitative",
                "scale": {"domain": [0, 1], "range": [0.04, 1]},
                "legend": None,
            },
            "tooltip": [
                {"field": "layer", "type": "nominal"},
                {"field": "x", "type": "quantitative", "title": "step", "format": ",d"},
                {"field": "sparsity", "type": "quantitative", "format": ".2%"},
            ],
        },
    }


def histogram(found: Histogram) -> Spec:
    """The weights of one layer that are not zero, before and after."""
    rows = [*_bins(found.before, "before"), *_bins(found.after, "after")]
    x = {"field": "x", "type": "quantitative", "bin": "binned", "title": None, "axis": {"tickCount": 3, "grid": False}}
    return {
        "width": "container",
        "autosize": AUTOSIZE,
        "height": SMALL_HEIGHT,
        "data": {"values": rows},
        "mark": {"type": "bar", "opacity": 0.65, "binSpacing": 0, "strokeWidth": 0},
        "encoding": {
            "x": x,
            "x2": {"field": "x2"},
            "y": {
                "field": "n",
                "type": "quantitative",
                "stack": None,
                "title": None,
                "scale": {"type": "sqrt"},
                "axis": {"tickCount": 3, "format": "~s"},
            },
            "color": _colour(["before", "after"]),
            "tooltip": [
                {"field": "s", "type": "nominal", "title": " "},
                {"field": "x", "type": "quantitative", "title": "from", "format": ".3~g"},
                {"field": "x2", "type": "quantitative", "title": "to", "format": ".3~g"},
                {"field": "n", "type": "quantitative", "title": "weights", "format": ",d"},
            ],
        },
    }


def bars(rows: Sequence[Mapping[str, Any]], x: str, *, number: str = ",.4~g") -> Spec:
    """Bars that lie, one for each row, with its text at the end.

    Args:
        rows: each with `label`, `value`, `text`, and, where it is known, `low` and `high`.
        x: title of the axis.
        number: a format of d3 for values.
    """
    shown = short([row["label"] for row in rows])
    values = [dict(row, shown=label) for row, label in zip(rows, shown, strict=True)]
    y = {"field": "shown", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 150, "grid": False}}
    tooltip = [
        {"field": "label", "type": "nominal", "title": " "},
        {"field": "value", "type": "quantitative", "title": x, "format": number},
    ]
    ends = [row["high"] if row.get("high") is not None else row["value"] for row in rows]
    values = [dict(row, end=end) for row, end in zip(values, ends, strict=True)]
    room = 1.35
    low, high = min(0.0, *ends, 0.0), max(0.0, *ends, 0.0)
    domain = [room * low, room * high] if high > low else [0, 1]
    encoding = {
        "x": {
            "field": "value",
            "type": "quantitative",
            "title": x,
            "axis": {"tickCount": 4},
            "scale": {"domain": domain, "nice": False},
        },
        "tooltip": tooltip,
    }
    layers: list[Spec] = [
        {"mark": {"type": "bar", "color": "var(--c0)", "height": {"band": 0.7}}, "encoding": encoding}
    ]
    if any(row.get("low") is not None for row in rows):
        tooltip += [
            {"field": edge, "type": "quantitative", "title": edge, "format": number} for edge in ("low", "high")
        ]
        layers.append(
            {
                "mark": {"type": "rule", "color": "var(--text)", "strokeWidth": 1.5},
                "encoding": {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}},
            }
        )
    layers.append(
        {
            "mark": {"type": "text", "align": "left", "dx": 5, "color": "var(--text)", "tooltip": False},
            "encoding": {"x": {"field": "end", "type": "quantitative"}, "text": {"field": "text"}},
        }
    )
    return {
        "width": "container",
        "autosize": AUTOSIZE,
        "height": 24 * len(rows),
        "data": {"values": values},
        "encoding": {"y": y},
        "layer": layers,
    }


def dots(rows: Sequence[Mapping[str, Any]], x: str, y: str, level: float | None = None) -> Spec:
    """A dot a row, those of one group joined by a line.

    Args:
        rows: each with `name`, `x`, `y`, `group`.
        x: title of that axis, of fractions.
        y: title of that axis.
        level: a value of y to compare with.
    """
    found = [row["y"] for row in rows if row["y"] is not None] + ([] if level is None else [level])
    place = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": x,
            "axis": {"format": "~%", "tickCount": 5},
            "scale": {"zero": False, "padding": 24},
        },
        "y": {
            "field": "y",
            "type": "quantitative",
            "title": y,
            "axis": {"tickCount": 5},
            "scale": {"domain": list(around(found)), "nice": False},
        },
    }
    layers: list[Spec] = []
    if level is not None:
        layers.append(
            {
                "data": {"values": [{"y": level}]},
                "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3], "strokeWidth": 1.5},
                "encoding": {"y": place["y"]},
            }
        )
    layers += [
        {
            "mark": {"type": "line", "color": "var(--c0)", "opacity": 0.4},
            "encoding": {**place, "detail": {"field": "group", "type": "nominal"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
            "encoding": {
                **place,
                "color": _colour([row["name"] for row in rows], field="name"),
                "tooltip": [
                    {"field": "name", "type": "nominal", "title": "run"},
                    {"field": "x", "type": "quantitative", "title": x, "format": ".2%"},
                    {"field": "y", "type": "quantitative", "title": y, "format": ".2f"},
                ],
            },
        },
    ]
    return {
        "width": "container",
        "autosize": AUTOSIZE,
        "height": HEIGHT + 40,
        "data": {"values": list(rows)},
        "layer": layers,
    }


def attempts(rounds: Sequence[Mapping[str, Any]], level: float | None) -> Spec:
    """Accuracy against the share that is left after every attempt at a round; hollow: rolled back.

    Args:
        rounds: each with round, sparsity, top1, drop, accepted.
        level: accuracy of the dense model.
    """
    rows = [dict(outcome, attempt=i + 1, left=1 - outcome["sparsity"]) for i, outcome in enumerate(rounds)]
    ticks = [digit * 10.0**-power for power in range(6, 0, -1) for digit in (1, 2, 5)] + [1.0]
    found = [row["top1"] for row in rows] + ([] if level is None else [level])
    y = {
        "field": "top1",
        "type": "quantitative",
        "title": "top-1 %",
        "axis": {"tickCount": 5},
        "scale": {"domain": list(around([value for value in found if value is not None])), "nice": False},
    }
    layers: list[Spec] = []
    if level is not None:
        layers.append(
            {
                "data": {"values": [{"top1": level}]},
                "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [2, 3], "strokeWidth": 1.5},
                "encoding": {"y": y},
            }
        )
    layers.append(
        {
            "mark": {"type": "point", "size": 70, "strokeWidth": 2},
            "encoding": {
                "x": {
                    "field": "left",
                    "type": "quantitative",
                    "title": "left of what can be pruned",
                    "axis": {"format": "~%", "values": ticks},
                    "scale": {"type": "log", "reverse": True, "padding": 12},
                },
                "y": y,
                "stroke": {"condition": {"test": "datum.accepted", "value": "var(--c0)"}, "value": "var(--c1)"},
                "fill": {"condition": {"test": "datum.accepted", "value": "var(--c0)"}, "value": "transparent"},
                "tooltip": [
                    {"field": "attempt", "type": "quantitative"},
                    {"field": "round", "type": "quantitative"},
                    {"field": "sparsity", "type": "quantitative", "format": ".2%"},
                    {"field": "top1", "type": "quantitative", "title": "top-1 %", "format": ".2f"},
                    {"field": "accepted", "type": "nominal"},
                ],
            },
        }
    )
    return {"width": "container", "autosize": AUTOSIZE, "height": HEIGHT, "data": {"values": rows}, "layer": layers}


def thinned(points: Points) -> Points:
    """At most about `MOST_POINTS` of the points: of those that lie together, the least and the greatest."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    kept: list[int] = []
    for begin in range(0, len(points), size):
        known = [i for i in range(begin, min(begin + size, len(points))) if points[i][1] is not None]
        if known:
            ends = {min(known, key=lambda i: points[i][1] or 0), max(known, key=lambda i: points[i][1] or 0)}
            kept += sorted(ends)
    return [points[i] for i in sorted({0, *kept, len(points) - 1})]


def around(values: Sequence[float], least: float = 0.5) -> tuple[float, float]:
    """Bounds a little wider than the values, and wider than `least`."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = max(0.08 * (high - low), least / 2)
    return low - room, high + room


def short(labels: Sequence[str]) -> list[str]:
    """Labels made shorter where they are long, if they can still be told apart."""
    half = LONGEST_LABEL // 2
    plain = [label.removesuffix(".weight") for label in labels]
    cut = [label if len(label) <= LONGEST_LABEL else f"{label[: half - 4]}…{label[-half - 3 :]}" for label in plain]
    initials = [label if len(label) <= LONGEST_LABEL else _initials(label) for label in plain]
    different = len(set(labels))
    return next(found for found in (cut, initials, plain, list(labels)) if len(set(found)) == different)


def _initials(name: str) -> str:
    """A dotted name, of which only the last part is whole."""
    *parts, last = name.split(".")
    return ".".join([*(part[:3] for part in parts), last])


def _rounded(value: float | None) -> float | None:
    """In as many digits as can be seen in a figure."""
    return None if value is None else float(f"{value:.5g}")


def _bins(found: Counts, when: str) -> list[dict[str, Any]]:
    width = 2 * found.limit / len(found.counts)
    edges = [-found.limit + i * width for i in range(len(found.counts) + 1)]
    return [
        {"x": _rounded(low), "x2": _rounded(high), "n": count, "s": when}
        for low, high, count in zip(edges, edges[1:], found.counts, strict=False)
    ]


def _colour(labels: Sequence[str], field: str = "s") -> Spec:
    colours = [key.colour for key in keys(labels)]
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(labels), "range": [f"var({colour})" for colour in colours]},
        "legend": None,
    }
