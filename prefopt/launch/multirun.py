"""Hydra multirun: a launcher that runs jobs beside each other, records what becomes of each, and can go on where it was stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from prefopt.config.compose import typed
from prefopt.data.fits import check_data
from prefopt.errors import RunFailed, UserError
from prefopt.launch.board import DONE, FAILED, Board, only_one
from prefopt.launch.jobs import Given, Job, left_of, run_jobs, warn_if_shared
from prefopt.launch.machine import Machine
from prefopt.launch.nodes import check_job
from prefopt.launch.optuna_sweeper import OptunaSweeper
from prefopt.launch.stages import stages_of
from prefopt.tracking.redact import redact
from prefopt.tracking.trackers import check_trackers
from prefopt.training.deepspeed_json import check_zero
from prefopt.training.rundir import hide_secrets, write_atomic

__all__ = ["JobLauncher", "OptunaSweeper"]  # what Hydra looks for here

COMMAND = "command.json"


class JobLauncher(Launcher):
    """Checks every job's config before the first one starts, then runs them, `jobs` at once; null: as many as the machine has GPUs (or, on
    the CPU, cores for their `hardware.threads`). `retry_failed`: whether jobs that failed before are run again.
    """

    def __init__(self, jobs: int | None = None, retry_failed: bool = True):
        self.machine, self.retry_failed = Machine(jobs), retry_failed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context
        self.sweep = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        jobs = [self.compose(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        for job in jobs:
            job.label = " ".join(word for word in job.overrides if word not in common)
        warn_if_shared(self.machine, jobs)
        with only_one(self.sweep):
            board = self.open_board()
            for job in jobs:
                board.add(job.number, job.overrides, job.cfg.run_dir)
            due = [job for job in jobs if self.due(board, job.number)]
            for job in due:
                self.adopt(board, job)
            self.run(Given(sorted(due, key=lambda job: job.left is None)), board)  # what still runs keeps its share of the machine
        return [_returned(job) for job in jobs]

    def compose(self, overrides: list[str], number: int) -> Job:
        """A job of the sweep. Raises `UserError`, which names it."""
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir)
        HydraConfig.instance().set_config(config)
        try:
            cfg = typed(config, "train", config.hydra.runtime.choices.algo)
            first = stages_of(cfg)
            for part in (*(stage.cfg for stage in first), cfg):
                check_data(part)
                check_trackers(part.tracker)
                check_zero(part)
                check_job(part.hardware)
                self.machine.check(part.hardware)
            return Job(number, overrides, cfg, first, label=" ".join(overrides))
        except UserError as error:
            raise UserError(f"job {number + 1} ({' '.join(overrides)}): {str(error).rstrip('.')}. No job was started.") from error

    def open_board(self) -> Board:
        """The board of the sweep, and beside it the command that goes on with the sweep."""
        hide_secrets(self.sweep / "multirun.yaml")  # Hydra's own record
        command = {"words": redact(sys.argv[2:]), "folder": redact(os.getcwd())}
        write_atomic(self.sweep / COMMAND, json.dumps(command, indent=2))
        return Board(self.sweep)

    def due(self, board: Board, number: int) -> bool:
        """Whether a job is to be run, as far as an earlier start of the sweep can say."""
        state = board.jobs[number]["state"]
        return state != "pruned" and (self.retry_failed or state not in FAILED)

    def adopt(self, board: Board, job: Job) -> None:
        """Takes a job up where an earlier start of the sweep left it: its processes may still run."""
        known = board.jobs[job.number]
        job.left = left_of(known.get("process") or "") if known["state"] == "running" else None
        if known["state"] not in DONE:
            known["state"] = "waiting"

    def run(self, queue: Given, board: Board) -> None:
        """Runs the jobs of a queue. Raises `RunFailed` if some failed; a signal ends the command as it ends a run."""
        board.write()
        stopped = run_jobs(queue, board, self.machine)
        if stopped:
            print(f"prefopt: the sweep was stopped; prefopt sweep resume {self.sweep} goes on with it", file=sys.stderr)
            raise SystemExit(128 + stopped)
        if bad := [job for job in board.jobs if job["state"] in FAILED]:
            raise RunFailed(f"{len(bad)} of {len(board.jobs)} jobs failed; their messages are above and in {board.path}")
        if left := [job for job in board.jobs if job["state"] == "stopped"]:
            raise RunFailed(f"{len(left)} of {len(board.jobs)} jobs were stopped; prefopt sweep resume {self.sweep} goes on with them")


def _returned(job: Job) -> JobReturn:
    done = JobReturn(overrides=job.overrides, cfg=OmegaConf.create(), hydra_cfg=OmegaConf.create(), status=JobStatus.COMPLETED)
    done.return_value = None
    return done
