"""Whole runs under ZeRO on two processes end where one process without it ends: losses, weights, moments and the model that is saved."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from prefopt.launch import app
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.engine import Engine
from tests.distributed.launching import torchrun
from tests.distributed.zero_runs import Killed, killed_before
from tests.tiny_pipelines import save
from tests.toy_runs import train

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed; the extra `test` brings it")

# Adam divides by the root of what may be a very small number, which magnifies rounding; the largest difference seen was 1e-5.
TOLERANCE = 5e-5
ADAM = ["optim.eps=1e-6", "optim.lr=3e-4", "optim.warmup=0"]
TEXTS = ["evaluation.prompts=4", "train.micro_batch_tokens=512"]
PICTURES = ["model=tiny-diffusion", "model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures", "data.limit=12", "data.eval_limit=4",
            "train.batch_size=4", "evaluation.prompts=2", "sampler.steps=2", "evaluation.kl=false"]
CASES = {
    "dpo, stage 1": (1, ["algo=dpo", *TEXTS]),
    "kto, stage 2": (2, ["algo=kto", *TEXTS]),  # it couples the whole batch
    "dpo, stage 2, optimiser offloaded": (2, ["algo=dpo", "hardware.offload=optimizer", *TEXTS]),
    "dpo, stage 3": (3, ["algo=dpo", *TEXTS]),
    "kto, stage 3": (3, ["algo=kto", *TEXTS]),
    "simpo, stage 3, all offloaded": (3, ["algo=simpo", "hardware.offload=all", *TEXTS]),
    "a listwise one, stage 3": (3, ["algo=dpo_pl", *TEXTS]),
    "a token-level one with a live reference, stage 3": (3, ["algo=tdpo", "reference.store=off", *TEXTS]),
    "dpo with LoRA, stage 3": (3, ["algo=dpo", "model=tiny-lm-lora", *TEXTS]),
    "grpo, which samples, stage 3": (3, ["algo=grpo", "source.prompts=4", "source.samples=4", "source.epochs=2", "sampler.batch_size=8",
                                         "sampler.max_new_tokens=24", "evaluation.prompts=0"]),
    "diffusion_dpo, stage 3": (3, ["algo=diffusion_dpo", *PICTURES]),
    "diffusion_dpo with an average, stage 2": (2, ["algo=diffusion_dpo", "train.ema=0.9", *PICTURES]),
}
STEPS = ["train.steps=3", "train.eval_every=3"]
# A run that goes on under other stages and numbers of processes: who begins it, and the steps that each start makes.
ELASTIC = ["algo=dpo", *TEXTS, "train.steps=7", "train.eval_every=7", "train.save_every=1"]
BEGINS, GOES_ON = 2, ((3, 2), (1, 2))  # steps of one process; then (stage, steps) of two, and one process ends it


def config_of(folder, monkeypatch, *words) -> dict:
    """The config of a run, which is not begun."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(app, "run_here", lambda cfg: made.append(asdict(cfg)) or {})
        assert train(folder, *words) == 0
    return made[0]


def alone(folder, monkeypatch, kill, *words, spoil=None) -> None:
    """In this process, until it dies before its step `kill`."""
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", killed_before(kill, spoil))
        if kill is None:
            assert train(folder, *words) == 0
        else:
            with pytest.raises(Killed):
                train(folder, *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_lm):
    """Folder of all runs: those of one process, and those of two, which make them in one go."""
    root, monkeypatch = tmp_path_factory.mktemp("zero"), pytest.MonkeyPatch()
    pipeline = save("sd15", root / "sd15")
    jobs = []
    for number, (stage, words) in enumerate(CASES.values()):
        words = [*words, *STEPS, *ADAM, *([f"model.path={pipeline}"] if "model=tiny-diffusion" in words else [])]
        plain = [w for w in words if "offload" not in w]
        assert train(root / f"one-{number}", *plain) == 0
        config = config_of(root / f"two-{number}", monkeypatch, "hardware=2xcpu", f"hardware.zero={stage}", *words)
        jobs.append({"config": config, "algo": config["algo"].get("name", "algo"), "kill": None})
    alone(root / "whole", monkeypatch, None, *ELASTIC, *ADAM)
    alone(root / "elastic", monkeypatch, BEGINS + 1, *ELASTIC, *ADAM)
    for stage, more in GOES_ON:
        config = config_of(root / "elastic", monkeypatch, "hardware=2xcpu", f"hardware.zero={stage}", *ELASTIC, *ADAM)
        jobs.append({"config": config, "algo": "dpo", "kill": more + 1})
    spoilt = ["algo=dpo", *TEXTS, *STEPS, *ADAM, "train.self_check=false"]
    alone(root / "spoilt-0", monkeypatch, None, *spoilt, spoil=2)
    for stage in (1, 3):
        config = config_of(root / f"spoilt-{stage}", monkeypatch, "hardware=2xcpu", f"hardware.zero={stage}", *spoilt)
        jobs.append({"config": config, "algo": "dpo", "kill": None, "spoil": 2})
    (root / "jobs.json").write_text(json.dumps(jobs))
    torchrun("-m", "tests.distributed.zero_runs", str(root / "jobs.json"))
    alone(root / "elastic", monkeypatch, None, *ELASTIC, *ADAM)
    monkeypatch.undo()
    return root


def same(ours, theirs, files=("weights", "optimizer")) -> None:
    ours, theirs = (checkpoint.steps(folder / "checkpoints")[-1] for folder in (ours, theirs))
    assert ours.name == theirs.name and checkpoint.problem(ours) == ""
    for file in files:
        a, b = (load_file(path / f"{file}.safetensors") for path in (ours, theirs))
        assert set(a) == set(b) and len(a) > 3
        for name in set(a) - {"rng"}:
            assert a[name].shape == b[name].shape
            assert float((a[name] - b[name]).abs().max()) <= TOLERANCE, name
        largest = max(float(value.abs().max()) for name, value in a.items() if name != "rng")
        assert largest > (1e-3 if file == "optimizer" else 0.01)  # there is something to compare


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_trap_13_two_processes_under_zero_end_where_one_process_ends(number, runs):
    """With what the policy and its reference, stored or asked live, say of the rows."""
    one, two = runs / f"one-{number}", runs / f"two-{number}"
    same(one, two, ("weights", "optimizer", "ema") if "average" in list(CASES)[number] else ("weights", "optimizer"))
    mine, theirs = ([r for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == "train"] for folder in (one, two))
    assert len(mine) == len(theirs) == 3
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        scores = [name for name in a if name.startswith(("logp/", "log_ratio/", "reward/"))]
        assert scores or "grpo" in list(CASES)[number]
        assert {n: a[n] for n in scores} == pytest.approx({n: b[n] for n in scores}, rel=1e-4, abs=1e-4)
    saved = sorted(p.relative_to(one / "model") for p in (one / "model").rglob("*.safetensors"))
    assert saved == sorted(p.relative_to(two / "model") for p in (two / "model").rglob("*.safetensors")) and saved
    for path in saved:
        a, b = load_file(one / "model" / path), load_file(two / "model" / path)
        assert set(a) == set(b) and all(a[n].shape == b[n].shape and (a[n] - b[n]).abs().max() <= TOLERANCE for n in a)


def test_a_run_goes_on_under_other_stages_and_numbers_of_processes(runs):
    """One process, two under stage 3, two under stage 1, one again."""
    same(runs / "elastic", runs / "whole")
    mine, theirs = ([(r["step"], r["loss"]) for r in read_jsonl(runs / name / "metrics.jsonl") if r["split"] == "train"]
                    for name in ("elastic", "whole"))
    assert [step for step, _ in mine] == list(range(1, 8))
    assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_whose_loss_is_not_finite_is_skipped_though_its_gradient_is_finite(stage, runs):
    ours, theirs = runs / f"spoilt-{stage}", runs / "spoilt-0"
    same(ours, theirs)
    for folder in (ours, theirs):
        assert [r["skipped_steps"] for r in read_jsonl(folder / "metrics.jsonl") if r["split"] == "train"] == [0, 1, 1]
        assert json.loads((checkpoint.steps(folder / "checkpoints")[-1] / "state.json").read_text())["updates"] == 2
