"""Sweeps: jobs beside each other, failures, kills, going on, searches. Their jobs are toys (tests/toy_jobs.py); real ones are in
test_train.py and test_models.py."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.launch import jobs as jobs_module
from prefopt.launch.board import only_one
from prefopt.tracking.redact import REDACTED
from prefopt.training.locks import locked
from tests import toy_jobs

BANDIT = ["model=bandit", "data=bandit", "hardware=auto", "train.steps=3", "optim.eps=0.001"]
SWEEP = ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(jobs_module, "worker_command", lambda cfg: toy_jobs.COMMAND)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def board(sweep: str | Path = "sweep") -> list[dict]:
    return json.loads(Path(sweep, "sweep.json").read_text())


def states(sweep: str | Path = "sweep") -> list[str]:
    return [job["state"] for job in board(sweep)]


def counts() -> dict[str, int]:
    """How often each job was started."""
    return {name: len(found) for name, found in toy_jobs.starts(Path("sweep")).items()}


def until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sweep_status(capsys) -> str:
    capsys.readouterr()
    assert main(["sweep", "status", "sweep"]) == 0
    return capsys.readouterr().out


def test_jobs_run_at_once_with_gpus_of_their_own(monkeypatch, capsys):
    """Both wait until the other has begun."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert main(["train", "-m", *BANDIT, *SWEEP, "optim.lr=0.6", "seed=0,1"]) == 0
    assert states() == ["finished", "finished"]
    begun = [found[0] for found in toy_jobs.starts(Path("sweep")).values()]
    assert sorted(start["gpus"] for start in begun) == ["3", "GPU-5a"]
    assert {start["threads"] for start in begun} == {str(max(1, jobs_module.Machine().cores // 2))}


def test_failures_are_recorded_and_tried_again(capsys):
    words = ["train", "-m", *BANDIT, *SWEEP, "optim.lr=0.3,0.4,0.5,0.1", "hydra.launcher.jobs=2"]
    assert main(words) == 1
    assert states() == ["failed", "out of memory", "out of memory", "finished"]
    first, killed, full, _ = (job["message"] for job in board())
    assert first == "exit code 1: ValueError: no luck" and "killed by SIGKILL" in killed and "CUDA out of memory" in full
    said = capsys.readouterr().err
    assert "3 of 4 jobs failed" in said and "job 1 failed after" in said and "optim.lr=0.4" in said
    text = sweep_status(capsys)
    assert "4 jobs: 1 failed, 1 finished, 2 out of memory" in text and "prefopt sweep resume sweep goes on with it" in text
    assert "3/3" in text and "true_reward -0.1" in text and "0.3333" in text

    assert main(["sweep", "resume", "sweep", "--only-unfinished"]) == 1
    assert counts() == {"0": 1, "1": 1, "2": 1, "3": 1}
    assert main(["sweep", "resume", "sweep"]) == 1
    assert states() == ["finished", "out of memory", "out of memory", "finished"]
    assert counts() == {"0": 2, "1": 2, "2": 2, "3": 1}, "what has finished is left alone"


def test_a_signal_stops_all_jobs_and_the_sweep_goes_on_where_they_were(capsys):
    def stop() -> None:
        until(lambda: len(counts()) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert main(["train", "-m", *BANDIT, *SWEEP, "optim.lr=0.7", "seed=0,1,2", "hydra.launcher.jobs=2"]) == 143
    thread.join()
    assert states() == ["stopped", "stopped", "waiting"]
    assert "prefopt sweep resume sweep goes on with it" in capsys.readouterr().err
    Path("sweep/go").touch()
    assert main(["sweep", "resume", "sweep", "hydra.launcher.jobs=3"]) == 0
    assert states() == ["finished"] * 3
    begun = toy_jobs.starts(Path("sweep"))
    assert [start["from"] for start in begun["0"]] == [0, 1] and len(begun["1"]) == 2 and len(begun["2"]) == 1


KILLED = """
import sys
from prefopt.launch import jobs
from tests import toy_jobs
jobs.worker_command = lambda cfg: toy_jobs.COMMAND
from prefopt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_kill_9_of_the_sweep_loses_no_job_and_doubles_none(capsys):
    """A subprocess, because nothing in this process can stand for SIGKILL."""
    words = ["train", "-m", *BANDIT, *SWEEP, "optim.lr=0.7", "seed=0,1,2", "hydra.launcher.jobs=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, *words], env=env, stderr=subprocess.DEVNULL)
    until(lambda: len(counts()) == 2 and all(job.get("process") for job in board()[:2]))
    text = sweep_status(capsys)
    assert "2 running, 1 waiting" in text and "the sweep is running" in text
    process.kill()
    process.wait()
    text = sweep_status(capsys)
    assert "2 running, 1 waiting" in text and "prefopt sweep resume sweep looks after the jobs that run" in text
    with open("sweep/0/log.txt") as log:  # one of the two is killed as well
        os.killpg(int(board()[0]["process"].rpartition(":")[2]), signal.SIGKILL)
        until(lambda: not locked(Path(log.name)))
    assert "1 interrupted, 1 running, 1 waiting" in sweep_status(capsys)

    def go() -> None:
        until(lambda: counts()["0"] == 2 and states()[1] == "running")
        Path("sweep/go").touch()

    thread = threading.Thread(target=go)
    thread.start()
    assert main(["sweep", "resume", "sweep"]) == 0
    thread.join()
    assert states() == ["finished"] * 3 and counts() == {"0": 2, "1": 1, "2": 1}, "the job that went on is waited for, not begun anew"


def test_what_a_resume_cannot_do(monkeypatch, capsys, tmp_path):
    secret = "tracker.entity=hf_" + "Ab1" * 8
    assert main(["train", "-m", *BANDIT, *SWEEP, "optim.lr=0.1", "seed=0,1", secret, "hydra.launcher.jobs=2"]) == 0
    assert REDACTED in Path("sweep/command.json").read_text() and "Ab1Ab1" not in Path("sweep/sweep.json").read_text()

    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        return capsys.readouterr().err

    assert "tracker.entity held a secret" in refused("sweep", "resume", "sweep")
    assert main(["sweep", "resume", "sweep", secret]) == 0 and counts() == {"0": 1, "1": 1}
    assert "holds another sweep: its job 1 is" in refused("train", "-m", *BANDIT, *SWEEP, "optim.lr=0.2", "seed=0,1")
    with only_one(Path("sweep")):
        assert "another process is running the sweep" in refused("sweep", "resume", "sweep", secret)
    assert "is no sweep (there is no sweep.json in it" in refused("sweep", "status", "elsewhere")
    assert "did you mean 'resume'" in refused("sweep", "resum", "sweep")
    assert "does not know --only" in refused("sweep", "resume", "sweep", "--only")
    assert "takes one folder" in refused("sweep", "status")
    assert "sweep=seeds names the jobs of a sweep: prefopt train -m sweep=seeds" in refused("train", *BANDIT, "sweep=seeds")
    assert "must be at least 1" in refused("train", "-m", *BANDIT, "seed=0,1", "hydra.launcher.jobs=0")
    assert "the jobs of a sweep run on this" in refused("train", "-m", *BANDIT, "seed=0,1", "hardware.nodes=2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert "asks for 4 GPUs, and this machine shows 2 (0, 1)" in refused("train", "-m", *BANDIT, "seed=0,1", "hardware.processes=4")
    Path("sweep/sweep.json").write_text("[{}]")
    assert "cannot be read (a job lacks one of overrides" in refused("sweep", "status", "sweep")


def test_the_commands_of_the_documentation(capsys):
    text = (ROOT / "docs" / "sweeps.md").read_text().replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in text.splitlines() if line.startswith("prefopt ") and "compare" not in line]
    assert len(lines) == 6
    for number, line in enumerate(lines):
        words = [word for word in shlex.split(line)[1:] if not word.startswith("hydra.sweeper.trials=")]
        if words[0] == "train":
            own = [] if any("hydra.sweep.dir" in word for word in words) else [f"hydra.sweep.dir=runs/{number}"]
            # The pruner is asked, but none is pruned: which jobs would be depends on which of two at once is ahead.
            search = ["hydra.sweeper.trials=3", "hydra.sweeper.warmup=1000"] if "sweep=optuna" in words else []
            words += [*own, "optim.eps=0.001", "hydra.launcher.jobs=2", *search]
        assert main(words) == 0, line
    made = {folder.name: set(states(folder)) for folder in Path("runs").iterdir()}
    assert {name: len(board(Path("runs", name))) for name in made} == {"six": 6, "1": 3, "2": 6, "search": 3}
    assert all(found == {"finished"} for found in made.values())


# ---- searches ----

SEARCH = [*BANDIT, *SWEEP, "sweep=optuna", "optim.lr=interval(0.01,0.2)", "hydra.launcher.jobs=1"]


def values() -> list[float]:
    return [float(word.partition("=")[2]) for job in board() for word in job["overrides"] if word.startswith("optim.lr=")]


def test_a_search_finds_the_best_and_goes_on_as_if_it_had_not_been_stopped(monkeypatch, capsys, tmp_path):
    assert main(["train", "-m", *SEARCH, "hydra.sweeper.trials=6", "hydra.sweeper.startup_trials=3", "hydra.sweeper.pruner=none"]) == 0
    whole = values()
    best = json.loads(Path("sweep/best.json").read_text())
    assert len(whole) == 6 and best["params"]["optim.lr"] == min(whole) and best["value"] == pytest.approx(0.93 - min(whole))
    assert f"best: accuracy={best['value']:.6g} with optim.lr={min(whole)}" in capsys.readouterr().out
    assert f"best: accuracy={best['value']:.6g}" in sweep_status(capsys)

    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")

    def stop() -> None:
        until(lambda: "4" in counts())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert main(["train", "-m", *SEARCH, "optim.eps=0.2", "hydra.sweeper.trials=5", "hydra.sweeper.startup_trials=3",
                 "hydra.sweeper.pruner=none"]) == 143
    thread.join()
    assert states()[-1] == "stopped"
    assert main(["sweep", "resume", "sweep", "hydra.sweeper.trials=6"]) == 0
    assert values() == whole and states() == ["finished"] * 6 and counts()["4"] == 2


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_bad_trials_are_pruned(pruner, capsys):
    """A grid in a known order: good values first. Toys report every step."""
    words = ["sweep=optuna", "optim.lr=0.01,0.02,0.15,0.2", "train.steps=30", "optim.eps=0.1", "hydra.sweeper.sampler=grid",
             f"hydra.sweeper.pruner={pruner}", "hydra.sweeper.startup_trials=2", "hydra.sweeper.reduction_factor=2",
             "hydra.launcher.jobs=2"]
    assert main(["train", "-m", *BANDIT, *SWEEP, *words]) == 0
    assert states()[0] == "finished" and states()[3] == "pruned"
    assert f"is not among the better trials ({pruner})" in board()[3]["message"]
    assert json.loads(Path("sweep/3/status.json").read_text())["state"] == "stopped", "it was asked to end, and kept what it had"
    assert json.loads(Path("sweep/best.json").read_text())["params"] == {"optim.lr": "0.01"}
    begun = counts()
    assert main(["sweep", "resume", "sweep"]) == 0
    assert counts() == begun, "a pruned trial is not run again"


def test_a_failed_trial_is_tried_again_with_its_values(capsys):
    words = ["train", "-m", *BANDIT, *SWEEP, "sweep=optuna", "optim.lr=0.3,0.1", "hydra.sweeper.sampler=grid", "hydra.launcher.jobs=2"]
    assert main(words) == 1
    assert states() == ["failed", "finished"]
    assert main(["sweep", "resume", "sweep", "--only-unfinished"]) == 1 and counts() == {"0": 1, "1": 1}
    assert main(["sweep", "resume", "sweep"]) == 0
    assert states() == ["finished", "finished"] and counts() == {"0": 2, "1": 1}


@pytest.mark.parametrize("words, said", [
    ([], "has nothing to search"),
    (["optim.lr=0.1,0.2", "hydra.sweeper.sampler=tpee"], "hydra.sweeper.sampler=tpee is none of tpe, random, grid; did you mean 'tpe'?"),
    (["optim.lr=0.1,0.2", "hydra.sweeper.trials=0"], "hydra.sweeper.trials=0 must be a whole number, at least 1"),
    (["optim.lr=0.1,0.2", "seed=range(20)", "hydra.sweeper.sampler=grid"], "the grid has 40 points"),
    (["optim.lr=interval(0.1,0.2)", "hydra.sweeper.sampler=grid"], "a grid needs values that can be counted"),
    (["optim.lr=tag(log,interval(0,0.2))"], "cannot be searched like this"),
    (["optim.lr=-1,0.2"], "optim.lr=-1.0: it must be above 0"),
    (["optim.lr=0.1,0.2", "hydra.sweeper.metric=acuracy"],
     "hydra.sweeper.metric=acuracy has no value in the evaluations of the jobs; these have: accuracy, true_reward"),
])
def test_what_a_search_does_not_take(words, said, capsys):
    assert main(["train", "-m", *BANDIT, "optim.eps=0.2", "hydra.sweep.dir=sweep", "sweep=optuna", *words]) == 2
    assert said in capsys.readouterr().err
    assert "acuracy" in said or not list(Path().iterdir())
