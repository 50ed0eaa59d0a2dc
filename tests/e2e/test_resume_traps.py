"""What a run that goes on must find as it left it, and what moves in which order."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from tests.toy_runs import train

BANDIT = ["model=bandit", "data=bandit", "train.steps=10", "train.epochs=3", "optim.schedule=cosine", "optim.warmup=0.3"]


def test_trap_30_a_resumed_run_sees_the_same_rows_at_the_same_rates(tmp_path, monkeypatch):
    real, seen = Engine.step, []

    def stepping(self, micros, lr):
        seen.append(([micro.rows for micro in micros], lr))
        if len(seen) == stop:
            raise SystemError("killed")
        return real(self, micros, lr)

    monkeypatch.setattr(Engine, "step", stepping)
    words = [*BANDIT, "train.save_every=5", "train.eval_every=10"]
    stop = 0
    assert train(tmp_path / "whole", *words) == 0
    whole, seen[:] = list(seen), []
    assert len({lr for _, lr in whole}) > 8 and len({str(rows) for rows, _ in whole}) > 8  # there is something to get wrong
    stop = 8
    with pytest.raises(SystemError):
        train(tmp_path / "run", *words)
    before, seen[:], stop = list(seen), [], 0
    assert train(tmp_path / "run", *words) == 0
    assert before == whole[:8] and seen == whole[5:]  # from the checkpoint of step 5 on
    last = [json.loads((checkpoint.steps(tmp_path / f / "checkpoints")[-1] / "state.json").read_text()) for f in ("whole", "run")]
    assert last[0]["updates"] == last[1]["updates"] == 10


def test_trap_33_the_reference_follows_the_policy_after_its_step(tmp_path):
    """HALOs moves it before: then it takes weights over that are a step older."""
    mix = 0.25
    words = [*BANDIT, "algo=tr_dpo", "reference.every=1", f"reference.mix={mix}", "train.save_every=1", "train.keep_checkpoints=20"]
    assert train(tmp_path / "run", *words) == 0
    kept = checkpoint.steps(tmp_path / "run" / "checkpoints")
    policy = [load_file(folder / "weights.safetensors")["logits"] for folder in kept]
    reference = [load_file(folder / "reference.safetensors")["logits"] for folder in kept]
    assert len(kept) == 10
    for k in range(1, 10):  # a checkpoint of step k has the reference of step k, which the next step moves
        torch.testing.assert_close(reference[k], reference[k - 1].lerp(policy[k - 1], mix), rtol=0, atol=1e-7)
        assert not torch.allclose(policy[k], policy[k - 1], rtol=0, atol=1e-5)
    margins = [r["reward/margin"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    assert margins[0] == 0  # the first step is against where the policy began
