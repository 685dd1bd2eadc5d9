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
    return f"{place}; torch {torch}" + (f"; commit {found['commit']}" if "commit" in found else "")


def table(columns: str, rows: list[str]) -> list[str]:
    return [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1), *(f"| {row} |" for row in rows)]
