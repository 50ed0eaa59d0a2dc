"""What each of several processes of a run leaves behind in RUN/logs: rank-N.log, all that it printed, and rank-N.json, where it is and how
it ended. A process that hangs says nothing itself; the others, and whoever started it, read its file.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from prefopt.tracking.redact import redact
from prefopt.training.rundir import hide_secrets, write_atomic

FOLDER = "logs"
PACKAGE = str(Path(__file__).parents[1])
# What gloo, NCCL and the store say when another process is gone, or does not come.
_TIMEOUT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|recvvalue|store", re.IGNORECASE)


def log_path(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.log"


def record_path(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.json"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of all ranks, in their order; a damaged one is left out."""
    found = []
    for path in (folder / FOLDER).glob("rank-*.json"):
        with suppress(OSError, ValueError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda record: record["rank"])


def forget_records(folder: Path) -> None:
    """Before a start: what an earlier one has recorded says nothing about this one. Logs are kept."""
    for path in (folder / FOLDER).glob("*.json"):
        path.unlink(missing_ok=True)


def kind_of(error: BaseException) -> str:
    """Whether an error is this process's own ("error"), or that another one is gone ("lost") or did not come ("timeout")."""
    module = type(error).__module__.partition(".")[0]
    if not isinstance(error, (RuntimeError, ConnectionError)) or module not in ("builtins", "torch"):
        return "error"
    said = str(error)
    if not (type(error).__name__.startswith("Dist") or isinstance(error, ConnectionError) or _LOST.search(said)):
        return "error"
    return "timeout" if _TIMEOUT.search(said) else "lost"


class Member:
    """One of several processes of a run. Its thread writes the record every few seconds, also while the process waits or computes."""

    def __init__(self, folder: Path, rank: int, timeout: float, echo: Echo | None):
        self.folder, self.rank, self.echo = folder, rank, echo
        self.thread_id = threading.get_ident()
        self.state: dict[str, Any] = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "step": 0, "state": "running",
                                      "message": "", "kind": "", "traceback": False, "code": 0}
        self.every = min(10.0, max(0.2, timeout / 10))
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.write()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def write(self) -> None:
        with self.lock:
            row = {**self.state, "where": where(sys._current_frames().get(self.thread_id)), "time": time.time()}
            write_atomic(record_path(self.folder, self.rank), json.dumps(redact(row)))

    def _beat(self) -> None:
        while not self.ended.wait(self.every):
            with suppress(OSError):  # a full disk is for the loop to say
                self.write()

    def hush(self) -> None:
        """From now on what is printed goes to the log only."""
        if self.echo is not None:
            _flush()
            self.echo.end()
            self.echo = None

    def end(self, state: str, code: int = 0, message: str = "", kind: str = "", traceback: bool = False) -> None:
        """The last record: finished, stopped or failed."""
        self.ended.set()
        self.thread.join()
        self.state |= {"state": state, "message": message, "code": code, "kind": kind, "traceback": traceback}
        with suppress(OSError):
            self.write()


_here: Member | None = None


def at(step: int) -> None:
    """Notes how far this process is; nothing where it is the only one."""
    if _here is not None:
        _here.state["step"] = step


def where(frame: FrameType | None) -> str:
    """The innermost line of prefopt that a thread is in."""
    while frame is not None:
        if (file := frame.f_code.co_filename).startswith(PACKAGE):
            return f"{file[len(PACKAGE) - len('prefopt'):]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@contextmanager
def member(folder: Path, rank: int, world: int, timeout: float) -> Iterator[Member]:
    """Makes this process rank `rank` of a run: what it prints goes to its log (rank 0: also to where it went before), its record begins."""
    global _here
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    log = os.open(log_path(folder, rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(log, f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {rank} of {world} on {socket.gethostname()}\n".encode())
    began = os.fstat(log).st_size
    _flush()
    before = [os.dup(1), os.dup(2)]
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    echo = Echo(log_path(folder, rank), began, before[1]) if rank == 0 else None
    me = _here = Member(folder, rank, timeout, echo)
    try:
        yield me
    finally:
        _here = None
        me.hush()
        _flush()
        for stream, old in zip((1, 2), before, strict=True):
            os.dup2(old, stream)
            os.close(old)
        hide_secrets(log_path(folder, rank))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


class Echo:
    """Copies what is added to a file to a file descriptor. The file comes first, so a process that dies leaves its last words there."""

    def __init__(self, path: Path, offset: int, to: int):
        self.source, self.to, self.ended = open(path, "rb", buffering=0), to, threading.Event()
        self.source.seek(offset)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            last = self.ended.wait(0.1)  # asked before the file is read: nothing is added after it is set
            while data := self.source.read(1 << 16):
                with suppress(OSError):  # the terminal is gone; the log goes on
                    os.write(self.to, data)
            if last:
                return

    def end(self) -> None:
        self.ended.set()
        self.thread.join()
        self.source.close()
