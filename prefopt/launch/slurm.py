"""SLURM: the batch script of a run, and its submission. The job goes on in a new one until the run is finished."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError
from prefopt.launch.nodes import node_words
from prefopt.training.rundir import write_atomic

SCRIPT = "job.sh"
CPUS = 8  # of a process, where hardware.threads does not say; SLURM's own default is one for the whole task


def job_script(cfg: TrainConfig, words: Sequence[str], directory: Path) -> str:
    """The text of the batch script: one task per node, each of which starts its workers. `directory`: where the command was typed."""
    hardware, slurm, folder = cfg.hardware, cfg.hardware.slurm, Path(cfg.run_dir).absolute()
    _check(slurm.time, slurm.options)
    name = re.sub(r"[^\w.-]+", "_", folder.name)[:40]
    options = {
        "job-name": f"prefopt-{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}",
        "dependency": "singleton",  # of the same name, which is the run's: never two jobs in one folder
        "nodes": hardware.nodes, "ntasks-per-node": 1,
        "gpus-per-node": hardware.processes if hardware.device in ("auto", "cuda") else None,
        "cpus-per-task": hardware.processes * (hardware.threads or CPUS),
        "partition": slurm.partition, "account": slurm.account, "time": slurm.time, "signal": f"B:USR1@{slurm.grace}",
        "open-mode": "append", "output": folder / "logs" / "slurm-%j.log", "chdir": directory,
    }
    lines = [f"#SBATCH --{key}={_quoted(str(value))}" for key, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in slurm.options)]
    meets = hardware.nodes > 1
    command = shlex.join([sys.executable, "-m", "prefopt.cli", "train", *node_words(cfg, words, None)])
    if meets:
        command += ' hardware.rendezvous="$head:$port"'
    rendezvous = ['head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "port=$((20000 + SLURM_JOB_ID % 20000))"]
    return "\n".join([
        "#!/bin/bash", *lines, "",
        "# SLURM warns this shell before the time limit. The run then writes a checkpoint and stops, and the job is queued again.",
        *(rendezvous if meets else []),
        'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it from the job',
        "warned=0",
        "trap 'warned=1; kill -USR1 \"$step\"' USR1",
        f"srun --kill-on-bad-exit=0 {command} &",
        "step=$!",
        'while kill -0 "$step" 2> /dev/null; do wait "$step"; done',
        'wait "$step"',
        "code=$?",
        'if [ "$warned" = 1 ] && [ "$code" != 0 ]; then',
        '  scontrol requeue "$SLURM_JOB_ID" && exit 0',
        "fi",
        'exit "$code"', "",
    ])


def submit(cfg: TrainConfig, words: Sequence[str]) -> str:
    """Writes RUN/job.sh and hands it to sbatch; returns the job's number. Raises `UserError` where SLURM is missing or refuses."""
    folder = Path(cfg.run_dir).absolute()
    script = job_script(cfg, words, Path.cwd())
    if shutil.which("sbatch") is None:  # before anything is written
        raise UserError("hardware.launcher=slurm needs sbatch, which is not on this machine's PATH; run the command on a login node of the "
                        "cluster, or use hardware.launcher=local")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SCRIPT, script)
    done = subprocess.run(["sbatch", "--parsable", str(folder / SCRIPT)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"sbatch refused {folder / SCRIPT}: {said}. It can be mended in hardware.slurm.partition, account, time and "
                        "options")
    return done.stdout.strip().partition(";")[0]


def _check(time: str, options: Sequence[str]) -> None:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}|UNLIMITED|INFINITE", time):
        raise UserError(f"hardware.slurm.time={time} is no time; write days-hours:minutes:seconds, such as \"24:00:00\" or 2-00:00:00")
    for option in options:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"hardware.slurm.options: {option!r} is no option of sbatch; write it as in --constraint=h100")


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w./:@%+,-]+", value) else '"' + value.replace('"', r"\"") + '"'
