"""The progress line: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

SHOWN = (("loss", "loss", ".3f"), ("reward/margin", "margin", ".2f"), ("accuracy", "acc", ".2f"), ("tokens_per_second", "tok/s", ".0f"))


class Progress:
    """Shows step, loss, margin, accuracy, tokens per second and time left on stderr. Silent on ranks other than 0."""

    EVERY = 5.0  # seconds between plain lines

    def __init__(self, total: int, start: int, show: bool):
        self.total, self.start, self.show = total, start, show
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
        parts = [f"{label} {row[key]:{form}}" for key, label, form in SHOWN if row.get(key) is not None]
        bar = f"[{'#' * (20 * step // self.total):<20}] " if self.terminal else ""
        line = f"{bar}step {step}/{self.total}  " + "  ".join([*parts, left])
        print(f"\r\x1b[K{line}" if self.terminal else line, end="" if self.terminal and not last else "\n", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
