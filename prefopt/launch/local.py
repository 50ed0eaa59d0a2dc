"""One run -> processes. The parent has composed, checked and claimed; here it runs inline, or starts workers with torch elastic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from prefopt.config.schema import TrainConfig

CONFIG_ENV, ARGV_ENV = "PREFOPT_CONFIG", "PREFOPT_ARGV"


def worker_command(cfg: TrainConfig) -> list[str]:
    """The command that runs a claimed run in a process (group) of its own."""
    if cfg.hardware.processes == 1:
        return [sys.executable, "-m", "prefopt.launch.worker"]
    return [sys.executable, "-m", "prefopt.launch.elastic", str(cfg.hardware.processes)]


def worker_environment(cfg: TrainConfig, argv: list[str]) -> dict[str, str]:
    """The config travels in the environment, so nothing is written that a kill could leave behind."""
    env = {**os.environ, CONFIG_ENV: json.dumps(asdict(cfg)), ARGV_ENV: json.dumps(argv)}
    if cfg.hardware.processes > 1:
        # Without it every process takes all cores, and they fight.
        env.setdefault("OMP_NUM_THREADS", str(cfg.hardware.threads or max(1, (os.cpu_count() or 1) // cfg.hardware.processes)))
    return env


def run_here(cfg: TrainConfig) -> dict[str, Any]:
    """Runs to the end: in this process if one is enough, else in workers, whose output is passed through. Exits as they did."""
    if cfg.hardware.processes == 1:
        from prefopt.training.loop import train

        return train(cfg)
    # A group of their own: the terminal's Ctrl-C reaches this process only, which passes it on once.
    process = subprocess.Popen(worker_command(cfg), env=worker_environment(cfg, sys.argv[1:]), start_new_session=True)
    with forwarding(process):
        code = process.wait()
    if code:
        raise SystemExit(code)
    return {}


@contextmanager
def forwarding(process: subprocess.Popen) -> Iterator[list[int]]:
    """Passes SIGINT and SIGTERM on to a process group; yields the list of those that came. Nothing of the group is left behind."""
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        came.append(number)
        os.killpg(process.pid, number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
