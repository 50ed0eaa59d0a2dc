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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from prefopt.errors import UserError
from prefopt.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(folder: Path, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-NNNNNN` and removes all but the newest `keep` checkpoints."""
    target = folder / f"step-{state['step']:06d}"
    part = folder / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        weights = {n: p.detach().cpu().contiguous() for n, p in engine.policy.trainable().items()}
        with naming(target):
            save_file(weights, part / "weights.safetensors")
            save_file(_optimizer_tensors(engine), part / "optimizer.safetensors")
            for name, held in engine.beside.items():
                save_file({n: t.detach().cpu().contiguous() for n, t in held.state().items()}, part / f"{name}.safetensors")
        files = {f.name: _sha256(f) for f in sorted(part.iterdir())}
        (part / "state.json").write_text(json.dumps({**state, "files": files}, indent=2))
        for path in (*part.iterdir(), part):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        _flush(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old)
    return target


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
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        optimizer = _inner(engine)
        for name, parameter in parameters.items():
            if f"{name}.exp_avg" in moments:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["updates"])),
                    **{m: moments[f"{name}.{m}"].to(parameter.device).clone() for m in MOMENTS},
                }
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


def updates(engine: Engine) -> int:
    """How many optimiser updates have been made (skipped steps are none)."""
    state = _inner(engine).state
    return max((int(s["step"]) for s in state.values() if "step" in s), default=0)


def _optimizer_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    state = _inner(engine).state
    out = {"rng": torch.get_rng_state()}
    for name, parameter in engine.policy.trainable().items():
        for moment in MOMENTS if parameter in state else ():
            out[f"{name}.{moment}"] = state[parameter][moment].detach().cpu().contiguous()
    return out


def _inner(engine: Engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


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
