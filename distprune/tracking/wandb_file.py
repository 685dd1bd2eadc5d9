"""What the files of a W&B run hold: W&B's own transaction log, for which its SDK has no reader.

A file is a header of 7 bytes, then blocks of 32 KiB as in LevelDB's log format: entries of a checksum (crc32 of type
and data), a length, a type and data. A record in several entries begins with FIRST and ends with LAST.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER = b":W&B"
HEADER_BYTES, BLOCK_BYTES, ENTRY_BYTES = 7, 32 * 1024, 7
FULL, LAST = 1, 4
WEIGHTS, TABLES = "weights/", "layers/"


def read_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file (protobuf `Record`), up to the first that is not whole, as after a crash."""
    content = path.read_bytes()
    if not content.startswith(HEADER):
        return
    position, parts = HEADER_BYTES, list[bytes]()
    while position + ENTRY_BYTES <= len(content):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < ENTRY_BYTES:
            position += left
            continue
        checksum, size, kind = struct.unpack("<IHB", content[position : position + ENTRY_BYTES])
        data = content[position + ENTRY_BYTES : position + ENTRY_BYTES + size]
        if len(data) < size or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += ENTRY_BYTES + size
        parts.append(data)
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def kind_of(row: Iterable[str]) -> str:
    """What a row with these names holds: "weights" for histograms, the name of a table, else figures, ""."""
    media = next((name for name in row if name.startswith((WEIGHTS, TABLES))), "")
    return "weights" if media.startswith(WEIGHTS) else "/".join(media.split("/")[:2])


def logged_rows(folder: Path, run_id: str) -> Counter[tuple[str, int]]:
    """How many rows the files of a run below `folder`/wandb hold of each kind (see `kind_of`) and trainer/step.

    A start leaves a folder run-TIME-ID; where two fall into one second, the later one's ends in -1.
    """
    rows = Counter[tuple[str, int]]()
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")):
        for record in read_records(path):
            if record.HasField("history"):
                row = read_items(record.history.item)
                rows.update([(kind_of(row), int(row["trainer/step"]))] if "trainer/step" in row else [])
    return rows


def read_items(items: Iterable[Any]) -> dict[str, Any]:
    """Name -> value of protobuf entries that hold JSON."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
