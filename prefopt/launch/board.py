"""sweep.json: what each job of a sweep is and how it stands, and the table of it.

A job's log.txt is locked by the processes that write to it (`flock` of the open file that they inherit), and SWEEP/.lock by the process
that runs the sweep. So whether a job really runs is known even after kill -9 (prefopt/training/locks.py).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.evaluation.runs import FIGURES
from prefopt.tracking.redact import redact
from prefopt.training.locks import hold, locked
from prefopt.training.rundir import read_status, write_atomic

FILE = "sweep.json"
FAILED = ("failed", "out of memory")
DONE = ("finished", "pruned")
BEFORE = "had finished before"
TAIL = 1 << 18  # bytes of metrics.jsonl in which the last rows are looked for


class Board:
    """The jobs of a sweep, by their number. Only the process that runs the sweep changes it."""

    def __init__(self, sweep: Path):
        self.sweep, self.path = sweep, sweep / FILE
        self.jobs: list[dict[str, Any]] = read_board(sweep) if self.path.exists() else []
        self.began: dict[int, float] = {}

    def add(self, number: int, overrides: list[str], run_dir: str) -> None:
        """A job that will be run. Raises `UserError` if the sweep has another job of this number."""
        overrides = redact(overrides)
        if number < len(self.jobs):
            known = self.jobs[number]
            if known["overrides"] != overrides:
                there, here = (" ".join(words) or "no overrides" for words in (known["overrides"], overrides))
                raise UserError(f"{self.sweep} holds another sweep: its job {number + 1} is {there} and here it is {here}. Choose another "
                                "hydra.sweep.dir.")
            known["run_dir"] = redact(run_dir)
        else:
            new = {"state": "waiting", "message": "", "seconds": 0.0}
            self.jobs.append({"overrides": overrides, "run_dir": redact(run_dir), **new})

    def set(self, number: int, state: str, message: str = "", **about: Any) -> None:
        if state == "running" and number not in self.began:
            self.began[number] = time.monotonic()
        job = self.jobs[number]
        if state != "running" and message != BEFORE:
            job["seconds"] = round(time.monotonic() - self.began.get(number, time.monotonic()), 1)
        job |= {"state": state, "message": redact(message), **about}
        if state != "running":
            self.began.pop(number, None)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self.jobs, indent=2))

    def seconds(self, number: int) -> float:
        """How long a job has run by now."""
        began = self.began.get(number)
        return self.jobs[number]["seconds"] if began is None else time.monotonic() - began

    def table(self, height: int | None = None, width: int = 200) -> str:
        """A line per job; with a `height`, those that run come first and the rest is counted."""
        return table(self.jobs, [self.seconds(i) for i in range(len(self.jobs))], height, width, self.sweep)


def read_board(sweep: Path) -> list[dict[str, Any]]:
    """The jobs of a sweep as they were recorded. Raises `UserError`."""
    file = sweep / FILE
    if not file.is_file():
        raise UserError(f"{sweep} is no sweep (there is no {FILE} in it; prefopt train -m writes one)")
    try:
        jobs = json.loads(file.read_text(encoding="utf-8"))
        if not all({"overrides", "run_dir", "state", "message", "seconds"} <= set(job) for job in jobs):
            raise ValueError("a job lacks one of overrides, run_dir, state, message, seconds")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); put back what prefopt wrote, or move the file away and repeat the command of "
                        "the sweep, which leaves finished runs alone") from error
    return jobs


def standing(sweep: Path) -> list[dict[str, Any]]:
    """The jobs as they stand now, whatever became of the process that ran the sweep: one that was running and is not any more is
    `interrupted`.
    """
    jobs, alive = read_board(sweep), locked(sweep / ".lock")
    for job in jobs:
        folder = folder_of(sweep, job)
        if job["state"] in (*DONE, *FAILED):
            continue
        if any(locked(log) for log in (folder / "log.txt", *folder.glob("stages/*/log.txt"))):
            job["state"] = "running"
        elif read_status(folder).get("state") == "finished":
            job["state"] = "finished"
        elif job["state"] == "running" and not alive:
            job["state"] = "interrupted"
    return jobs


def folder_of(sweep: Path, job: dict[str, Any]) -> Path:
    """A job's run folder, also where the sweep was moved or is looked at from elsewhere."""
    inside = sweep / Path(job["run_dir"]).name
    return inside if inside.is_dir() else Path(job["run_dir"])


# ---- the table ----------------------------------------------------------------------------------------


def table(jobs: Sequence[dict[str, Any]], seconds: Sequence[float], height: int | None, width: int, sweep: Path) -> str:
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    order = list(range(len(jobs)))
    if height is not None and len(jobs) > height:
        rank = {"running": 0, "waiting": 2}
        order = sorted(sorted(order, key=lambda i: rank.get(jobs[i]["state"], 1))[: max(1, height - 1)])
    rows = [("job", "state", "step", "loss", "last figure", "time", "what")]
    for i in order:
        job, at = jobs[i], progress(folder_of(sweep, jobs[i]))
        what = " ".join(word for word in job["overrides"] if word not in common) or "no overrides"
        note = job["message"].splitlines()[-1][:160] if job["message"] and job["state"] not in (*DONE, "running") else ""
        rows.append((str(i + 1), job["state"], at.get("step", ""), at.get("loss", ""), at.get("figure", ""),
                     in_time(seconds[i] or at.get("seconds", 0.0)), f"{what}  ({note})" if note else what))
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()[:width] for row in rows]
    if len(order) < len(jobs):
        lines.append(f"and {len(jobs) - len(order)} more: {counts(jobs[i] for i in range(len(jobs)) if i not in order)}")
    return "\n".join(lines)


def counts(jobs: Any) -> str:
    """`3 finished, 1 running`."""
    return ", ".join(f"{count} {state}" for state, count in sorted(Counter(job["state"] for job in jobs).items()))


def progress(folder: Path) -> dict[str, Any]:
    """How far a run is: its step, its seconds, its loss, and the first of FIGURES in its last evaluation."""
    status, rows = read_status(folder), last_rows(folder / "metrics.jsonl")
    if not status:
        return {}
    step = max(status.get("step", 0), rows[-1].get("step", 0) if rows else 0)
    out = {"step": f"{step}/{status.get('total_steps', '?')}", "seconds": rows[-1].get("seconds", 0.0) if rows else 0.0}
    losses = [row["loss"] for row in rows if row.get("split") == "train" and isinstance(row.get("loss"), float)]
    if losses:
        out["loss"] = f"{losses[-1]:.4g}"
    judged = next((row for row in reversed(rows) if row.get("split") == "eval"), {})
    figures = (f"{name} {judged[name]:.4g}" for name in FIGURES if isinstance(judged.get(name), (int, float)))
    return out | {"figure": next(figures, "")}


def last_rows(file: Path) -> list[dict[str, Any]]:
    """The last rows of a file that somebody may be writing; those cut off at either end are left out."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError), open(file, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - TAIL))
        for line in f.read().split(b"\n"):
            with suppress(ValueError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def in_time(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Screen:
    """On a terminal a table that is drawn anew in place; elsewhere a line whenever a job begins or ends."""

    def __init__(self, board: Board):
        self.board, self.live, self.lines, self.next = board, sys.stderr.isatty(), 0, 0.0

    def say(self, line: str) -> None:
        self._clear()
        self._print(f"{line}\n")

    def _print(self, text: str) -> None:
        with suppress(OSError):  # the terminal may be gone
            print(text, end="", file=sys.stderr, flush=True)

    def draw(self) -> None:
        """At most once a second."""
        if self.live and time.monotonic() >= self.next:
            columns, rows = shutil.get_terminal_size()
            text = self.board.table(max(3, rows - 4), columns - 1)
            self._clear()
            self._print(f"{text}\n")
            self.lines, self.next = text.count("\n") + 1, time.monotonic() + 1.0

    def _clear(self) -> None:
        if self.lines:
            self._print(f"\x1b[{self.lines}F\x1b[J")
            self.lines, self.next = 0, 0.0

    def close(self) -> None:
        """The whole table, to stay."""
        self.say(self.board.table())


@contextmanager
def only_one(sweep: Path) -> Iterator[None]:
    """Keeps a second process from running the same sweep. Raises `UserError`."""
    sweep.mkdir(parents=True, exist_ok=True)
    with open(sweep / ".lock", "a", encoding="utf-8") as file:
        for _ in range(20):  # somebody may be looking whether it is locked
            if hold(file):
                break
            time.sleep(0.05)
        else:
            raise UserError(f"another process is running the sweep {sweep}; prefopt sweep status {sweep} shows how it stands")
        yield
