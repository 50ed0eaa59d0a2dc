"""Reads W&B's offline run file: a 7-byte header, then LevelDB log blocks holding protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

HEADER, BLOCK = 7, 32 * 1024
FULL, LAST = 1, 4


def records(path: Path) -> Iterator:
    from wandb.proto.wandb_internal_pb2 import Record

    data, pos, parts = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while pos + HEADER <= len(data):
        if (left := BLOCK - pos % BLOCK) < HEADER:  # no record header fits: the block's tail is padding
            pos += left
            continue
        _, size, kind = struct.unpack("<IHB", data[pos : pos + HEADER])
        parts += data[pos + HEADER : pos + HEADER + size]
        pos += HEADER + size
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""


def history(path: Path) -> list[dict]:
    """Rows of metrics as they were logged."""
    found = (r.history.item for r in records(path) if r.WhichOneof("record_type") == "history")
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in found]


def artifact_files(path: Path) -> dict[str, bytes]:
    """Files of the last artifact (a table with its images), by name. Until they are uploaded, W&B keeps them in its data folder."""
    manifest = [r.artifact.manifest for r in records(path) if r.WhichOneof("record_type") == "artifact"][-1]
    return {entry.path: Path(entry.local_path).read_bytes() for entry in manifest.contents}
