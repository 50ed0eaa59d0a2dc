"""What goes wrong around a run: the disk is full or read-only, the clock jumps, a server goes away, something in the cache is broken.

A run ends in one sentence, and where the fault is mended the same command comes to the same bits as if it had never been.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.policies import store
from prefopt.tracking import wandb_tracker
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from tests.toy_runs import train
from tests.wandb_server import serving

BANDIT = ["model=bandit", "data=bandit", "train.steps=6", "train.eval_every=2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, *BANDIT) == 0
    return folder


def assert_same(run: Path, whole: Path) -> None:
    """Bits of the last checkpoint and of the model, and one row of each step."""
    newest = [checkpoint.steps(folder / "checkpoints")[-1] for folder in (run, whole)]
    assert newest[0].name == newest[1].name
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes(), name
    kept = ("step", "split", "loss", "grad_norm", "lr")
    rows = [[{k: r.get(k) for k in kept} for r in read_jsonl(f / "metrics.jsonl") if r["split"] in ("train", "eval")] for f in (run, whole)]
    assert rows[0] == rows[1]
    assert read_jsonl(run / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert "</html>" in (run / "report.html").read_text()


# ---- disks ------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a disk cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leaves `left` bytes free."""
    ballast = disk / "ballast"
    about = os.statvfs(disk)
    ballast.write_bytes(b"\0" * max(0, about.f_bavail * about.f_frsize - left))
    return ballast


def sentence(capsys) -> str:
    """The one sentence that a command ended in."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("prefopt: "), said
    return last


# From nothing at all to all but a block of the page that is written last: each stops at another file.
@pytest.mark.parametrize("share", [0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97])
def test_a_disk_that_becomes_full(share, disk, whole, capsys):
    ballast = fill(disk, int(share * sum(-(-f.stat().st_size // 4096) * 4096 for f in whole.rglob("*") if f.is_file())))
    assert train(disk / "run", *BANDIT) == 2
    assert sentence(capsys).startswith("prefopt: the disk is full (")
    ballast.unlink()
    assert train(disk / "run", *BANDIT) == 0
    assert_same(disk / "run", whole)


def test_a_store_on_a_full_disk(disk, tmp_path, monkeypatch, tiny_lm, capsys):
    monkeypatch.setenv("PREFOPT_STORE", str(disk))
    ballast = fill(disk, 8 * 1024)
    assert train(tmp_path / "run", "evaluation.prompts=0") == 2
    assert sentence(capsys).startswith("prefopt: the disk is full (")
    assert not list(disk.rglob("*.safetensors")) and not (tmp_path / "run").exists()
    ballast.unlink()
    assert train(tmp_path / "run", "evaluation.prompts=0") == 0
    assert store.verify(disk / "reference")[1] == []


def test_a_folder_that_cannot_be_written(disk, capsys):
    (disk / "empty").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for run in (disk / "run", disk / "empty"):
        assert train(run, *BANDIT) == 2
        said = sentence(capsys)
        assert str(run) in said and "Read-only file system" in said and "choose another hydra.run.dir" in said
    assert not list((disk / "empty").iterdir())


def test_a_disk_that_turns_read_only_in_mid_run(tmp_path, whole, monkeypatch, capsys):
    """As a kernel does after an error of the device. A mounted one does not turn while a file on it is open."""
    real, calls = Engine.step, []

    def refused(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:

        def stepping(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                patch.setattr(Path, "write_text", refused)
            return real(self, *args, **kwargs)

        patch.setattr(Engine, "step", stepping)
        assert train(tmp_path / "run", *BANDIT) == 2
    assert "Read-only file system" in sentence(capsys)
    assert train(tmp_path / "run", *BANDIT) == 0
    assert_same(tmp_path / "run", whole)


# ---- kills at moments that are hard to meet (make torture meets the others) ----------------------------


def test_a_run_that_was_killed_while_its_first_file_was_written(tmp_path, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.part").write_text("algo:\n  na")
    assert train(tmp_path / "run", *BANDIT) == 0
    assert_same(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_run_that_was_killed_before_its_page_was_written(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    assert train(tmp_path / "run", *BANDIT) == 0
    assert_same(tmp_path / "run", whole)


# ---- the clock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-3600.0, 86400.0 * 400], ids=["an hour back", "a year ahead"])
def test_a_clock_that_jumps(jump, tmp_path, whole, monkeypatch):
    real_step, real_time, calls = Engine.step, time.time, []

    def stepping(self, *args, **kwargs):
        calls.append(1)
        return real_step(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "step", stepping)
    monkeypatch.setattr(time, "time", lambda: real_time() + (jump if len(calls) >= 3 else 0.0))
    assert train(tmp_path / "run", *BANDIT, "tracker.tensorboard=true") == 0
    assert len(calls) == 6
    assert_same(tmp_path / "run", whole)
    seconds = [r["seconds"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert seconds == sorted(seconds) and 0 <= seconds[0] and seconds[-1] < 600
    assert 0 < json.loads((tmp_path / "run" / "status.json").read_text())["seconds"] < 600


# ---- servers --------------------------------------------------------------------------------------------


def test_a_wandb_server_that_goes_away_in_mid_run(tmp_path, whole, monkeypatch, capfd):
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setitem(wandb_tracker._QUIET, "finish_timeout", 3.0)  # two minutes otherwise
    import wandb

    wandb.teardown()  # it reads the environment once
    real, calls = Engine.step, []
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)

        def stepping(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                server.shutdown()
                server.server_close()
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Engine, "step", stepping)
        assert train(tmp_path / "run", *BANDIT, "tracker=wandb") == 0
    said = capfd.readouterr().err
    assert said.count("W&B logging has stopped (") == 1 and "metrics.jsonl is complete. To send what W&B has: wandb sync " in said
    assert_same(tmp_path / "run", whole)
    wandb.teardown()


# ---- the cache ------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name, damage", [("model.safetensors", cut), ("config.json", cut), ("tokenizer.json", emptied)])
def test_a_damaged_model_in_the_cache_is_named(name, damage, tmp_path, tiny_lm, monkeypatch, capsys):
    shutil.copytree(tiny_lm, tmp_path / "cache" / Path(tiny_lm).name)
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    damage(tmp_path / "cache" / Path(tiny_lm).name / name)
    assert train(tmp_path / "run", "evaluation.prompts=0") == 2
    assert str(tmp_path / "cache") in sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_a_damaged_entry_of_the_store_stops_the_run_that_reads_it(tmp_path, tiny_lm, monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    assert train(tmp_path / "first", "evaluation.prompts=0") == 0
    shards = store.shards(tmp_path / "store" / "reference")
    content = bytearray(shards[0].read_bytes())
    content[-1] ^= 1
    shards[0].write_bytes(content)
    assert train(tmp_path / "second", "evaluation.prompts=0") == 2
    said = sentence(capsys)
    assert str(shards[0]) in said and "prefopt store gc" in said
    assert main(["store", "gc"]) == 0
    assert train(tmp_path / "second", "evaluation.prompts=0") == 0
    losses = [[r["loss"] for r in read_jsonl(tmp_path / f / "metrics.jsonl") if r["split"] == "train"] for f in ("first", "second")]
    assert losses[0] == losses[1]
