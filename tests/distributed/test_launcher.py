"""Several processes: logs of all, the first cause in one sentence, ranks that hang or die, groups that others have started, SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.config.schema import HardwareConfig, TrainConfig
from prefopt.launch.elastic import exits_of, launch_config
from tests.distributed.launching import BANDIT, LONG, begin, end, program, read, record, signal_rank, under_way, wait


def test_a_rank_that_hangs_is_named_and_the_run_can_go_on(tmp_path):
    run = begin(*LONG, "hardware=2xcpu", "hardware.timeout=4", f"hydra.run.dir={tmp_path / 'run'}", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    under_way(tmp_path / "run", run)
    signal_rank(tmp_path / "run", 1, signal.SIGSTOP)
    code, said = end(run)
    assert code == 1
    assert "prefopt: rank 1 did not arrive within 4 s (hardware.timeout): last seen after step" in said
    assert "Traceback" not in said and "Timed out waiting" in (tmp_path / "run/logs/rank-0.log").read_text()
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "failed" and "rank 1 did not arrive" in status["message"]


def test_what_ended_a_rank_is_what_the_user_sees(tmp_path):
    run = begin(*LONG, "hardware=2xcpu", f"hydra.run.dir={tmp_path / 'run'}")
    under_way(tmp_path / "run", run)
    signal_rank(tmp_path / "run", 1, signal.SIGKILL)
    code, said = end(run)
    assert code == 1
    assert "prefopt: rank 1 was ended by SIGKILL" in said and str(tmp_path / "run/logs/rank-1.log") in said
    assert "Traceback" not in said and "Connection closed" not in said  # which rank 0 saw, and has in its log
    assert read(tmp_path / "run" / "status.json")["state"] == "failed"


# Rank 1 is the first to die. Rank 0 fails as soon as rank 1's connections close, or goes on until it is ended.
DYING = """import os, pathlib, signal, sys, time
gone, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
if rank == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gone.touch()
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGKILL)
while not gone.exists():
    time.sleep(0.01)
sys.exit(1) if sys.argv[2] != "0" else time.sleep(600)"""


@pytest.mark.parametrize("late, exits", [("1", {0: 1, 1: -signal.SIGKILL}), ("0", {0: 0, 1: -signal.SIGKILL})])
def test_the_first_to_die_is_known_however_late_the_system_tells_of_it(late, exits, tmp_path):
    cfg = TrainConfig(hardware=HardwareConfig(processes=2))
    assert exits_of(launch_config(cfg), "-c", DYING, str(tmp_path / "gone"), late) == exits


def test_torchrun_is_joined_and_a_signal_to_one_rank_stops_all(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")
    run = begin(*LONG, "hardware=2xcpu", before=torchrun)  # no folder is given: both have to use the one that rank 0 names after the time
    runs = os.path.join(os.getcwd(), "runs")
    wait(lambda: os.path.isdir(runs) and len(os.listdir(runs)) > 0, run)
    [folder] = (tmp_path / "runs").iterdir()
    under_way(folder, run)
    signal_rank(folder, 1, signal.SIGTERM)
    code, said = end(run)
    assert code != 0  # torchrun's own, for a worker that has not finished
    assert "stopped by a signal on another process" in said
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [folder.name]
    status = read(folder / "status.json")
    assert status["state"] == "stopped" and (folder / "checkpoints" / f"step-{status['step']:06d}").is_dir()
    assert [record(folder, rank)["state"] for rank in (0, 1)] == ["stopped", "stopped"]
    assert all((folder / "logs" / f"rank-{rank}.log").exists() for rank in (0, 1))


SRUN = """export SLURM_STEP_ID=0 SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_NUM_NODES=$NODES SLURM_STEP_NUM_TASKS=$TASKS SLURM_JOB_ID=7
while [[ "$1" == --* ]]; do shift; done
pids=()
for ((i = 0; i < TASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
code=0
for pid in "${pids[@]}"; do
  while kill -0 $pid 2> /dev/null; do wait $pid; done
  wait $pid || code=$?
done
exit $code"""


def test_srun_is_joined_and_contradictions_are_refused_once(tmp_path):
    program(tmp_path / "bin", "srun", SRUN)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TASKS": "2", "NODES": "1"}
    code, said = end(begin(*BANDIT, "hardware=cpu", before=("srun",), **environment))
    assert code == 2
    assert said.count("prefopt: srun started 2 processes, 2 on each machine, and hardware=cpu asks for 1 on each of 1") == 1
    assert "set hardware.nodes=1 hardware.processes=2" in said
    words = [*BANDIT, "train.steps=4", "hardware=2xcpu", f"hydra.run.dir={tmp_path / 'run'}"]
    code, said = end(begin(*words, before=("srun",), **environment))
    assert code == 0, said
    assert read(tmp_path / "run" / "status.json")["state"] == "finished"
    assert read(tmp_path / "run" / "manifest.json")["processes"] == 2


def test_slurm_runs_the_job_again_until_it_is_finished(tmp_path):
    """sbatch, srun and scontrol stand for SLURM: they run the script, pass the warning on and queue the job again. Both "machines" are this
    one, with a process each that meet at the port of the job."""
    programs = tmp_path / "bin"
    program(programs, "srun", SRUN)
    program(programs, "sbatch", f'echo "${{@: -1}}" > {tmp_path}/script; echo 42')
    program(programs, "scontrol", f'case "$1" in requeue) echo "$2" >> {tmp_path}/requeued;; show) echo 127.0.0.1;; esac')
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "TASKS": "2", "NODES": "2", "SLURM_JOB_ID": "42",
                   "SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1"}
    words = [*BANDIT, "train.steps=500", "train.save_every=100000", "hardware=cpu", "hardware.nodes=2", "hardware.launcher=slurm"]
    words += [f"hydra.run.dir={tmp_path / 'run'}"]
    code, said = end(begin(*words, **environment))
    assert code == 0 and "job 42 is in the queue" in said
    script = (tmp_path / "script").read_text().strip()
    assert script == str(tmp_path / "run" / "job.sh")

    def job() -> subprocess.Popen:
        return subprocess.Popen(["bash", script], env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)

    first = job()
    wait(lambda: '"step": 5,' in _text(tmp_path / "run" / "metrics.jsonl"), first)
    first.send_signal(signal.SIGUSR1)  # as SLURM does before the time limit
    code, said = end(first)
    assert code == 0, said
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "stopped" and 5 <= status["step"] < 500
    assert (tmp_path / "requeued").read_text() == "42\n"
    code, said = end(job())
    assert code == 0 and f"resuming after step {status['step']} of 500" in said
    assert read(tmp_path / "run" / "status.json")["state"] == "finished"
    assert (tmp_path / "requeued").read_text() == "42\n"  # a job that has finished is not queued again


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
