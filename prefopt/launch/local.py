"""One run -> processes. The parent has composed, checked and claimed; here it runs inline, or starts workers with torch elastic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from prefopt.config.schema import TrainConfig
from prefopt.errors import RunFailed

CONFIG_ENV, ARGV_ENV = "PREFOPT_CONFIG", "PREFOPT_ARGV"


def worker_command(cfg: TrainConfig) -> list[str]:
    """The command that runs a claimed run in a process (group) of its own."""
    module = ["-m", "prefopt.launch.worker"]
    if cfg.hardware.processes == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cfg.hardware.processes}",
            "--max-restarts=0", *module]


def worker_environment(cfg: TrainConfig, argv: list[str]) -> dict[str, str]:
    """The config travels in the environment, so nothing is written that a kill could leave behind."""
    env = {**os.environ, CONFIG_ENV: json.dumps(asdict(cfg)), ARGV_ENV: json.dumps(argv)}
    if cfg.hardware.processes > 1:
        # Without it every process takes all cores, and they fight.
        env.setdefault("OMP_NUM_THREADS", str(cfg.hardware.threads or max(1, (os.cpu_count() or 1) // cfg.hardware.processes)))
    return env


def run_here(cfg: TrainConfig, train: Callable[[TrainConfig], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Runs to the end: in this process if one is enough, else in workers whose output is passed through."""
    if cfg.hardware.processes == 1:
        from prefopt.training.loop import train as train_loop

        return (train or train_loop)(cfg)
    process = subprocess.Popen(worker_command(cfg), env=worker_environment(cfg, sys.argv[1:]))
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the terminal sends Ctrl-C to the workers too; they save and end
    if code not in (0, 130, 143):
        raise RunFailed(f"a worker process ended with code {code}; its message is above")
    return {"exit_code": code} | ({"stopped": "a signal"} if code else {})
