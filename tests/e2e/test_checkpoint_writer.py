"""Checkpoints are written while training goes on, one at a time; what goes wrong there is said, and nothing is lost."""

from __future__ import annotations

import errno
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from tests.toy_runs import train

BANDIT = ["algo=dpo", "model=bandit", "data=bandit", "train.steps=6", "train.eval_every=6", "train.save_every=2",
          "train.keep_checkpoints=9"]


def test_training_goes_on_while_a_checkpoint_is_written_and_a_second_one_waits(tmp_path, monkeypatch):
    """The first checkpoint (step 2) is held up until step 4 has been made, so it cannot hold anything later than step 2; while it is, no
    second one is begun."""
    go, made, writing = threading.Event(), [], []
    real_save, real_step = checkpoint.save, Engine.step

    def save(folder, snapshot, keep):
        writing.append(snapshot.state["step"])
        assert len(writing) == 1  # at most one copy of the training state waits in memory
        if snapshot.state["step"] == 2:
            assert go.wait(60)
        path = real_save(folder, snapshot, keep)
        writing.pop()
        return path

    def step(self, *args):
        made.append(self.policy.logits.detach().clone())  # as they are before step len(made)
        result = real_step(self, *args)
        if len(made) == 4:
            assert not (tmp_path / "run" / "checkpoints" / "step-000002").exists()
            go.set()
        return result

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(Engine, "step", step)
    assert train(tmp_path / "run", *BANDIT) == 0
    held = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors")["logits"]
    assert torch.equal(held, made[2]) and not torch.equal(held, made[3])
    assert [p.name for p in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step-000002", "step-000004", "step-000006"]
    assert all(checkpoint.problem(p) == "" for p in checkpoint.steps(tmp_path / "run" / "checkpoints"))


def test_a_disk_that_fills_up_while_training_goes_on_ends_the_run_with_a_sentence(tmp_path, monkeypatch, capsys):
    real = checkpoint.save

    def save(folder, snapshot, keep):
        if snapshot.state["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return real(folder, snapshot, keep)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        assert train(tmp_path / "run", *BANDIT) == 2
    assert "the disk is full" in capsys.readouterr().err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].name == "step-000002"
    assert train(tmp_path / "run", *BANDIT) == 0
    assert train(tmp_path / "whole", *BANDIT) == 0
    ours, theirs = (load_file(tmp_path / name / "checkpoints" / "step-000006" / "weights.safetensors") for name in ("run", "whole"))
    assert torch.equal(ours["logits"], theirs["logits"])
    rows = [[r["step"] for r in read_jsonl(tmp_path / name / "metrics.jsonl") if r["split"] == "train"] for name in ("run", "whole")]
    assert rows[0] == rows[1] == [1, 2, 3, 4, 5, 6]


def test_the_writer_keeps_the_newest_and_the_best(tmp_path):
    writer = checkpoint.Writer(tmp_path, keep=1)
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        training = checkpoint.TrainingState({"w": torch.full((3,), float(step))})
        writer.start(checkpoint.Snapshot(training, {}, torch.get_rng_state(), {"step": step, "best": {"step": best}}))
        assert writer.wait()["step"] == step and writer.wait() is None
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-000003", "step-000004"]
    writer.folder = tmp_path / "step-000004" / "state.json"  # a file, in which nothing can be made
    writer.start(checkpoint.Snapshot(training, {}, torch.get_rng_state(), {"step": 5}))
    with pytest.raises(NotADirectoryError):
        writer.wait()
    assert writer.wait() is None  # said once
