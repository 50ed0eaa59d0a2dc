"""The record every run keeps: one JSON object per line, safe against being killed at any moment."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import UserError


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become null, scalars of array libraries numbers."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # tensors and arrays, without importing either library
        return plain(value.tolist())
    return str(value)


def _line(row: Mapping) -> bytes:
    return json.dumps(plain(row), allow_nan=False).encode() + b"\n"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file, less a last line cut short by a kill. A missing file has no rows."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as e:  # JSON and UTF-8 errors are both ValueErrors
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not a row of metrics ({e}). Only a last line may be cut short; "
                f"mend or remove this line"
            ) from None
        rows.append(row)
    return rows


class JsonlTracker:
    """Appends rows to a file. Each row is one unbuffered write, so a kill costs at most the last line."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without this the first new row would be glued to a line which a kill cut short.
        if self.path.exists() and (data := self.path.read_bytes()) and not data.endswith(b"\n"):
            self._rewrite(read_jsonl(self.path))
        self._file = self._open()

    def _open(self):
        return open(self.path, "ab", buffering=0)

    def log(self, row: Mapping) -> None:
        line = _line(row)
        if self._file.write(line) < len(line):  # a disk that has just become full takes a part, without an error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def truncate_after(self, step: int) -> None:
        """Keep the rows up to `step`, where a resumed run goes on. Rows without a step stay."""
        rows = [row for row in read_jsonl(self.path) if row.get("step", step) <= step]
        self._file.close()
        self._rewrite(rows)
        self._file = self._open()

    def _rewrite(self, rows: list[dict]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.part")
        with open(temporary, "wb") as f:
            f.writelines(_line(row) for row in rows)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path)

    def close(self) -> None:
        self._file.close()
