"""`prefopt plan` from the command line."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from prefopt.cli import main
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import plan as planning
from tests import tiny_pipelines, toy
from tests.toy_runs import FAST, train

SMALL = ["hardware=cpu", "hardware.threads=1", "hardware.peak_tflops=0.1", "data.limit=64", "data.eval_limit=8"]


def plan(capsys, *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["plan", *SMALL, *words]) == code
    out, err = capsys.readouterr()
    return re.sub(r"[ \n]+", " ", out) if code == 0 else err


def test_a_plan_says_what_a_run_takes(capsys, monkeypatch, tmp_path):
    """And neither makes the model nor leaves anything behind."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("prefopt.policies.tiny_lm.ensure_tiny_lm", lambda *a: pytest.fail("weights were asked for"))
    monkeypatch.chdir(tmp_path)
    said = plan(capsys)
    assert said.startswith("fits: ")
    for words in ("0.6 M parameters", "64 rows", "weights", "activations of a micro-batch", "ideal", "executed", "padding",
                  "sharing prompts", "reference store", "per step", "checkpoints"):
        assert words in said
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "runs").exists()


def test_the_work_is_that_of_the_run(capsys, tmp_path, tiny_lm):
    """Ideal and executed FLOPs of a step, as the run counts them."""
    seen = []
    original = planning.estimate
    words = ["train.steps=2", "algo=dpo", "data.limit=64", "train.batch_size=16", "train.micro_batch_tokens=400"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefopt.training.plan_text.estimate", lambda *a: seen.append(original(*a)) or seen[-1])
        plan(capsys, *words)
    efforts = []
    from prefopt.training.engine import Engine

    step = Engine.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", lambda *a: efforts.append(result := step(*a)) or result)
        assert train(tmp_path / "run", *[w for w in SMALL if w not in FAST], *words) == 0
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")
    work = seen[0].work
    for name in ("useful", "executed", "tokens", "slots"):
        assert getattr(work, name) == pytest.approx(sum(getattr(e.effort, name) for e in efforts) / 2), name


def test_a_run_that_does_not_fit_is_told_what_would_help(capsys, monkeypatch):
    monkeypatch.setattr("prefopt.training.memory.resident", lambda: 0.5e9)  # this process may hold gigabytes of other tests
    said = plan(capsys, "hardware.memory_gb=0.01")
    assert said.startswith("does not fit: ") and "no change of" in said
    needs = [float(x) for x in re.findall(r"fits: ([\d.]+) MB of", plan(capsys, "train.batch_size=64"))]
    limit = (needs[0] - 40) / 1000
    said = plan(capsys, "train.batch_size=64", f"hardware.memory_gb={limit}")
    change = re.search(r"it would with (.*?) \(", said)[1]
    assert change == "model.gradient_checkpointing=true"
    assert plan(capsys, "train.batch_size=64", f"hardware.memory_gb={limit + 0.02}", *change.split()).startswith("fits: ")


@pytest.mark.parametrize("words", [
    ["adapter=lora"], ["algo=reward_bt"], ["algo=kto", "reference.store=off"], ["source=rounds", "algo=online_dpo"], ["algo=grpo",
    "source=rollout"], ["algo=sft"], ["model.share_prompts=false", "model.fused_head=false"], ["model=bandit", "data=bandit"],
], ids=" ".join)  # fmt: skip
def test_every_kind_of_run_can_be_planned(capsys, words):
    said = plan(capsys, *words)
    assert said.startswith("fits: ")
    assert ("is not counted" in said.replace("\n", " ") or "counted" in said) if any("source=" in w for w in words) else True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_that_is_elsewhere(capsys):
    said = plan(capsys, "hardware=8xgpu", "hardware.peak_tflops=null", "model.attention=auto")
    assert said.startswith("needs ") and "hardware.memory_gb" in said and "one packed row" in said
    assert "set hardware.peak_tflops" in said
    assert plan(capsys, "hardware=8xgpu", "hardware.memory_gb=80", "hardware.peak_tflops=989").startswith("fits: ")


def test_a_model_by_its_config_alone(capsys, tmp_path):
    folder = toy.save_model(tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert plan(capsys, f"model.path={folder}", "model=llama3-8b", "adapter=lora").startswith("fits: ")
    shutil.rmtree(folder)
    assert "there is no such folder" in plan(capsys, f"model.path={folder}", "model=llama3-8b", code=2)


def test_bad_input_is_refused(capsys, tmp_path):
    assert "hardware.mfu=2" in plan(capsys, "hardware.mfu=2", code=2)
    assert "data.path" in plan(capsys, "data=jsonl", code=2)
    assert "-m makes sweeps of prefopt train" in plan(capsys, "-m", "seed=0,1", code=2)


# ---- pictures --------------------------------------------------------------------------------------

PICTURES = ["algo=dpo", "model=tiny-diffusion", "model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures", "data.limit=16",
            "data.eval_limit=4", "train.batch_size=8", "evaluation.kl=false"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_pipelines.save("sd15", tmp_path_factory.mktemp("pipeline"))


def test_a_plan_of_pictures_needs_configs_alone(capsys, pipeline, tmp_path):
    bare = shutil.copytree(pipeline, tmp_path / "bare")
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    said = plan(capsys, *PICTURES, f"model.path={bare}", "data.latents=fp16")
    assert said.startswith("fits: ")
    for words in ("16 rows; 40 pictures and ", "frozen copy", "activations of a micro-batch", "the encoding of pictures and captions",
                  "workspaces of convolutions are not", "forward", "noise=pool would", "for the VAE to encode",
                  "stored latents (fp16) 41.0 kB"):
        assert words in said
    assert "padding" not in said and "logits" not in said
    said = plan(capsys, *PICTURES, f"model.path={bare}", "noise=pool", "adapter=lora", "reference.store=on")
    assert "computed once and stored" in said and "reference store (shared)" in said


def test_the_work_on_pictures_is_that_of_the_run(capsys, pipeline, tmp_path):
    """Of rankings, with the pictures and captions that are encoded: of those held out all, of the others the best and the worst."""
    seen, efforts, encoded = [], [], []
    from prefopt.data.latents import Encodings
    from prefopt.training import plan_pictures
    from prefopt.training.engine import Engine

    original, step, want = plan_pictures.estimate, Engine.step, Encodings.want
    words = [*PICTURES, f"model.path={pipeline}", "train.steps=2", "adapter=lora", "evaluation.prompts=0", "train.self_check=false",
             "noise.draws=2", "train.micro_batch_tokens=8", "data.completions=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_pictures, "estimate", lambda *a: seen.append(original(*a)) or seen[-1])
        patch.setattr(Engine, "step", lambda *a: efforts.append(result := step(*a)) or result)
        patch.setattr(Encodings, "want", lambda *a: encoded.append(tuple(map(len, result := want(*a)))) or result)
        plan(capsys, *words)
        assert train(tmp_path / "run", "hardware.peak_tflops=0.1", *words) == 0
    for name in ("useful", "executed", "tokens", "slots"):
        assert getattr(seen[0].work, name) == pytest.approx(sum(getattr(e.effort, name) for e in efforts) / 2), name
    assert seen[0].reference == "adapter off" and seen[0].draws == 8
    scene = seen[0].scene
    assert encoded == [(scene.pictures, scene.captions)] and scene.pictures == 16 * 2 + 4 * 4
    assert all(len(row.tokens.branches) == 2 for row in scene.held_out), "what the run itself scores of them"


def test_a_run_on_pictures_that_does_not_fit_is_told_what_would_help(capsys, monkeypatch, pipeline):
    monkeypatch.setattr("prefopt.training.memory.resident", lambda: 0.0)
    words = [*PICTURES, f"model.path={pipeline}", "evaluation.prompts=0", "train.batch_size=16", "model.gradient_checkpointing=false",
             "train.micro_batch_tokens=64"]
    said = plan(capsys, *words, "hardware.memory_gb=0.00001")
    assert said.startswith("does not fit: ") and "no change of" in said
    needs = float(re.search(r"fits: ([\d.]+) MB of", plan(capsys, *words))[1])
    said = plan(capsys, *words, f"hardware.memory_gb={0.7 * needs / 1000}")
    change = re.search(r"it would with (.*?) \(", said)[1]
    assert change == "train.micro_batch_tokens=16"
    assert plan(capsys, *words, f"hardware.memory_gb={0.7 * needs / 1000}", *change.split()).startswith("fits: ")


def test_activations_that_cannot_be_measured_are_not_made_up(capsys, monkeypatch, pipeline):
    def fails(*_):
        raise RuntimeError("wants numbers")

    monkeypatch.setattr("prefopt.training.plan_pictures._run", fails)
    said = plan(capsys, *PICTURES, f"model.path={pipeline}")
    assert said.startswith("needs more than ") and "could not be measured on fake tensors (RuntimeError: wants numbers)" in said
    assert "activations of" not in said
