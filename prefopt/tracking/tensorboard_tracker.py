"""TensorBoard: event files in the run folder itself, so that `tensorboard --logdir` names each run after its folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.tracking.redact import redact
from prefopt.tracking.trackers import flat, is_image, numbers

SHOWN = 16  # samples and images per evaluation; each is a panel of its own, and samples.jsonl holds all of them
# What the HParams page shows beside a run's settings.
HEADLINES = ("eval/loss", "eval/accuracy", "eval/true_reward", "eval/win_rate", "eval/kl")


class TensorboardTracker:
    """Scalars `train/<key>` and `eval/<key>`, the config as text and hyper-parameters, samples as text or images.

    `step` is where the run goes on (0: from the start). What an earlier start wrote beyond it is marked as purged, since those
    steps are made again. Everything is written at once and by this thread: a kill costs nothing that a checkpoint holds, and an error
    comes to light where it happens.
    """

    name = "TensorBoard"
    advice = ""

    def __init__(self, folder: Path, config: Mapping, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._make = Event, summary
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = RecordWriter(open(Path(folder) / f"events.out.tfevents.{time.time():017.6f}", "xb"))
        first = step + 1 if step else 0
        self._write(file_version="brain.Event:2")
        self._write(first, session_log=SessionLog(status=SessionLog.START))  # purges the steps from `first` on
        settings = flat(redact(config))
        table = "\n".join(["| key | value |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in settings.items())])
        self._text("config", table, first)
        experiment, begin, self._end = summary.hparams(settings, dict.fromkeys(HEADLINES, 0.0))
        self._write(first, summary=experiment)
        self._write(first, summary=begin)

    def log(self, row: Mapping) -> None:
        for key, value in numbers(row):
            self._write(int(row["step"]), summary=self._make.scalar(key, value))

    def log_samples(self, rows: Sequence[Mapping]) -> None:
        for row in rows[:SHOWN]:
            if is_image(row["after"]):
                continue  # shown by log_images
            parts = [("prompt", row["prompt"]), ("before", row["before"]), ("after", row["after"]), ("reward", row["reward"])]
            text = "\n\n".join(f"**{name}**\n\n{_verbatim(value)}" for name, value in parts if value is not None)
            self._text(f"samples/{row['id']}", text, int(row["step"]))

    def log_images(self, step: int, images: Sequence[tuple[str, Path]]) -> None:
        import numpy as np
        from PIL import Image

        for number, (caption, path) in enumerate(images[:SHOWN]):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._write(step, summary=self._make.image(f"images/{number}", pixels, dataformats="HWC"))
            self._text(f"images/{number}/caption", _verbatim(caption), step)

    def log_report(self, path: Path) -> None:
        """TensorBoard shows no HTML pages; the report lies beside the event files."""

    def close(self, state: str) -> None:
        if state == "finished":
            self._write(summary=self._end)
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        self._write(step, summary=self._make.text(tag, text))

    def _write(self, step: int = 0, **what: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), step=step, **what).SerializeToString())
        self._file.flush()


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _verbatim(value: Any) -> str:
    """A Markdown block that shows the text as it is."""
    return "\n".join(f"    {line}" for line in str(value).splitlines()) or "    "
