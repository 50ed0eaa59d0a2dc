"""The launcher without processes: commands of every hardware config, hostfiles, groups that were joined, the first cause of a failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from prefopt.cli import main
from prefopt.config.catalogue import groups
from prefopt.config.schema import HardwareConfig, SlurmConfig, TrainConfig
from prefopt.errors import UserError
from prefopt.launch import nodes
from prefopt.launch.commands import launch_text
from prefopt.launch.group import Group, Leader, check_world, first_host, is_worker, joined
from prefopt.launch.slurm import job_script
from prefopt.launch.verdict import conclude, verdict
from prefopt.training.ranks import kind_of, record_path
from prefopt.training.rundir import claim, release
from prefopt.training.signals import StopSignals

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("launch_commands.txt")


def config(name: str = "cpu", **changes) -> TrainConfig:
    folder = ROOT / "conf" / "hardware"
    given = OmegaConf.merge(OmegaConf.load(folder / "_hardware.yaml"), OmegaConf.load(folder / f"{name}.yaml"), changes)
    given.pop("defaults")
    hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), given))
    return TrainConfig(algo={"name": "dpo"}, hardware=hardware, run_dir="runs/mine")


def test_the_launch_command_of_every_hardware_config(tmp_path, monkeypatch):
    """PREFOPT_SNAPSHOT=1 writes the file anew."""
    monkeypatch.setattr(sys, "executable", "python")
    monkeypatch.setattr(nodes, "passed_environment", dict)
    monkeypatch.setattr("prefopt.launch.commands.passed_environment", lambda: {"HF_TOKEN": "secret"})
    Path("hostfile").write_text("\n".join(f"node-{i} slots=8" for i in range(1, 17)))
    parts = []
    for name in sorted(groups()["hardware"]):
        words = ["algo=dpo", f"hardware={name}", "hydra.run.dir=runs/mine"]
        parts.append(f"== {name}\n{launch_text(config(name), words)}".replace(str(tmp_path), "/shared"))
    text = re.sub(r"(prefopt-mine-)\w{8}", r"\1DIGEST", "\n\n".join(parts)) + "\n"
    if os.environ.get("PREFOPT_SNAPSHOT"):
        SNAPSHOT.write_text(text)
    assert text == SNAPSHOT.read_text()
    assert "secret" not in text


def test_launch_prints_and_starts_nothing(tmp_path, capsys):
    words = ["model=bandit", "data=bandit", "hardware=2x8xh100_zero3", "hardware.zero=0", "hydra.run.dir=run"]
    assert main(["launch", "--print", *words]) == 0
    said = capsys.readouterr().out
    assert f"hydra.run.dir={tmp_path / 'run'} hardware.rendezvous=HOST:29400" in said
    assert not (tmp_path / "run").exists()
    assert main(["launch", "hardware=cpu"]) == 2
    assert "prefopt launch --print" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["hardware=2x8xh100_zero3"], "does not say where they meet"),
    (["hardware=2x8xh100_zero3", "hardware.rendezvous=here"], "hardware.rendezvous=here is no host:port"),
    (["hardware=2x8xh100_zero3", "hardware.rendezvous=here:29400"], "hydra.run.dir has a time in its name"),
    (["hardware=2x8xh100_zero3_ssh", "hydra.run.dir=run"], "hardware.hostfile=hostfile cannot be read"),
    (["hardware=8xh100_zero3_slurm", "hydra.run.dir=run"], "hardware.launcher=slurm needs sbatch"),
    (["-m", "hardware=8xh100_zero3_slurm", "seed=0,1", "hydra.sweep.dir=sweep"], "the jobs of a sweep run on this machine"),
])
def test_what_cannot_be_started_is_said_at_once_and_leaves_nothing(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "model=bandit", "data=bandit", "hardware.zero=0", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize("text, said", [
    ("a slots=8\na", "line 2: a is there twice"),
    ("a slots=4\nb", "line 1: a has slots=4 and hardware.processes=8 are to run there"),
    ("# nobody\n-oProxyCommand=x\n", "line 2: '-oProxyCommand=x' is no machine"),
    ("a\n", "names 1 machines and hardware.nodes=2"),
])
def test_a_hostfile_that_cannot_be_used_is_refused_by_line(text, said, tmp_path):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        nodes.read_hostfile(config("2x8xh100_zero3_ssh").hardware)


def test_words_for_other_machines_hold_no_secret_and_pin_what_must_be_equal(tmp_path):
    cfg = config("2x8xh100_zero3_ssh")
    words = nodes.node_words(cfg, ["seed=1", "hydra.run.dir=elsewhere", "hardware.launcher=ssh", "resume=never"], "a:29400")
    assert words == ["seed=1", f"hydra.run.dir={tmp_path / 'runs/mine'}", "hardware.launcher=local", "hardware.rendezvous=a:29400"]
    with pytest.raises(UserError, match=r"^\+tracker\.api_key seems to hold a secret"):
        nodes.node_words(cfg, ["+tracker.api_key=abcdefgh"], None)


def test_the_script_of_a_machine_passes_words_environment_signals_and_the_exit_code(tmp_path, monkeypatch):
    """It is run by a real shell; only the program that it starts is another one."""
    (tmp_path / "program").write_text('#!/bin/bash\nprintf "%s\\n" "$@" "$GREETING" > said\ntrap "echo USR1 >> said; exit 7" USR1\n'
                                      'touch ready\nwhile :; do sleep 0.05; done\n')
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "program"))
    script = nodes.remote_script(["prompt=it's a b", "x=$HOME;ls"], {"GREETING": 'a "b" $c\n`d`'})

    def start() -> subprocess.Popen:
        (tmp_path / "ready").unlink(missing_ok=True)
        shell = subprocess.Popen(["bash", "-s"], stdin=subprocess.PIPE, cwd="/")
        shell.stdin.write(script.encode())
        shell.stdin.flush()
        deadline = time.monotonic() + 20
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return shell

    shell = start()
    shell.stdin.write(b"USR1\n")
    shell.stdin.flush()
    assert shell.wait(20) == 7
    said = (tmp_path / "said").read_text()
    assert said == "-m\nprefopt.cli\ntrain\nprompt=it's a b\nx=$HOME;ls\na \"b\" $c\n`d`\nUSR1\n"
    shell.stdin.close()
    shell = start()
    shell.stdin.close()  # the connection is gone
    assert shell.wait(20) == 128 + signal.SIGTERM


def test_options_of_slurm_reach_the_script(tmp_path):
    cfg = config("8xh100_zero3_slurm", threads=4)
    cfg.hardware.slurm = SlurmConfig(partition="gpu", account="lab", time="2-00:00:00", grace=60, options=["--constraint=h100"])
    script = job_script(cfg, ["algo=dpo"], tmp_path)
    for line in ("--partition=gpu", "--account=lab", "--time=2-00:00:00", "--signal=B:USR1@60", "--constraint=h100", "--requeue",
                 "--gpus-per-node=8", "--cpus-per-task=32", f"--chdir={tmp_path}"):
        assert f"#SBATCH {line}\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for wrong in ({"time": "soon"}, {"options": ["constraint=h100"]}, {"options": ["--x\n#SBATCH --y"]}):
        cfg.hardware.slurm = SlurmConfig(**wrong)
        with pytest.raises(UserError, match=f"^hardware.slurm.{next(iter(wrong))}"):
            job_script(cfg, [], tmp_path)


TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}


def test_groups_are_noticed_and_what_is_none_is_not():
    assert joined(TORCHRUN) == Group(3, 1, 4, 2, "torchrun")
    assert joined(SRUN) == Group(1, 0, 2, 1, "srun")
    batch = {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP")}  # the shell of a job
    for nobody in ({}, {**TORCHRUN, "WORLD_SIZE": "1"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, batch, {**TORCHRUN, "PREFOPT_AGENT": "1"},
                   {"RANK": "0", "WORLD_SIZE": "2"}):  # a container's, which names machines and not processes
        assert joined(nobody) is None
    assert is_worker(joined(SRUN), ["hardware=2xcpu"])
    assert not is_worker(joined(SRUN), ["hardware.rendezvous=a:29400"])  # one process per machine, which starts its own
    assert is_worker(joined(TORCHRUN), ["hardware.rendezvous=a:29400"])


@pytest.mark.parametrize("words, said", [
    (["-m", "seed=0,1"], "torchrun has started this one; run the sweep without torchrun"),
    (["hardware=2x8xh100_zero3"], "set hardware.nodes=2 hardware.processes=2"),
])
def test_rank_0_of_a_group_refuses_what_cannot_be_joined(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prefopt.launch.group._leader", Leader(joined(TORCHRUN)))
    assert main(["train", "model=bandit", "data=bandit", "hardware.zero=0", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, said", [
    ("2xcpu", "set hardware.nodes=2 hardware.processes=2"), ("8xh100_zero3_slurm", "set hardware.launcher=local"),
])
def test_a_world_that_the_config_contradicts_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        check_world(config(name).hardware, joined(TORCHRUN))
    check_world(config("2xcpu", nodes=2).hardware, joined(TORCHRUN))


@pytest.mark.parametrize("nodelist, first", [
    ("gpu-[01-04,07],login", "gpu-01"), ("gpu-1,gpu-2", "gpu-1"), ("gpu[3,5]", "gpu3"), ("n[1-2].example.org", "n1.example.org"),
    ("single", "single"),
])
def test_the_first_host_of_slurms_lists(nodelist, first):
    assert first_host(nodelist) == first


def recorded(folder: Path, rank: int, **changes) -> None:
    row = {"rank": rank, "host": "here", "pid": 1, "step": 5, "state": "failed", "message": "", "kind": "error", "traceback": False,
           "code": 1, "where": "prefopt/data/batch.py:7 build", "time": time.time(), **changes}
    record_path(folder, rank).parent.mkdir(exist_ok=True)
    record_path(folder, rank).write_text(json.dumps(row))


def test_the_cause_is_told_from_its_consequences(tmp_path):
    now = time.time()
    recorded(tmp_path, 0, message="RuntimeError: Connection closed by peer", kind="lost", time=now - 2)
    recorded(tmp_path, 1, message="KeyError: 'x'", traceback=True, time=now - 1, host="there")
    said, code = verdict(tmp_path, 2, {}, 30)
    assert said == f"rank 1 on there: KeyError: 'x' (traceback in {tmp_path / 'logs/rank-1.log'})" and code == 1


def test_what_all_ranks_say_is_said_once_without_a_rank(tmp_path):
    recorded(tmp_path, 1, message="no such file", code=2, time=1.0)
    recorded(tmp_path, 0, message="no such file", code=2, time=2.0)
    assert verdict(tmp_path, 2, {}, 30) == ("no such file", 2)


def test_of_two_own_errors_the_first_counts(tmp_path):
    recorded(tmp_path, 0, message="second", time=2.0)
    recorded(tmp_path, 2, message="first", code=2, time=1.0)
    assert verdict(tmp_path, 3, {}, 30) == (f"rank 2: first (its log: {tmp_path / 'logs/rank-2.log'})", 2)


def test_ranks_that_did_not_come_are_named_also_where_nccl_ended_those_that_waited(tmp_path):
    for rank in range(4):
        recorded(tmp_path, rank, state="running", kind="")
    for rank in (0, 1, 3):
        (tmp_path / "logs" / f"rank-{rank}.log").write_text("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(...)")
    said, code = verdict(tmp_path, 4, {0: -signal.SIGABRT, 1: -signal.SIGABRT, 3: -signal.SIGABRT}, 30)
    assert code == 1
    assert said.startswith("rank 2 did not arrive within 30 s (hardware.timeout): last seen after step 5 in prefopt/data/batch.py:7 build")
    recorded(tmp_path, 2, kind="timeout", message="RuntimeError: Timed out waiting")
    for rank in (0, 1, 3):
        recorded(tmp_path, rank, kind="timeout", message="RuntimeError: Timed out waiting")
    assert verdict(tmp_path, 4, {}, 30)[0].startswith("all processes waited for the others for 30 s (hardware.timeout)")
    recorded(tmp_path, 1, kind="timeout", message="RuntimeError: Timed out waiting", step=4)
    assert verdict(tmp_path, 4, {}, 30)[0].startswith("rank 1 did not arrive")


def test_the_cause_replaces_what_rank_0_has_seen(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "step": 3, "message": "Connection closed by peer"}))
    conclude(tmp_path, "rank 1 was ended by SIGKILL")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "failed", "step": 3, "message": "rank 1 was ended by SIGKILL"}
    (tmp_path / "status.json").write_text(json.dumps({"state": "stopped", "message": "stopped by SIGTERM"}))
    conclude(tmp_path, "rank 1 was ended by SIGKILL")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("error, kind", [
    (RuntimeError("[../gloo/transport/tcp/pair.cc:554] Connection closed by peer [10.0.0.1]:2"), "lost"),
    (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"), "timeout"),
    (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error"), "lost"),
    (ConnectionResetError("Connection reset by peer"), "lost"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "error"),
    (UserError("timeout of the store"), "error"),
])
def test_errors_about_other_processes_are_known(error, kind):
    assert kind_of(error) == kind


def test_signals_that_come_together_are_one_request_and_ctrl_c_twice_is_two():
    with StopSignals() as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_machines_of_one_run_may_claim_its_folder_at_once(tmp_path):
    cfg = TrainConfig(algo={"name": "dpo"}, run_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.0123.part").write_text("half a conf")  # another machine is writing it just now
    (tmp_path / "run" / "logs").mkdir()
    assert claim(cfg, "dpo") == "fresh"
    assert claim(cfg, "dpo") == "resume"
    release(tmp_path / "run")
    assert claim(cfg, "dpo") == "fresh"


def test_the_parent_of_worker_processes_imports_no_torch():
    code = "import sys; import prefopt.launch.app, prefopt.launch.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_addresses():
    assert nodes.split_address("node-1:29400") == ("node-1", 29400) and nodes.split_address("[fe80::1]:80") == ("fe80::1", 80)
    for wrong in ("node-1", "node-1:0", "node-1:99999", ":80"):
        with pytest.raises(UserError, match="no host:port"):
            nodes.split_address(wrong)
    assert nodes.can_listen("127.0.0.1") and not nodes.can_listen("192.0.2.1")
    assert nodes.interface_of(nodes.address_towards("127.0.0.1")) == "lo"
    with pytest.raises(UserError, match="cannot be found from this machine"):
        nodes.address_towards("no-such-host.invalid")
