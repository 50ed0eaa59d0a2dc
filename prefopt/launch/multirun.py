"""Hydra multirun: every job is a process group of its own with its own folder and log. A failing job never stops the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from prefopt.config.compose import typed
from prefopt.config.schema import TrainConfig
from prefopt.data.fits import check_data
from prefopt.errors import RunFailed, UserError
from prefopt.launch.local import forwarding, worker_command, worker_environment
from prefopt.launch.nodes import check_job
from prefopt.launch.stages import Stage, stages_of
from prefopt.tracking.redact import redact
from prefopt.tracking.trackers import check_trackers
from prefopt.training.deepspeed_json import check_zero
from prefopt.training.rundir import claim, hide_secrets, read_status, release, write_atomic


class JobLauncher(Launcher):
    """Checks every job's config before the first one starts, then runs them one after the other."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        sweep = Path(self.config.hydra.sweep.dir)
        jobs = [self._compose(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        hide_secrets(sweep / "multirun.yaml")  # Hydra's own record
        board = Board(sweep, [(overrides, cfg.run_dir) for overrides, cfg, _ in jobs])
        for number, (overrides, cfg, first) in enumerate(jobs):
            board.set(number, "running")
            print(f"job {number + 1}/{len(jobs)}: {' '.join(overrides) or 'no overrides'}", file=sys.stderr)
            state, message = run_job(cfg, overrides, first)
            board.set(number, state, message)
            if state == "stopped":
                break
        print(board.table(), file=sys.stderr)
        states = [job["state"] for job in board.jobs]
        if "stopped" in states:
            raise RunFailed(f"the sweep was stopped; the same command with hydra.sweep.dir={sweep} goes on with it")
        if bad := [j for j in board.jobs if j["state"] == "failed"]:
            raise RunFailed(f"{len(bad)} of {len(jobs)} jobs failed; their messages are above and in {sweep / 'sweep.json'}")
        return [self._returned(overrides) for overrides, *_ in jobs]

    def _compose(self, overrides: list[str], number: int) -> tuple[list[str], TrainConfig, list[Stage]]:
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
            check_job(cfg.hardware)
            return overrides, cfg, first
        except UserError as error:
            raise UserError(f"job {number + 1} ({' '.join(overrides)}): {str(error).rstrip('.')}. No job was started.") from error

    def _returned(self, overrides: list[str]) -> JobReturn:
        done = JobReturn(overrides=overrides, cfg=OmegaConf.create(), hydra_cfg=OmegaConf.create(), status=JobStatus.COMPLETED)
        done.return_value = None
        return done


class Board:
    """sweep.json: what each job is and how it stands."""

    def __init__(self, sweep: Path, jobs: list[tuple[list[str], str]]):
        self.path = sweep / "sweep.json"
        new = {"state": "waiting", "message": "", "seconds": 0.0}
        self.jobs: list[dict[str, Any]] = [{"overrides": o, "run_dir": d, **new} for o, d in jobs]
        self.since = time.monotonic()

    def set(self, number: int, state: str, message: str = "") -> None:
        if state == "running":
            self.since = time.monotonic()
        self.jobs[number] |= {"state": state, "message": message, "seconds": round(time.monotonic() - self.since, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(redact(self.jobs), indent=2))

    def table(self) -> str:
        lines = [f"{'state':<9} {'seconds':>8}  job"]
        for job in self.jobs:
            note = f"  ({job['message'].splitlines()[-1][:160]})" if job["state"] == "failed" and job["message"] else ""
            lines.append(f"{job['state']:<9} {job['seconds']:>8.1f}  {' '.join(job['overrides']) or 'no overrides'}{note}")
        return "\n".join(lines)


def run_job(cfg: TrainConfig, overrides: list[str], first: Sequence[Stage] = ()) -> tuple[str, str]:
    """(state, message) of one job: finished, failed or stopped. As in `prefopt train`, its folder is claimed before the stages that come
    first are run: nothing is trained for a run that is there already, or cannot follow.
    """
    try:
        if claim(cfg, cfg.algo["name"]) == "finished":
            return "finished", "had finished before"
    except UserError as error:
        return "failed", str(error)
    try:
        for stage in first:
            state, message = run_job(stage.cfg, stage.words)
            if state != "finished":
                return state, f"stage {stage.name}: {message}"
        return run_apart(cfg, overrides)
    finally:
        release(Path(cfg.run_dir))


def run_apart(cfg: TrainConfig, overrides: list[str]) -> tuple[str, str]:
    """(state, message) of a claimed run in processes of its own, whose output goes to log.txt in its folder."""
    folder = Path(cfg.run_dir)
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(worker_command(cfg), env=worker_environment(cfg, ["train", *overrides]), stdout=log, stderr=log,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
        with forwarding(process) as stop:
            code = process.wait()
    hide_secrets(folder / "log.txt")
    status = read_status(folder)
    if stop:
        return "stopped", "stopped by a signal; the same command continues it"
    if code == 0:
        return "finished", ""
    said = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    reason = status.get("message") or (said[-1] if said else "")
    return "failed", f"exit code {code}: {reason}"
