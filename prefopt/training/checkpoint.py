"""Checkpoints: safetensors and JSON, no pickle. Written under a temporary name, flushed to the disk, then renamed; checked by sha256 when
they are read.

A checkpoint holds the trainable weights, AdamW's moments, other weights that move (a reference, say), the step, totals, and the CPU random
state. The data order needs no state: it follows from (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prefopt.errors import UserError
from prefopt.training.engine import Engine
from prefopt.training.parallel import TrainingState, copied


@dataclass
class Snapshot:
    """A run at one step, in CPU memory, where later steps do not change it. `state`: totals, as JSON."""

    training: TrainingState
    beside: dict[str, dict[str, torch.Tensor]]
    rng: torch.Tensor
    state: dict[str, Any]


def take(engine: Engine, state: dict[str, Any]) -> Snapshot | None:
    """What a checkpoint holds, for the main process; None for the others. Every process calls it."""
    main = engine.accelerator.is_main_process
    training = engine.parallel.state(main)
    if training is None:
        return None
    beside = {name: {n: copied(t) for n, t in held.state().items()} for name, held in engine.beside.items()}
    return Snapshot(training, beside, torch.get_rng_state(), {**state, "updates": training.updates})


def save(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Writes `folder/step-NNNNNN` and removes all but the newest `keep` checkpoints and the best one (`state["best"]`)."""
    target = folder / f"step-{snapshot.state['step']:06d}"
    part = folder / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with naming(target):
            save_file(snapshot.training.weights, part / "weights.safetensors")
            save_file({"rng": snapshot.rng, **snapshot.training.moments}, part / "optimizer.safetensors")
            for name, tensors in snapshot.beside.items():
                save_file(tensors, part / f"{name}.safetensors")
        files = {f.name: _sha256(f) for f in sorted(part.iterdir())}
        (part / "state.json").write_text(json.dumps({**snapshot.state, "files": files}, indent=2))
        for path in (*part.iterdir(), part):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        _flush(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    best = (snapshot.state.get("best") or {}).get("step")
    for old in steps(folder)[:-keep]:
        if old.name != f"step-{best or 0:06d}":
            gone = old.with_name(f".{old.name}.part")  # a kill in the middle of this must not leave what looks like a checkpoint
            old.rename(gone)
            shutil.rmtree(gone)
    return target


def clear(folder: Path) -> None:
    """Takes away what a kill has left, in a run's folder, of files and checkpoints that were being written or removed. For the run itself:
    others may be reading."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
    for part in (folder / "checkpoints").glob(".*.part"):
        shutil.rmtree(part)


class Writer:
    """Writes checkpoints while training goes on: one at a time, so that at most one copy of the training state waits in memory."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.written: dict[str, Any] | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Begins to write one. Call `wait` before."""
        self.thread = Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def wait(self) -> dict[str, Any] | None:
        """Waits for the one that is being written: its `step`, `bytes` and `write_seconds`; None if there is none. Raises what it met."""
        if self.thread is None:
            return None
        self.thread.join()
        self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.written

    def _write(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        try:
            path = save(self.folder, snapshot, self.keep)
            size = sum(file.stat().st_size for file in path.iterdir())
            self.written = {"step": snapshot.state["step"], "bytes": size, "write_seconds": round(time.monotonic() - began, 4)}
        except BaseException as error:  # raised again in the thread that waits
            self.error = error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """safetensors tells of a failed write in a type of its own that names no file; here it becomes an `OSError` that does."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "SafetensorError" and (match := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
        raise


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def problem(path: Path) -> str:
    """What is wrong with the files of a checkpoint; empty where they are as they were written."""
    try:
        for name, digest in _read_state(path / "state.json")[1].items():
            if _sha256(path / name) != digest:
                return f"{name} does not have the checksum it was written with"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def load(folder: Path, engine: Engine) -> dict[str, Any]:
    """Puts the newest checkpoint into the engine and returns its state. Of damaged ones it says what is wrong, and takes the one before;
    `UserError` where there is none."""
    *earlier, path = steps(folder)
    while True:
        try:
            return _load(path, engine)
        except Damaged as error:
            if not earlier:
                raise UserError(f"{error}, and there is none before it; remove {folder.parent} to start anew") from error
            if engine.accelerator.is_main_process:
                print(f"{error}; going on from {earlier[-1].name}", file=sys.stderr)
            path = earlier.pop()


class Damaged(Exception):
    """A checkpoint is not what was written; the message names it."""


def _load(path: Path, engine: Engine) -> dict[str, Any]:
    try:
        if wrong := problem(path):
            raise ValueError(wrong)
        state, _ = _read_state(path / "state.json")
        weights, moments = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
        parameters = engine.policy.trainable()
        if set(weights) != set(parameters):
            raise ValueError("it holds other weights than this model trains")
        engine.parallel.load(TrainingState(weights, moments, state["updates"]))
        for name, held in engine.beside.items():
            held.load(load_file(path / f"{name}.safetensors"))
        torch.set_rng_state(moments["rng"])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Damaged(f"the checkpoint {path} is damaged ({error})") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise Damaged(f"the checkpoint {path} is damaged ({error})") from error
        raise
    return state


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A checkpoint's totals, and the sha256 of each of its files."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return state, dict(state["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not what was written: {error}") from error


def _flush(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk: no name is to survive a power cut that its content does not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # not every network file system can do it for folders
            raise
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
