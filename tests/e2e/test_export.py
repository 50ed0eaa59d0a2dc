"""prefopt export style=model: a plain folder that transformers or diffusers loads, equal to the run's policy, with a model card."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from tests.tiny_pipelines import save
from tests.toy_runs import train

LORA = ["model=tiny-lm-lora", "model.lora.learning_rate=1e-2", "optim.warmup=0", "evaluation.prompts=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_lm):
    """A LoRA run that keeps its best checkpoint; the loss on held-out rows is best, or worst, at the step that `keep_best` finds."""
    folder = tmp_path_factory.mktemp("export") / "run"
    words = ["algo=dpo", *LORA, "train.steps=6", "train.eval_every=1", "train.keep_checkpoints=1", "train.keep_best=loss"]
    assert train(folder, *words) == 0
    return folder


def tree_logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(1, 12)[None]).logits


def test_a_merged_model_gives_the_adapters_logits_and_its_card_tells_what_it_is(run, tmp_path, tiny_lm, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("MY_API_TOKEN", "s3cret-s3cret")
    assert main(["export", str(run), "style=model", f"output={tmp_path / 'out'}"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(merged, "peft_config") and not (tmp_path / "out" / "adapter_config.json").exists()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), run / "model")
    base = tree_logits(AutoModelForCausalLM.from_pretrained(tiny_lm))
    torch.testing.assert_close(tree_logits(merged), tree_logits(adapted), atol=1e-4, rtol=1e-4)
    assert (tree_logits(merged) - base).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("library_name: transformers", "trained with dpo", "DPO", "tiny-feedback, 32 training rows", "| true_reward |", "beta: 0.1",
                 "after optimiser step 6", "prefopt train"):
        assert part in text, part
    assert "s3cret" not in text


def test_the_best_checkpoint_is_kept_and_exported(run, tmp_path):
    losses = {r["step"]: r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "eval" and r["step"]}
    best = max(losses, key=losses.get)
    kept = checkpoint.steps(run / "checkpoints")
    assert [p.name for p in kept] == [f"step-{step:06d}" for step in sorted({best, 6})]
    state = json.loads((kept[-1] / "state.json").read_text())
    assert state["best"] == {"measure": "loss", "value": losses[best], "step": best}
    assert main(["export", str(run), "style=model", "checkpoint=best", "dtype=bf16", f"output={tmp_path / 'best'}"]) == 0
    assert f"after optimiser step {best}" in (tmp_path / "best" / "README.md").read_text()
    assert {t.dtype for t in load_file(tmp_path / "best" / "model.safetensors").values()} == {torch.bfloat16}


def test_checkpoints_are_logged_with_their_size_and_time(run):
    rows = read_jsonl(run / "checkpoints" / "log.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    newest = checkpoint.steps(run / "checkpoints")[-1]
    assert rows[-1]["bytes"] == sum(f.stat().st_size for f in newest.iterdir())
    assert all(r["write_seconds"] > 0 and r["waited_seconds"] > 0 for r in rows)


@pytest.mark.parametrize("words", [["adapter=lora", "model.lora.r=2"], ["train.ema=0.5"]], ids=["lora", "average"])
def test_a_pipeline_of_diffusers_loads_what_was_exported(words, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = save("sd15", tmp_path / "sd15")
    common = ["model=tiny-diffusion", f"model.path={pipeline}", "model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures",
              "data.limit=8", "data.eval_limit=4", "train.batch_size=4", "train.steps=2", "evaluation.prompts=0", "optim.lr=1e-2"]
    assert train(tmp_path / "run", "algo=diffusion_dpo", *common, *words) == 0
    assert main(["export", str(tmp_path / "run"), "style=model", f"output={tmp_path / 'out'}"]) == 0
    ours = DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    theirs = DiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    before = theirs.unet.state_dict()
    assert max(float((value - before[name]).abs().max()) for name, value in ours.unet.state_dict().items()) > 1e-3
    if "adapter=lora" in words:
        theirs.load_lora_weights(tmp_path / "run" / "model")
    else:
        theirs = DiffusionPipeline.from_pretrained(pipeline, unet=type(theirs.unet).from_pretrained(tmp_path / "run" / "model" / "unet"),
                                                   safety_checker=None)
    x, t, said = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16)
    with torch.no_grad():
        a, b = (p.unet(x, t, said).sample for p in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_said_and_nothing_is_left(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    for words, said in (
        (["style=model", f"output={tmp_path / 'there'}"], "exists already; choose a folder"),
        (["style=model", f"output={tmp_path / 'a'}", "checkpoint=4"], "keeps those of the steps"),
        (["style=model", f"output={tmp_path / 'a'}", "dtype=int8"], "dtype=int8 is none of fp32, bf16"),
        (["style=model", f"output={tmp_path / 'a'}", "private=maybe"], "private=maybe is none of true, false"),
        (["style=kohya", f"output={tmp_path / 'a.safetensors'}", "checkpoint=best"], "checkpoint=best is for style=model"),
        (["style=modle", f"output={tmp_path / 'a'}"], "did you mean 'model'?"),
    ):
        assert main(["export", str(run), *words]) == 2
        assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]
    assert train(tmp_path / "table", "algo=dpo", "model=bandit", "data=bandit", "train.steps=1") == 0
    assert main(["export", str(tmp_path / "table"), "style=model", f"output={tmp_path / 'a'}"]) == 2
    assert "a table that no other program reads" in capsys.readouterr().err


def test_a_push_uploads_the_folder_and_a_refusal_leaves_it(run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    seen = []

    class Api:
        def create_repo(self, name, **settings):
            seen.append((name, settings["private"]))
            if name == "me/refused":
                raise OSError("no token")
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen.append((repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    for name, code in (("me/model", 0), ("me/refused", 2)):
        output = tmp_path / name.replace("/", "-")
        assert main(["export", str(run), "style=model", f"output={output}", f"push={name}", "private=false"]) == code
        assert (output / "README.md").is_file()
    assert seen == [("me/model", False), ("me/model", str(tmp_path / "me-model")), ("me/refused", False)]
    said = capsys.readouterr()
    assert "pushed: https://hub/me/model" in said.out and "push=me/refused: the hub refused it (no token)" in said.err


def test_a_measure_that_evaluations_do_not_have_is_refused_before_training(tmp_path, capsys):
    assert train(tmp_path / "run", "algo=dpo", "model=bandit", "data=bandit", "train.keep_best=-los") == 2
    assert "train.keep_best=-los is no measure of this run's evaluations; did you mean 'loss'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoints/*"))
