"""What tests of the launcher share: small runs in processes of their own, and programs of a cluster that really run what they are given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
BANDIT = ["algo=dpo", "model=bandit", "data=bandit", "train.eval_every=100000", "optim.schedule=constant", "optim.lr=0.01"]
LONG = [*BANDIT, "train.steps=100000"]  # goes on until it is ended


def torchrun(*command: str, **environment: str) -> None:
    """Two processes run a module to its end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **environment}
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
                           env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = run.communicate(timeout=480)[1]
    finally:
        run.terminate()  # and not kill: it ends its workers
    assert run.returncode == 0, said.partition("ChildFailedError")[0][-6000:]  # and not torchrun's summary


def leave_together() -> None:
    """A process that ends while another still talks to it can abort it, or be aborted."""
    dist.barrier()
    dist.destroy_process_group()


def begin(*words: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """`prefopt train` with `words`, as an argument of the command `before`; what it says comes through `stderr`."""
    command = [*before, sys.executable, "-m", "prefopt.cli", "train", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def end(run: subprocess.Popen, timeout: float = 300) -> tuple[int, str]:
    """(exit code, what it said)"""
    try:
        said = run.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        run.terminate()
        raise
    return run.returncode, said


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def wait(ready: Callable[[], bool], run: subprocess.Popen | None = None, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, "nothing came"
        assert run is None or run.poll() is None, run.communicate()[1][-3000:]
        time.sleep(0.1)


def record(folder: Path, rank: int) -> dict:
    return read(folder / "logs" / f"rank-{rank}.json")


def under_way(folder: Path, run: subprocess.Popen, step: int = 5, ranks: int = 2) -> None:
    wait(lambda: all(record(folder, rank).get("step", 0) >= step for rank in range(ranks)), run)


def signal_rank(folder: Path, rank: int, number: signal.Signals) -> None:
    os.kill(record(folder, rank)["pid"], number)


def program(folder: Path, name: str, text: str) -> None:
    """An executable `name`, for a PATH that begins with `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
