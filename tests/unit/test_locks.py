"""One writer for a run folder: the second is told who holds it, and a lock is gone with its process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from prefopt.errors import UserError
from prefopt.launch.verdict import conclude
from prefopt.training import locks, rundir
from tests.toy_runs import train

RUN = ["model=bandit", "data=bandit", "train.steps=2"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    with locks.writing(run):
        (run / "config.yaml").write_text("")  # of the run that is about to begin
        rundir.release(run)
        assert (run / "config.yaml").exists()
        (run / "config.yaml").unlink()
        holder = json.loads((run / locks.FILE).read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        said = f"{run} is being written by process {os.getpid()} on {socket.gethostname()} since {holder['since']}; wait until"
        with pytest.raises(UserError) as caught, locks.writing(run):
            pass
        assert str(caught.value).startswith(said)
        (run / "status.json").write_text('{"state": "running"}')
        conclude(run, str(caught.value))
        assert rundir.read_status(run) == {"state": "running"}
    (run / "status.json").unlink()
    assert train(run, *RUN) == 0
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []
    (run / "report.html").unlink()  # so that the run is not finished
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    with locks.writing(run):
        assert train(run, *RUN) == 2
    assert capsys.readouterr().err.count(f"prefopt: {run} is being written by process {os.getpid()} on ") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(run, *RUN) == 0


def test_the_process_that_writes_has_the_lock(tmp_path, capsys, monkeypatch):
    """Where two begin at the same moment, neither sees the other before it writes."""
    monkeypatch.setattr("prefopt.launch.app.check_free", lambda folder: None)
    assert train(tmp_path / "run", *RUN) == 0
    (tmp_path / "run" / "report.html").unlink()
    with locks.writing(tmp_path / "run"):
        assert train(tmp_path / "run", *RUN) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert rundir.read_status(tmp_path / "run")["state"] == "finished"


def test_a_killed_process_holds_nothing(tmp_path):
    hold = "from pathlib import Path\nfrom prefopt.training.locks import writing\nwith writing(Path('.')): print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=f"by process {holder.pid} on "):
        locks.check_free(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / locks.FILE).exists()
    locks.check_free(tmp_path)
    with locks.writing(tmp_path):
        assert json.loads((tmp_path / locks.FILE).read_text())["pid"] == os.getpid()
