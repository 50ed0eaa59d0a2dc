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
from pathlib import Path
from typing import Any

from prefopt.config.schema import TrainConfig
from prefopt.launch.group import ARGV_ENV, CONFIG_ENV, leader
from prefopt.training.ranks import forget_records
from prefopt.training.signals import STOPS


def is_inline(cfg: TrainConfig) -> bool:
    """Whether one process, on this machine, is all of it."""
    return cfg.hardware.processes == cfg.hardware.nodes == 1


def worker_command(cfg: TrainConfig) -> list[str]:
    """The command that runs a claimed run in a process (group) of its own: on this machine, one of `hardware.nodes`."""
    return [sys.executable, "-m", "prefopt.launch.worker" if is_inline(cfg) else "prefopt.launch.elastic"]


def worker_environment(cfg: TrainConfig, argv: list[str]) -> dict[str, str]:
    """The config travels in the environment, so nothing is written that a kill could leave behind."""
    env = {**os.environ, CONFIG_ENV: json.dumps(asdict(cfg)), ARGV_ENV: json.dumps(argv)}
    if cfg.hardware.processes > 1:
        # Without it every process takes all cores, and they fight.
        env.setdefault("OMP_NUM_THREADS", str(cfg.hardware.threads or max(1, (os.cpu_count() or 1) // cfg.hardware.processes)))
    return env


def run_here(cfg: TrainConfig) -> dict[str, Any]:
    """Runs to the end: in this process if one is enough, as rank 0 of a group that it was started in, else in workers, whose output is
    passed through. Exits as they did."""
    if ahead := leader():
        forget_records(Path(cfg.run_dir))
        ahead.run(cfg)
        return join(cfg)
    if is_inline(cfg):
        from prefopt.training.loop import train

        return train(cfg)
    # A group of their own: the terminal's Ctrl-C reaches this process only, which passes it on once.
    process = subprocess.Popen(worker_command(cfg), env=worker_environment(cfg, sys.argv[1:]), start_new_session=True)
    with forwarding(process):
        code = process.wait()
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return {}


def join(cfg: TrainConfig) -> dict[str, Any]:
    """Runs this rank's part, in a group that somebody else started. The rank that failed first says so; exits with its code."""
    from prefopt.launch.verdict import conclude, spoken
    from prefopt.launch.worker import run_rank

    code, stopped = run_rank(cfg)
    if code and not stopped:
        rank, folder = int(os.environ["RANK"]), Path(cfg.run_dir)
        sentence = spoken(folder, rank, int(os.environ["WORLD_SIZE"]), cfg.hardware.timeout)
        if sentence:
            print(f"prefopt: {sentence}", file=sys.stderr, flush=True)
            conclude(folder, sentence)
    if code:
        raise SystemExit(code)
    return {}


@contextmanager
def forwarding(process: subprocess.Popen) -> Iterator[list[int]]:
    """Passes signals that ask for a stop on to a process group; yields the list of those that came. Nothing of the group is left behind."""
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        came.append(number)
        os.killpg(process.pid, number)

    old = {number: signal.signal(number, forward) for number in STOPS}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
