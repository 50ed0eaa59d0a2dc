"""What a run sends elsewhere, beside its own metrics.jsonl: one small interface, and the guard that keeps a broken tracker harmless."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from prefopt.errors import UserError
from prefopt.tracking.redact import redact

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Tracker(Protocol):
    """Somewhere that shows a run. Only the main process has trackers.

    name:    what messages call it.
    advice:  what to do when it has stopped, as the end of a sentence; may be empty.
    """

    name: str
    advice: str

    def log(self, row: Mapping) -> None:
        """A row of metrics.jsonl: its `step`, its `split` (train or eval) and numbers."""

    def log_samples(self, rows: Sequence[Mapping]) -> None:
        """One evaluation's samples: `id`, `step`, `prompt`, `before`, `after`, `reward`. A sample is text, or the path of an image."""

    def log_images(self, step: int, images: Sequence[tuple[str, Path]]) -> None:
        """(caption, file) of each image."""

    def log_report(self, path: Path) -> None:
        """The run's HTML page."""

    def close(self, state: str) -> None:
        """Sends what is left. `state` is finished, stopped or failed."""

    def abandon(self) -> None:
        """Called instead of everything else after an error; must not wait."""


class Guarded:
    """A tracker that may break without harm: its first error is told in one sentence, and nothing is sent to it afterwards."""

    def __init__(self, tracker: Tracker):
        self.tracker, self.broken = tracker, False

    def log(self, row: Mapping) -> None:
        self._call("log", row)

    def log_samples(self, rows: Sequence[Mapping]) -> None:
        self._call("log_samples", rows)

    def log_images(self, step: int, images: Sequence[tuple[str, Path]]) -> None:
        self._call("log_images", step, images)

    def log_report(self, path: Path) -> None:
        self._call("log_report", path)

    def close(self, state: str) -> None:
        self._call("close", state)

    def _call(self, what: str, *args: Any) -> None:
        if self.broken:
            return
        try:
            getattr(self.tracker, what)(*args)
        except Exception as error:  # a server that is gone, a full disk, a client that died
            self.broken = True
            self.tracker.abandon()
            reason = redact(" ".join(f"{type(error).__name__} {error}".split()))
            advice = f" {self.tracker.advice}" if self.tracker.advice else ""
            print(f"{self.tracker.name} logging has stopped ({reason}); metrics.jsonl is complete.{advice}", file=sys.stderr)


def numbers(row: Mapping) -> Iterator[tuple[str, float]]:
    """(`train/loss`, value), ... of a row, by its `split`. Texts, truth values, nulls and the step itself are left to metrics.jsonl."""
    split = row.get("split", "train")
    for key, value in row.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            yield (key if key.startswith(("train/", "eval/")) else f"{split}/{key}"), value


def is_image(value: Any) -> bool:
    return isinstance(value, Path) and value.suffix.lower() in IMAGE_SUFFIXES


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `algo.beta: 0.1`; a list becomes its text."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value if isinstance(value, (bool, int, str)) or _finite(value) else str(value)
    return out


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def check_trackers(cfg: Any) -> None:
    """Raises `UserError` if `cfg` (the tracker group) asks for a package that is not installed; called before anything is loaded."""
    if cfg.mode != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"tracker.mode={cfg.mode}: the package 'wandb' is not installed; pip install wandb, or set tracker.mode=off")
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tracker.tensorboard=true: the package 'tensorboard' is not installed; pip install 'prefopt[tensorboard]', "
                        "or set tracker.tensorboard=false")
