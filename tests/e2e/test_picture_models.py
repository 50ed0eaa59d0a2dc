"""Published diffusion models' configs, with a small random pipeline of their family for its weights; and a sweep over two models."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from prefopt.cli import guarded, main
from prefopt.config.catalogue import groups, resolved_keys
from prefopt.launch import jobs
from prefopt.policies import tiny_diffusion
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint, signals
from prefopt.training.loop import train as train_loop
from tests.tiny_pipelines import UNETS, folders, pipeline
from tests.toy_runs import FAST, fresh_accelerator, train
from tests.unit.test_report import Tags

PUBLISHED = [m for m in groups()["model"] if resolved_keys("model", m)["kind"].value == "diffusion" and not m.startswith("tiny-")]
FAMILY = {"sd15": "sd15", "sd21": "sd21", "sdxl": "sdxl", "pixart": "pixart", "sd3": "sd3", "flux": "flux", "sana": "sana"}  # by beginning
FLOWS = ("sd3", "flux", "sana")
# Each family with all of its weights, and each pipeline's way of loading adapters, from a config of its own where there is one. Sizes of
# one family differ in little else than the hub id.
TRAINED = [
    "sd15", "sd15-lora", "sd21", "sdxl", "sdxl-lora", "pixart-sigma", "pixart-sigma adapter=lora", "sd35-medium", "sd35-medium-lora",
    "flux-dev", "flux-dev-lora", "sana-1.6b", "sana-1.6b adapter=lora",
]
ONE_STEP = ["model.resolution=16", "data=tiny-pictures", "data.limit=4", "data.eval_limit=2", "train.steps=1", "train.batch_size=2",
            "train.eval_every=1", "evaluation.prompts=2", "sampler.steps=2", "optim.warmup=0"]


def family_of(model: str) -> str:
    return next(family for key, family in FAMILY.items() if model.startswith(key))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return folders(tmp_path_factory)


def test_every_published_model_has_a_family_that_is_trained_here():
    assert {family_of(words) for words in TRAINED} == set(FAMILY.values()) == {family_of(model) for model in PUBLISHED}
    assert {words.split()[0] for words in TRAINED if words.split()[0].endswith("-lora")} == {m for m in PUBLISHED if m.endswith("-lora")}


@pytest.mark.parametrize("words", TRAINED)
def test_published_models_train_from_a_local_folder_of_their_family(words, folder, tmp_path):
    """And plain diffusers loads what they saved. The config's own checkpointing, targets, guidance and learning rate."""
    (model, *more), run, family = words.split(), tmp_path / "run", family_of(words)
    algo = "algo=flow_dpo" if family in FLOWS else "algo=diffusion_dpo"
    latent = "model.latent=[4,2]"  # the tiny VAEs' channels and factor
    assert train(run, algo, f"model={model}", *more, f"model.path={folder(family)}", latent, *ONE_STEP) == 0
    manifest, rows = json.loads((run / "manifest.json").read_text()), read_jsonl(run / "metrics.jsonl")
    assert manifest["model"]["where"] == f"local folder {folder(family)}"
    assert [r["skipped_steps"] for r in rows if r["split"] == "train"] == [0] and rows[-1]["split"] == "eval"
    kept = load_file(checkpoint.steps(run / "checkpoints")[-1] / "weights.safetensors")
    kept = {name.removeprefix("network."): weight for name, weight in kept.items()}
    pipe, part = pipeline(folder(family)), "unet" if family in UNETS else "transformer"
    network = getattr(pipe, part)
    if not ("adapter=lora" in more or model.endswith("-lora")):
        trained = type(network).from_pretrained(run / "model" / part)
        loaded = trained.state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in kept.items())
        assert {name for name, _ in trained.named_parameters()} == set(kept)
        assert any(not torch.equal(weight, network.state_dict()[name]) for name, weight in kept.items())
        assert manifest["trainable_parameters"] == manifest["parameters"]
        return
    assert manifest["trainable_parameters"] < manifest["parameters"]
    if family == "pixart":  # whose pipeline loads no adapters
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, run / "model")
    else:
        pipe.load_lora_weights(run / "model")
    plain = {re.sub(r"^base_model\.model\.|\.default(_0)?\b", "", name): weight for name, weight in network.state_dict().items()}
    kept = {re.sub(r"\.default\b", "", name): weight for name, weight in kept.items()}
    assert kept and all("lora_" in name and torch.equal(plain[name], weight) for name, weight in kept.items())
    assert {name for name in plain if "lora_" in name} == set(kept)
    assert any(weight.any() for name, weight in kept.items() if "lora_B" in name)


def test_a_multirun_over_two_objectives_and_two_picture_models_is_compared(folder, tmp_path, monkeypatch, capsys):
    """`prefopt train -m` and then `prefopt compare` on its folder, as a user would. Jobs run in this process, which saves four starts."""

    def here(job, cfg, words, log) -> int:
        with fresh_accelerator():
            return guarded(lambda: train_loop(cfg))

    monkeypatch.setattr(jobs, "_run", here)
    monkeypatch.setattr(signals, "STOPS", ())  # a job's thread may set no handlers
    monkeypatch.setattr(tiny_diffusion, "ensure_tiny_diffusion", lambda kind: folder({"epsilon": "sd15", "flow": "sd3"}[kind]))
    sweep = tmp_path / "sweep"
    assert main(["train", "-m", "algo=diffusion_dpo,ipo", "model=tiny-diffusion,tiny-flow", *FAST, "model.latent=[4,2]", *ONE_STEP,
                 f"hydra.sweep.dir={sweep}", "hydra.launcher.jobs=1"]) == 0
    assert all(folder.name.startswith(f"{number}-algo=") and len(folder.name) > 200  # its words make more than a name can hold
               for number, folder in enumerate(sorted(path for path in sweep.iterdir() if path.is_dir())))
    found = json.loads((sweep / "sweep.json").read_text())
    assert [job["state"] for job in found] == ["finished"] * 4 and len(list(sweep.glob("*/report.html"))) == 4
    capsys.readouterr()
    assert main(["compare", str(sweep)]) == 0
    said, page = capsys.readouterr().out, Tags((sweep / "compare.html").read_text(encoding="utf-8")).text
    named = {f"{algo} model={model}" for algo in ("diffusion_dpo", "ipo") for model in ("tiny-diffusion", "tiny-flow")}
    rows = re.findall(r"^([A-Z])  (\S+ model=\S+)", said.partition("\n\n")[0], flags=re.MULTILINE)
    assert "".join(sorted(letter for letter, _ in rows)) == "ABCD" and {method for _, method in rows} == named
    assert all(method in page for method in named) and "The runs start from different models" in page
