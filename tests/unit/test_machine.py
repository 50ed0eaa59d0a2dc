"""What jobs of a sweep get of a machine, and the table of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from prefopt.config.schema import HardwareConfig
from prefopt.errors import UserError
from prefopt.launch.board import Board, Screen, read_board
from prefopt.launch.machine import Machine, visible_gpus

GPU, CPU = HardwareConfig(name="gpu"), HardwareConfig(name="cpu", device="cpu")


def deal(machine: Machine, *wanted: HardwareConfig) -> list[list[str] | None]:
    """The GPUs of jobs that come one after the other; None for one that has to wait."""
    running, out = [], []
    for hardware in wanted:
        share = machine.share(hardware, running)
        out.append(None if share is None else share.gpus)
        running += [share] if share else []
    return out


def test_every_job_has_gpus_of_its_own_by_default():
    two = replace(GPU, processes=2)
    assert deal(Machine(gpus=["0", "1", "2"], cores=8), GPU, GPU, GPU, GPU) == [["0"], ["1"], ["2"], None]
    assert deal(Machine(gpus=["0", "1", "2", "3"], cores=8), two, GPU, two, GPU) == [["0", "1"], ["2"], None, ["3"]]
    machine = Machine(gpus=["0", "1"], cores=8)
    first, second = machine.share(GPU, []), machine.share(GPU, [machine.share(GPU, [])])
    assert machine.share(GPU, [second]).gpus == ["0"] and machine.share(GPU, [first]).gpus == ["1"], "the one that has become free"
    assert deal(machine, GPU, CPU, GPU) == [["0"], [], ["1"]], "a job for the CPU takes no GPU, and the other way round"


def test_more_jobs_than_gpus_share_them_evenly():
    assert deal(Machine(4, ["0", "1"], 8), GPU, GPU, GPU, GPU, GPU) == [["0"], ["1"], ["0"], ["1"], None]


def test_cpu_jobs_share_cores_where_they_say_how_many_they_take():
    one = replace(CPU, threads=2)
    assert deal(Machine(gpus=[], cores=4), CPU, CPU) == [[], None]
    assert deal(Machine(gpus=[], cores=4), one, one, one) == [[], [], None]
    assert deal(Machine(gpus=[], cores=2), replace(CPU, threads=8)) == [[]], "a job that wants too much runs alone"
    assert deal(Machine(3, [], 2), CPU, CPU, CPU, CPU) == [[], [], [], None]


@pytest.mark.parametrize("at_once, hardware, threads", [
    (1, CPU, None), (4, CPU, 2), (3, CPU, 2), (2, replace(CPU, processes=2), 2), (16, CPU, 1), (4, replace(CPU, threads=3), None),
])
def test_threads_are_divided(at_once, hardware, threads):
    assert Machine(at_once, [], 8).share(hardware, []).threads == threads


def test_gpus_are_those_that_are_visible(monkeypatch, tmp_path):
    for value, names in {"0, 2": ["0", "2"], "GPU-1,MIG-2": ["GPU-1", "MIG-2"], "": [], "-1": [], "1,-1,2": ["1"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    program = tmp_path / "nvidia-smi"
    for script, names in {"print('0'); print('1')": ["0", "1"], "print('No devices were found')": [], "raise SystemExit(9)": []}.items():
        program.write_text(f"#!{sys.executable}\n{script}\n")
        program.chmod(0o755)
        assert visible_gpus() == names


def test_what_a_machine_refuses():
    with pytest.raises(UserError, match="hydra.launcher.jobs=0 must be at least 1"):
        Machine(0)
    with pytest.raises(UserError, match=r"asks for 4 GPUs, and this machine shows 2 \(0, 1\); set hardware.processes=2"):
        Machine(gpus=["0", "1"]).check(replace(GPU, processes=4))
    Machine(gpus=[]).check(replace(GPU, processes=4))  # without any GPU these are processes of the CPU


def make_board(folder, states) -> Board:
    made = Board(folder)
    for number, state in enumerate(states):
        made.add(number, ["algo=dpo", f"seed={number}"], str(folder / str(number)))
        made.set(number, state, "no luck" if state == "failed" else "")
    return made


def test_a_long_table_shows_what_runs_and_counts_the_rest(tmp_path):
    made = make_board(tmp_path, ["finished"] * 5 + ["failed", "running", "running"] + ["waiting"] * 20)
    lines = made.table(height=5, width=60).splitlines()
    assert lines[0].split() == ["job", "state", "step", "loss", "last", "figure", "time", "what"] and len(lines) == 6
    assert [line.split()[:2] for line in lines[1:5]] == [["1", "finished"], ["2", "finished"], ["7", "running"], ["8", "running"]]
    assert lines[5] == "and 24 more: 1 failed, 3 finished, 20 waiting" and all(len(line) <= 60 for line in lines)
    whole = made.table().splitlines()
    assert len(whole) == 29 and whole[6].endswith("seed=5  (no luck)") and "algo=dpo" not in whole[1], "only what differs is shown"


def test_a_table_knows_how_far_a_run_is(tmp_path):
    made = make_board(tmp_path, ["running"])
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "status.json").write_text(json.dumps({"state": "running", "step": 2, "total_steps": 9}))
    rows = [{"step": 2, "split": "eval", "loss": 0.5, "win_rate": 0.75, "accuracy": 0.6}, {"step": 3, "split": "train", "loss": 0.25}]
    (tmp_path / "0" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "spl')
    line = made.table().splitlines()[1]
    assert line.split()[:6] == ["1", "running", "3/9", "0.25", "win_rate", "0.75"]


def test_on_a_terminal_the_table_is_drawn_in_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    screen = Screen(make_board(tmp_path, ["running", "waiting"]))
    screen.draw()
    screen.draw()
    assert capsys.readouterr().err.count("state") == 1, "once a second is enough"
    screen.next = 0.0
    screen.draw()
    screen.draw()
    assert capsys.readouterr().err.count("\x1b[3F\x1b[J") == 1
    screen.say("job 1 failed")
    assert capsys.readouterr().err == "\x1b[3F\x1b[Jjob 1 failed\n"
    screen.close()
    assert capsys.readouterr().err.startswith("job  state")


def test_another_sweep_in_the_same_folder_is_refused(tmp_path):
    make_board(tmp_path, ["finished"])
    again = Board(tmp_path)
    again.add(0, ["algo=dpo", "seed=0"], "x")
    with pytest.raises(UserError, match="its job 1 is algo=dpo seed=0 and here it is algo=ipo"):
        again.add(0, ["algo=ipo"], "x")
    assert [job["state"] for job in read_board(tmp_path)] == ["finished"]
