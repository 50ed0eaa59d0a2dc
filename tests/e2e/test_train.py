"""Whole runs through the command line, in process: every algorithm, resume, stop, divergence, sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.config.catalogue import algo_info, groups, load_yaml, modalities
from prefopt.policies.reference import FrozenCopy
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from tests.tiny_pipelines import save
from tests.toy_runs import FAST, train

pytestmark = pytest.mark.usefixtures("tiny_lm")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.steps(folder / "checkpoints")[-1] / "weights.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return set(left) == set(right) and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("slug", [slug for slug in groups()["algo"] if "llm" in modalities(algo_info(slug))])
def test_every_algorithm_trains_on_the_tiny_world(slug, tmp_path):
    run = tmp_path / slug
    written = any("/source" in entry for entry in map(str, load_yaml("algo", slug).get("defaults", [])))
    short = [] if written else ["sampler.max_new_tokens=8"]  # to learn from replies they must be long enough to differ in reward
    assert train(run, f"algo={slug}", "train.eval_every=4", *short) == 0  # at the start and at the end
    rows = read_jsonl(run / "metrics.jsonl")
    trained = [r for r in rows if r["split"] == "train"]
    assert [r["step"] for r in trained] == [1, 2, 3, 4]
    assert all(r["skipped_steps"] == 0 and r["grad_norm"] > 0 for r in trained)
    judged = [r for r in rows if r["split"] == "eval"]
    assert judged[0]["step"] == 0 and judged[-1]["step"] == 4
    writes = slug != "reward_bt"  # a reward model judges, and writes nothing
    for key in ("accuracy", *(("true_reward", "win_rate", "kl", "length", "logp/chosen") if writes else ("log_loss", "ece"))):
        assert isinstance(judged[-1][key], float), key
    assert ("loss" in judged[-1]) == (slug != "grpo")  # which has no loss on given rows
    if writes:
        assert judged[0]["kl"] == pytest.approx(0, abs=1e-4) and judged[0]["win_rate"] == 0.5
    assert (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "model" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: save(kind, root / kind) for kind in ("sd15", "sd3")}


@pytest.mark.parametrize(("slug", "kind"), [("diffusion_dpo", "sd15"), ("diffusion_kto", "sd15"), ("abc_diffusion", "sd15"),
                                            ("flow_dpo", "sd3")])
def test_algorithms_train_on_pictures(slug, kind, pipelines, tmp_path):
    """Random weights, so nothing is learnt; tests/objectives/test_picture_objectives.py has all of them."""
    run = tmp_path / slug
    model = ("model=tiny-diffusion", f"model.path={pipelines[kind]}", "model.resolution=16", "model.latent=[4,2]", "sampler.steps=2")
    assert train(run, f"algo={slug}", *model, "data=tiny-pictures", "data.limit=32", "data.eval_limit=4", "evaluation.prompts=2",
                 "train.eval_every=4") == 0
    rows = read_jsonl(run / "metrics.jsonl")
    trained, judged = ([r for r in rows if r["split"] == split] for split in ("train", "eval"))
    assert [r["step"] for r in trained] == [1, 2, 3, 4] and all(r["skipped_steps"] == 0 and r["grad_norm"] > 0 for r in trained)
    assert all(isinstance(judged[-1][key], float) for key in ("accuracy", "true_reward", "win_rate", "kl", "logp/chosen", "prompt_match"))
    assert judged[0]["kl"] == pytest.approx(0, abs=1e-4) and judged[0]["win_rate"] == 0.5
    assert (run / "report.html").stat().st_size > 10_000 and any((run / "model").rglob("*.safetensors"))


@pytest.mark.parametrize("model", ["tiny-lm-lora", "bandit"])
def test_other_tiny_models_train(model, tmp_path):
    extra = ["data=bandit"] if model == "bandit" else []
    assert train(tmp_path / "run", f"model={model}", *extra) == 0


TEN = ["train.steps=10", "train.save_every=5", "train.eval_every=5"]


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory, tiny_lm):
    folder = tmp_path_factory.mktemp("ten") / "run"
    assert train(folder, *TEN) == 0
    return folder


def interrupt_at(monkeypatch, step: int, error: BaseException | None = None, signal_number: int | None = None):
    real, calls = Engine.step, []

    def stepping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            if error is not None:
                raise error
            os.kill(os.getpid(), signal_number)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "step", stepping)


def test_a_killed_run_resumes_to_the_same_bits(ten_steps, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, error=SystemError("killed"))
        with pytest.raises(SystemError):
            train(run, *TEN)
    assert checkpoint.steps(run / "checkpoints")[-1].name == "step-000005"
    assert train(run, *TEN) == 0
    assert same(run, ten_steps)
    steps = [r["step"] for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "train"]
    assert steps == list(range(1, 11))  # none lost, none doubled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_resumable_run(number, ten_steps, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal_number=number)
        assert train(run, *TEN) == (143 if number == signal.SIGTERM else 130)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and status["step"] == 3
    assert f"the same command continues it (with hydra.run.dir={run})" in capsys.readouterr().err
    assert train(run, *TEN) == 0
    assert same(run, ten_steps)


def test_a_second_signal_does_not_wait_and_leaves_a_resumable_run(ten_steps, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, error=KeyboardInterrupt())
        assert train(run, *TEN) == 130
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 5) and "the same command continues" in status["message"]
    assert train(run, *TEN) == 0
    assert same(run, ten_steps)


def test_kill_9_of_a_real_process_resumes_to_the_same_bits(ten_steps, tmp_path):
    """A subprocess, because nothing in this process can stand for SIGKILL."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "prefopt.cli", "train", f"hydra.run.dir={run}", *FAST, *TEN]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.steps(run / "checkpoints") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert train(run, *TEN) == 0
    assert same(run, ten_steps)


def test_a_finished_run_is_left_alone(ten_steps, capsys):
    before = (ten_steps / "metrics.jsonl").read_bytes()
    assert train(ten_steps, *TEN) == 0
    assert "is finished" in capsys.readouterr().err
    assert (ten_steps / "metrics.jsonl").read_bytes() == before


def test_divergence_stops_with_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    real = Engine.step
    calls = []

    def poisoned(self, micros, lr):
        calls.append(1)
        if len(calls) == 6:
            next(iter(self.policy.parameters())).data.fill_(float("nan"))
        return real(self, micros, lr)

    monkeypatch.setattr(Engine, "step", poisoned)
    run = tmp_path / "run"
    assert train(run, *TEN, "train.max_skipped_steps=2") == 1
    said = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in said and "step-000005" in said
    assert checkpoint.steps(run / "checkpoints")[-1].name == "step-000005"
    assert all(torch.isfinite(w).all() for w in weights(run).values())


def test_self_check_stops_a_wrong_reference(tmp_path, capsys, monkeypatch):
    from prefopt.training import reference

    class Wrong(FrozenCopy):
        def __call__(self, micro):
            return super().__call__(micro) - 0.1

    monkeypatch.setattr(reference, "make_reference", lambda policy, *_, **__: Wrong(policy))
    live = "reference.store=off"
    assert train(tmp_path / "run", live) == 1
    assert "self-check: policy and reference differ" in capsys.readouterr().err
    with monkeypatch.context():
        assert train(tmp_path / "unchecked", live, "train.self_check=false") == 0


def test_multirun_goes_on_after_a_failing_job(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    overrides = ["-m", "algo=dpo,simpo", "model=bandit", "data=bandit", "hardware=cpu", "train.steps=2", f"hydra.sweep.dir={sweep}"]
    # The first job's folder is taken by something else, so that job cannot run.
    blocked = sweep / "0-algo=dpo,data=bandit,hardware=cpu,model=bandit,train.steps=2"
    blocked.mkdir(parents=True)
    (blocked / "something").write_text("else")
    assert main(["train", *overrides]) == 1
    jobs = json.loads((sweep / "sweep.json").read_text())
    assert [j["state"] for j in jobs] == ["failed", "finished"]
    assert "is not empty" in jobs[0]["message"]
    assert (sweep / "1-algo=simpo,data=bandit,hardware=cpu,model=bandit,train.steps=2" / "report.html").is_file()
    # Mended, the same command runs what is missing and leaves the rest alone.
    (blocked / "something").unlink()
    assert main(["train", *overrides]) == 0
    assert [j["state"] for j in json.loads((sweep / "sweep.json").read_text())] == ["finished", "finished"]


def test_eval_and_sample(ten_steps, capsys):
    assert main(["eval", f"run={ten_steps}", "prompts=8"]) == 0
    figures = json.loads((ten_steps / "eval.json").read_text())
    assert figures["step"] == 10 and figures["before"]["win_rate"] == 0.5
    last = [r for r in read_jsonl(ten_steps / "metrics.jsonl") if r["split"] == "eval"][-1]
    assert figures["after"]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    capsys.readouterr()
    assert main(["sample", f"run={ten_steps}", "prompt=Tell me about the fox at the harbour.", "count=2", "sampler=greedy"]) == 0
    out = capsys.readouterr().out
    assert out.count("> Tell me about the fox at the harbour.") == 2


def test_resolved_config_and_manifest(ten_steps):
    config = yaml.safe_load((ten_steps / "config.yaml").read_text())
    assert config["algo"]["name"] == "dpo" and config["optim"]["lr"] == config["model"]["learning_rate"]
    manifest = json.loads((ten_steps / "manifest.json").read_text())
    assert manifest["threads"] == 1 and manifest["packages"]["torch"] and manifest["data"]["train"]["rows"] == 32
    assert len(manifest["tokenizer_sha256"]) == 64 and len(manifest["model"]["fingerprint"]) == 64
