"""Trackers of whole runs, on the files they wrote and on what a W&B server was sent."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from prefopt.cli import main
from prefopt.tracking.tensorboard_tracker import TensorboardTracker
from prefopt.tracking.tracker import read_jsonl
from prefopt.tracking.wandb_tracker import WandbTracker
from prefopt.training.engine import Engine
from tests.toy_runs import train
from tests.unit.test_tensorboard import fill_disk, read, scalars, texts
from tests.wandb_reader import artifact_files, history, records
from tests.wandb_server import serving

BANDIT = ["model=bandit", "data=bandit", "train.steps=4", "train.eval_every=2"]
BOTH = ["tracker=wandb-offline", "tracker.tensorboard=true"]
KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A client that knows nothing of this machine's user."""
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "home").mkdir()
    teardown()
    yield
    teardown()


def teardown():
    import wandb

    with contextlib.suppress(ConnectionError):  # a test has killed it
        wandb.teardown()  # waits for the client's process, and makes it read the environment again


@pytest.fixture
def server(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        teardown()


def rows(folder: Path, split: str, key: str) -> dict[int, float]:
    """What metrics.jsonl holds, by step. It never holds a step twice."""
    return {r["step"]: r[key] for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == split}


def sent(found: list[dict], key: str) -> dict[int, float]:
    """What W&B was sent, by step."""
    steps = [r["step"] for r in found if key in r]
    assert len(steps) == len(set(steps)), f"{key} twice: {steps}"
    return {r["step"]: r[key] for r in found if key in r}


def stop_after(monkeypatch, step: int, error: BaseException | None = None) -> None:
    """The engine's step `step` fails with `error`, or is the last before SIGTERM."""
    real, calls = Engine.step, []

    def stepping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            if error is not None:
                raise error
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "step", stepping)


def test_online_everything_reaches_the_server(server, tmp_path):
    run = tmp_path / "run"
    assert train(run, *BANDIT, "tracker=wandb", "tracker.group=mine", "seed=3") == 0
    teardown()
    (stored,) = server.runs.values()
    assert stored.exit_code == 0 and stored.settings["project"] == "prefopt"
    assert (stored.settings["groupName"], stored.settings["jobType"]) == ("mine", "dpo")
    assert stored.settings["tags"] == ["algo=dpo", "model=bandit", "data=bandit", "seed=3"]
    config = json.loads(stored.settings["config"])
    assert config["algo"]["value"]["beta"] == 0.1 and config["seed"]["value"] == 3
    assert sent(stored.history, "train/loss") == pytest.approx(rows(run, "train", "loss"))
    assert sent(stored.history, "eval/true_reward") == pytest.approx(rows(run, "eval", "true_reward"))
    tables = [(r["step"], r["samples"]["path"]) for r in stored.history if "samples" in r]
    assert [step for step, _ in tables] == [0, 2, 4]  # at each evaluation
    last = json.loads(stored.files[tables[-1][1]])
    assert last["columns"] == ["step", "prompt", "before", "after", "reward"] and all(row[0] == 4 and row[2] for row in last["data"])
    report = next(r["report"]["path"] for r in stored.history if "report" in r)
    assert stored.files[report] == (run / "report.html").read_bytes()


def test_a_stopped_online_run_goes_on_as_the_same_run(server, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(run, *BANDIT, "tracker=wandb") == 143
    teardown()
    (stored,) = server.runs.values()
    assert stored.exit_code == 1
    assert train(run, *BANDIT, "tracker=wandb") == 0
    teardown()
    (stored,) = server.runs.values()
    assert stored.exit_code == 0
    assert list(sent(stored.history, "train/loss")) == [1, 2, 3, 4]
    assert list(sent(stored.history, "eval/loss")) == [0, 2, 4]  # that of step 2 was made after the stop


def test_offline_parts_are_synced_to_one_run_without_doubled_steps(server, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 4, SystemError("killed after step 3; the checkpoint is of step 2"))
        with pytest.raises(SystemError):
            train(run, *BANDIT, *BOTH)
    assert train(run, *BANDIT, *BOTH) == 0
    teardown()
    assert not server.runs
    identity = (run / "wandb_id.txt").read_text().strip()
    parts = sorted((run / "wandb").glob(f"*run-*-{identity}*"))  # W&B numbers those that begin in the same second
    assert len(parts) == 2
    command = [str(Path(sys.executable).with_name("wandb")), "sync", *map(str, parts)]
    subprocess.run(command, check=True, capture_output=True)  # the client's own command, as a user gives it
    (stored,) = server.runs.values()
    assert list(sent(stored.history, "train/loss")) == [1, 2, 3, 4] and list(sent(stored.history, "eval/loss")) == [0, 2, 4]
    events = read(run)
    for split, key in (("train", "loss"), ("eval", "true_reward")):
        found = scalars(events, f"{split}/{key}")
        assert dict(found) == pytest.approx(rows(run, split, key), rel=1e-6) and len(found) == len(dict(found))


def break_at(monkeypatch, tracker, step: int, breaking) -> None:
    real = tracker.log

    def log(self, row):
        if row["step"] == step and row["split"] == "train":
            breaking(self)
        real(self, row)

    monkeypatch.setattr(tracker, "log", log)


def test_trackers_that_die_leave_the_run_and_its_record_whole(tmp_path, monkeypatch, capfd):
    def kill_client(tracker):
        (client,) = [p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core"]
        client.kill()
        client.wait()

    break_at(monkeypatch, WandbTracker, 2, kill_client)
    break_at(monkeypatch, TensorboardTracker, 3, fill_disk)
    run = tmp_path / "run"
    assert train(run, *BANDIT, *BOTH) == 0
    err = capfd.readouterr().err
    assert err.count("W&B logging has stopped (") == err.count("TensorBoard logging has stopped (OSError [Errno 28]") == 1
    assert list(rows(run, "train", "loss")) == [1, 2, 3, 4] and list(rows(run, "eval", "loss")) == [0, 2, 4]
    assert json.loads((run / "status.json").read_text())["state"] == "finished" and (run / "report.html").is_file()


def test_samples_that_are_images_reach_both(tmp_path, monkeypatch):
    """The table's samples are turned into pictures on their way."""
    from PIL import Image

    from prefopt.training.judge import Judge

    run, real = tmp_path / "run", Judge._sample

    def drawn(self, step):
        samples = real(self, step)
        for sample in samples:
            sample["image"] = Image.new("RGB", (8, 8), (step * 10, sample["id"] % 256, 0))
        return samples

    monkeypatch.setattr(Judge, "_sample", drawn)
    assert train(run, *BANDIT, *BOTH, "evaluation.prompts=3") == 0
    teardown()
    (file,) = (run / "wandb").glob("*/*.wandb")
    shown = [r for r in history(file) if "images.filenames" in r]
    assert [r["step"] for r in shown] == [0, 2, 4]
    files = file.parent / "files"
    samples = read_jsonl(run / "samples.jsonl")
    last = [(run / s["image"]).read_bytes() for s in samples if s["step"] == 4]
    assert [(files / f).read_bytes() for f in shown[-1]["images.filenames"]] == last
    table = artifact_files(file)
    assert [table[row[3]["path"]] for row in json.loads(table["samples.table.json"])["data"]] == last
    events = read(run)
    assert [i.step for i in events.Images("images/0")] == [0, 2, 4] and set(texts(events, "images/0/caption")) == {0, 2, 4}


def test_a_sweep_is_grouped_and_writes_no_secret_anywhere(tmp_path, monkeypatch):
    """Two real jobs, each a process, with secrets in everything that a tracker might pick up."""
    hidden = "hf_" + "AbCdEfGhIj" * 3
    place = tmp_path / "work" / hidden
    place.mkdir(parents=True)
    for command in ("git init -q", "git remote add origin https://me:gitpassw0rd@host/x.git",
                    "git -c user.email=a@b -c user.name=n commit -q --allow-empty -m x"):
        subprocess.run(shlex.split(command), cwd=place, check=True)
    monkeypatch.chdir(place)
    for name, value in {"JUDGE_TOKEN": "envs3cr3tvalue", "WANDB_API_KEY": KEY, "HF_TOKEN": "hf_" + "Zz12" * 6}.items():
        monkeypatch.setenv(name, value)
    sweep = place / "sweep"
    overrides = ["algo=dpo,ipo", *BANDIT, "hardware=cpu", *BOTH, "trust.packages=[sk-proj-abcdefghijklmnop]",
                 "data.path='https://me:urlpassw0rd@host/x?token=queryt0kenvalue'", f"hydra.sweep.dir={sweep}"]
    assert main(["train", "-m", *overrides]) == 0

    groups, kinds, tags = set(), [], []
    content = b"".join(str(p.relative_to(place)).encode() + p.read_bytes() for p in sweep.rglob("*") if p.is_file())
    for file in sweep.glob("*/wandb/*/*.wandb"):
        found = list(records(file))
        content += b"".join(r.SerializeToString() for r in found)  # a secret may lie across two blocks of the file
        run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
        groups.add(run.run_group)
        kinds.append(run.job_type)
        tags += run.tags
    assert groups == {"sweep"} and sorted(kinds) == ["dpo", "ipo"] and tags.count("seed=0") == 2 and "algo=ipo" in tags
    assert len(list(sweep.glob("*/events.out.tfevents.*"))) == 2
    assert b"multirun.yaml" in content and b"log.txt" in content
    for secret in (hidden, "gitpassw0rd", "envs3cr3tvalue", KEY, "hf_Zz12", "sk-proj-abc", "urlpassw0rd", "queryt0kenvalue"):
        assert secret.encode() not in content, secret


@pytest.mark.parametrize("words", [["train"], ["train", "-m", "seed=0,1"]], ids=["run", "sweep"])
def test_two_trackers_in_one_choice_are_refused_with_the_way_to_have_both(words, capsys):
    assert main([*words, "tracker=[tensorboard,wandb-offline]"]) == 2
    assert "tracker=wandb tracker.tensorboard=true" in capsys.readouterr().err


def test_a_refused_tracker_leaves_the_folder_free(tmp_path, capsys):
    """The corrected command must be able to have the same folder."""
    run = tmp_path / "run"
    assert train(run, *BANDIT, *BOTH, "tracker.project=a/b") == 2
    assert "Invalid project name" in capsys.readouterr().err
    assert train(run, *BANDIT, *BOTH) == 0
