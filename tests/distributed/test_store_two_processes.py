"""The reference store with several processes at once: ranks of one run that fill it together, and two runs side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.policies import store
from prefopt.tracking.tracker import read_jsonl
from tests.toy_runs import train

SMALL = ["algo=kto", "train.micro_batch_tokens=256", "evaluation.prompts=4"]


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "store" / "reference"


def begin(folder: Path, hardware: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "prefopt.cli", "train", "debug=fast", f"hardware={hardware}", f"hydra.run.dir={folder}", *SMALL]
    return subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.PIPE, text=True)


def end(run: subprocess.Popen) -> str:
    said = run.communicate(timeout=300)[1]
    assert run.returncode == 0, said[-2000:]
    return said


def how(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["reference"]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r]


def test_ranks_fill_the_store_together_and_one_process_finds_it_full(tmp_path, tiny_lm, own_store):
    said = end(begin(tmp_path / "two", "2xcpu"))
    assert how(tmp_path / "two") == "stored (0 of 160 replies were there)"
    assert said.count("reference: stored") == 1  # one process speaks
    assert train(tmp_path / "one", *SMALL) == 0
    assert how(tmp_path / "one") == "stored (160 of 160 replies were there)"
    assert train(tmp_path / "live", *SMALL, "reference.store=off") == 0
    for folder in ("one", "two"):
        assert losses(tmp_path / folder) == pytest.approx(losses(tmp_path / "live"), rel=1e-4)


def test_two_runs_fill_one_store_at_once(tmp_path, tiny_lm, own_store):
    for run in [begin(tmp_path / name, "cpu") for name in "ab"]:
        end(run)
    assert sorted(map(how, (tmp_path / "a", tmp_path / "b"))) == ["stored (0 of 160 replies were there)",
                                                                  "stored (160 of 160 replies were there)"], "one scores, the other waits"
    count, broken = store.verify(own_store)
    assert count > 0 and broken == []
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    assert train(tmp_path / "c", *SMALL) == 0
    assert how(tmp_path / "c") == "stored (160 of 160 replies were there)"
