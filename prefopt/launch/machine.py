"""What jobs of a sweep share: GPUs and CPU cores of this machine. Asked of the driver's tools, so that no CUDA context is made here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from prefopt.config.schema import HardwareConfig
from prefopt.errors import UserError


@dataclass
class Share:
    """What a job has of the machine while it runs. `gpus` are names that CUDA_VISIBLE_DEVICES takes."""

    gpus: list[str]
    cores: int
    threads: int | None = None  # per process, where jobs run beside each other; None: as the run itself decides


class Machine:
    """Deals GPUs and cores to jobs. `at_once` is the most jobs that run at a time; None: as many as have a GPU, or their
    `hardware.threads`, to themselves.
    """

    def __init__(self, at_once: int | None = None, gpus: list[str] | None = None, cores: int | None = None):
        if at_once is not None and at_once < 1:
            raise UserError(f"hydra.launcher.jobs={at_once} must be at least 1, or null")
        self.at_once = at_once
        self.gpus = visible_gpus() if gpus is None else gpus
        self.cores = cores or usable_cores()

    def check(self, hardware: HardwareConfig) -> None:
        """Raises `UserError` for a job that this machine cannot run."""
        if self.gpus and (need := self._gpus(hardware)) > len(self.gpus):
            raise UserError(f"hardware.processes={need} asks for {need} GPUs, and this machine shows {len(self.gpus)} "
                            f"({', '.join(self.gpus)}); set hardware.processes={len(self.gpus)}")

    def share(self, hardware: HardwareConfig, running: Collection[Share]) -> Share | None:
        """What a job gets beside those that run; None: it has to wait. Alone, it gets what it needs."""
        need, cores = self._gpus(hardware), 0 if self._gpus(hardware) else self._cores(hardware)
        users = Counter(gpu for other in running for gpu in other.gpus)
        chosen = sorted(self.gpus, key=lambda gpu: (users[gpu], self.gpus.index(gpu)))[:need]
        if self.at_once is not None:
            fits = len(running) < self.at_once
        elif need:
            fits = all(users[gpu] == 0 for gpu in chosen)
        else:
            fits = sum(other.cores for other in running) + cores <= self.cores
        if running and not fits:
            return None
        beside = self.beside(hardware)
        threads = max(1, self.cores // (beside * hardware.processes)) if beside > 1 and not hardware.threads else None
        return Share(chosen, cores, threads)

    def beside(self, hardware: HardwareConfig) -> int:
        """How many such jobs may run at once."""
        if self.at_once is not None:
            return self.at_once
        need = self._gpus(hardware)
        return max(1, len(self.gpus) // need if need else self.cores // self._cores(hardware))

    def _gpus(self, hardware: HardwareConfig) -> int:
        return hardware.processes if self.gpus and hardware.device in ("auto", "cuda") else 0

    def _cores(self, hardware: HardwareConfig) -> int:
        return min(self.cores, hardware.threads * hardware.processes) if hardware.threads else self.cores


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or else the numbers of the GPUs that nvidia-smi lists; empty where there is no driver."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in given.split(",")]
        valid = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))  # CUDA looks no further
        return names[:valid]
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    try:
        done = subprocess.run([program, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()] if done.returncode == 0 else []


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
