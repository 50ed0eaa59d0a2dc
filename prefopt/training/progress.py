"""The progress line: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping

# What is shown of a step's row, in this order; of two that do not fit, the one with the higher number is left out first.
SHOWN: tuple[tuple[str, int, Callable[[float, str], str]], ...] = (
    ("loss", 0, lambda x, _: f"loss {x:.3f}"),
    ("reward/margin", 2, lambda x, _: f"margin {x:.2f}"),
    ("accuracy", 3, lambda x, _: f"acc {x:.2f}"),
    ("rows_per_second", 1, lambda x, unit: f"{_short(x)} {unit}/s"),
    ("tokens_per_second", 4, lambda x, _: f"{x:,.0f} tok/s"),
    ("pictures_per_second", 4, lambda x, _: f"{_short(x)} pictures/s"),
    ("useful_mfu", 5, lambda x, _: f"MFU {_short(100 * x)} %"),
    ("padding", 7, lambda x, _: f"pad {100 * x:.0f} %"),
    ("peak_memory", 6, lambda x, _: f"{x / 1e9:.1f} GB"),
)


class Progress:
    """Shows step, loss, margin, accuracy, speed, memory and time left on stderr, on one line. Silent on ranks other than 0."""

    EVERY = 5.0  # seconds between plain lines

    def __init__(self, total: int, start: int, show: bool, unit: str = "rows"):
        self.total, self.start, self.show, self.unit = total, start, show, unit
        self.first: tuple[int, float] | None = None  # step and time of the first call: evaluations before it say nothing about speed
        self.said = 0.0
        self.terminal = sys.stderr.isatty()

    def __call__(self, step: int, row: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.first = self.first or (step, now)
        last = step == self.total
        if not self.show or not (last or now - self.said >= (0.1 if self.terminal else self.EVERY) or step == self.start + 1):
            return
        self.said = now
        done = step - self.first[0]
        left = f"{_clock((now - self.first[1]) / done * (self.total - step))} left" if done else ""
        line = self.line(step, row, left, shutil.get_terminal_size().columns - 1 if self.terminal else None)
        print(f"\r\x1b[K{line}" if self.terminal else line, end="" if self.terminal and not last else "\n", file=sys.stderr, flush=True)

    def line(self, step: int, row: Mapping[str, float], left: str, columns: int | None = None) -> str:
        """The line, of at most `columns` characters where they are given: a line that wraps could not be written over."""
        parts = [(rank, show(row[key], self.unit)) for key, rank, show in SHOWN if row.get(key) is not None]
        bar = f"[{'#' * (20 * step // self.total):<20}] " if columns else ""

        def joined() -> str:
            return f"{bar}step {step}/{self.total}  " + "  ".join([*(text for _, text in parts), left])

        if columns and len(joined()) > columns:
            bar = ""
        while columns and parts and len(joined()) > columns:
            parts.remove(max(parts))
        return joined().rstrip()


def _short(x: float) -> str:
    """Two digits at least: 0.12, 5.1, 41, 1,234."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
