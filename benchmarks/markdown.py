"""What the pages of docs that are made of results share."""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def where(found: dict[str, Any]) -> str:
    machine = found["machine"]
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    place = f"{gpu}{machine['processor']}, {machine['cores']} cores{threads}"
    torch = found["torch"] if "torch" in found else found["versions"]["torch"]
    return f"{place}; torch {torch}" + f"; commit {found['commit']}"


def origins(parts: dict[str, dict[str, Any]]) -> str:
    """Where parts were measured, of each place and commit once."""
    return "; ".join(dict.fromkeys(where(part) for part in parts.values()))


def cell(value: object) -> str:
    """What may stand in a table: the first line, without bars."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return (str(value).strip().splitlines() or [""])[0].replace("|", "/")


def table(columns: str, rows: list[str]) -> list[str]:
    return [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1), *(f"| {row} |" for row in rows)]
