"""Locks that the system drops with the last process that holds them, however it ended: one writer for a run folder, one for a sweep.

They are `flock`s. Between machines they work where the file system passes them on (NFS since Linux 2.6.12, Lustre mounted with `flock`).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from prefopt.errors import UserError

FILE = ".lock"  # in the run folder, while somebody writes to it
BUSY = "is being written by"
PATIENCE = 5.0  # seconds for processes that have lost their parent to end


def hold(file: IO) -> bool:
    """Locks an open file for this process and those that inherit it; False if others hold it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then nothing is known of others
        return True
    return True


def locked(path: Path) -> bool:
    """Whether some process holds a file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keeps the run in `folder` for this process, which is its only writer. Raises `UserError` if it is another one's."""
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    while True:
        with open(path, "ab") as file:
            if not hold(file):
                if time.monotonic() > deadline:
                    raise UserError(_busy(folder))
            elif _is(path, file):
                about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                with suppress(OSError):  # a full disk is for the run to say
                    os.truncate(file.fileno(), 0)
                    os.write(file.fileno(), json.dumps(about).encode())
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is another file now
                return
        time.sleep(0.1)


def check_free(folder: Path) -> None:
    """Raises `UserError` if another process writes to the run in `folder`."""
    deadline = time.monotonic() + PATIENCE
    while locked(folder / FILE):
        if time.monotonic() > deadline:
            raise UserError(_busy(folder))
        time.sleep(0.1)


def _is(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _busy(folder: Path) -> str:
    who = "another process"
    with suppress(OSError, ValueError, KeyError):  # it has only just begun
        holder = json.loads((folder / FILE).read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return f"{folder} {BUSY} {who}; wait until that has ended, or stop it, or choose another hydra.run.dir"
