"""Hub models' configs, with a small random model of their architecture in place of the weights; and W&B on a real run."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.config.catalogue import groups, resolved_keys
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from tests import toy
from tests.toy_runs import train
from tests.wandb_reader import records

HUB_MODELS = [m for m in groups()["model"] if resolved_keys("model", m)["kind"].value == "causal_lm" and not m.startswith("tiny-lm")]
FAMILY = {  # beginning of a config's name -> (architecture, chat template of its instruct models)
    "llama3": ("llama", "llama3"), "smollm2": ("llama", "chatml"), "mistral": ("mistral", "mistral"), "gemma2": ("gemma2", "gemma"),
    "gemma3": ("gemma3", "gemma3"), "qwen2.5": ("qwen2", "system"), "qwen3": ("qwen3", "qwen3"),
}
# One of each family, base and instruct: sizes differ in hub id and learning rate only.
TRAINED = [
    "llama3-8b", "llama3-8b-lora", "llama3-8b-instruct", "smollm2-135m", "smollm2-135m-lora", "mistral-7b", "mistral-7b-instruct",
    "gemma2-2b", "gemma2-2b-it", "gemma3-1b", "gemma3-1b-it", "qwen2.5-0.5b", "qwen2.5-0.5b-instruct", "qwen3-0.6b-base", "qwen3-0.6b",
]


def stand_in(model: str, folder):
    """A small random model for the config `model`; a base model comes without a chat template."""
    base = resolved_keys("model", model)["chat_template"].value != "null"
    family, template = next(value for key, value in FAMILY.items() if model.startswith(key))
    return toy.save_model(folder, family, None if base else template)


def test_every_hub_model_has_a_family_that_is_trained_here():
    trained = {next(f for f in FAMILY if m.startswith(f)) for m in TRAINED}
    assert trained == set(FAMILY) and all(any(m.startswith(f) for f in FAMILY) for m in HUB_MODELS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A few chat pairs in a file."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"How many legs has animal {i}?", "chosen": f"It has {i} legs.", "rejected": "I will not say."} for i in range(16)]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    return file


@pytest.mark.parametrize("model", TRAINED)
def test_hub_models_train_from_a_local_folder_of_their_architecture(model, pairs, tmp_path):
    folder = stand_in(model, tmp_path / "model")
    run = tmp_path / "run"
    assert train(run, f"model={model}", f"model.path={folder}", "data=jsonl", f"data.path={pairs}",
                 "data.eval_fraction=0.25", "sampler.max_new_tokens=8", "train.eval_every=4") == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["model"]["where"] == f"local folder {folder}"
    if model.endswith("-lora"):
        assert (run / "model" / "adapter_model.safetensors").is_file()
        assert manifest["trainable_parameters"] < manifest["parameters"]
        assert all("lora" in name for name in load_file(checkpoint.steps(run / "checkpoints")[-1] / "weights.safetensors"))
    else:
        assert (run / "model" / "config.json").is_file()
        assert manifest["trainable_parameters"] == manifest["parameters"]


@pytest.mark.parametrize("model", ["mistral-7b-instruct", "gemma2-2b-it", "gemma3-1b-it", "qwen3-0.6b"])
def test_an_adapter_goes_onto_any_model(model, pairs, tmp_path):
    folder, run = stand_in(model, tmp_path / "model"), tmp_path / "run"
    assert train(run, "algo=simpo", f"model={model}", "adapter=lora", f"model.path={folder}", "data=jsonl", f"data.path={pairs}",
                 "data.eval_fraction=0.25", "sampler.max_new_tokens=8", "train.eval_every=4") == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["optim"]["lr"] == config["model"]["lora"]["learning_rate"] > 0
    assert (run / "model" / "adapter_model.safetensors").is_file()


def test_a_model_in_four_bits_trains_its_adapter(pairs, tmp_path):
    """The real bitsandbytes, on the CPU."""
    pytest.importorskip("bitsandbytes")
    folder = toy.save_model(tmp_path / "model", "llama", "chatml", hidden_size=64, intermediate_size=128)
    common = ["model=smollm2-135m", "adapter=qlora", f"model.path={folder}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0.25",
              "sampler.max_new_tokens=8", "optim.lr=0.01", "hardware.precision=bf16", "reference.store=off"]
    run = tmp_path / "run"
    assert train(run, *common) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["reference"] == "adapter off" and manifest["trainable_parameters"] < manifest["parameters"]
    weights = load_file(run / "model" / "adapter_model.safetensors")
    assert any(w.abs().sum() > 0 for name, w in weights.items() if "lora_B" in name) and not any("quant" in name for name in weights)
    losses = [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["split"] == "train"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0]  # it starts where its reference is
    # The adapter goes onto the same base again, and a run can start from it.
    assert train(tmp_path / "again", *common, f"model.lora.adapter={run / 'model'}") == 0
    assert main(["eval", f"run={run}", "prompts=2"]) == 0


def test_the_manifest_has_the_commits_that_model_and_data_resolved_to(pairs, tmp_path, monkeypatch):
    """From a hub cache as the clients leave it, without a network."""
    import datasets
    import huggingface_hub

    sha = {"model": "a" * 40, "data": "b" * 40}
    repo = tmp_path / "hub" / "models--someone--model-x"
    toy.save_model(repo / "snapshots" / sha["model"], "llama", "chatml")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha["model"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    table = datasets.Dataset.from_json(str(pairs), cache_dir=str(tmp_path / "data"))
    table.info.download_checksums = {f"hf://datasets/someone/pairs@{sha['data']}/train.jsonl": {"num_bytes": 1}}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, revision, name: {"train": table})
    assert train(tmp_path / "run", "model=smollm2-135m", "model.path=someone/model-x", "data=ultrafeedback-cleaned",
                 "data.path=someone/pairs", "data.eval_fraction=0.25", "sampler.max_new_tokens=8") == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["where"] == "hub someone/model-x" and manifest["model"]["revision"] == sha["model"]
    assert manifest["data"]["train"]["revision"] == manifest["data"]["eval"]["revision"] == sha["data"]


def test_the_saved_model_is_a_plain_transformers_folder_that_can_be_trained_on(pairs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = toy.save_model(tmp_path / "model")
    common = ["model=llama3-8b-instruct", "data=jsonl", f"data.path={pairs}", "sampler.max_new_tokens=8", "evaluation.prompts=0"]
    assert train(tmp_path / "a", f"model.path={folder}", *common) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "model").chat_template
    assert train(tmp_path / "b", f"model.path={tmp_path / 'a' / 'model'}", *common) == 0


def test_wandb_offline_of_a_real_run_is_read_back(tmp_path, tiny_lm, monkeypatch):
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    run = tmp_path / "run"
    assert train(run, "tracker=wandb-offline") == 0
    import wandb

    wandb.teardown()
    rows = read_jsonl(run / "metrics.jsonl")
    assert logged(run, "train/loss") == pytest.approx([r["loss"] for r in rows if r["split"] == "train"])
    assert logged(run, "eval/true_reward") == pytest.approx([r["true_reward"] for r in rows if r["split"] == "eval"])
    assert len(logged(run, "samples.path")) == len(logged(run, "eval/true_reward")) and len(logged(run, "report.path")) == 1
    secret = b"0123456789abcdef0123456789abcdef01234567"
    assert all(secret not in f.read_bytes() for f in run.rglob("*") if f.is_file())


def logged(run, key):
    """Values of a metric in the offline run file, in order."""
    found = []
    for record in records(next((run / "wandb").glob("offline-run-*/*.wandb"))):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found += [row[key]] if key in row else []
    return found


def test_a_multirun_over_two_objectives_and_two_seeds_is_compared(tmp_path, capsys):
    """`prefopt train -m` and then `prefopt compare` on its folder, as a user would."""
    sweep = tmp_path / "sweep"
    assert main(["train", "-m", "algo=dpo,ipo", "seed=0,1", "model=bandit", "data=bandit", "hardware=cpu",
                 "hardware.threads=1", "train.steps=2", f"hydra.sweep.dir={sweep}"]) == 0
    jobs = json.loads((sweep / "sweep.json").read_text())
    assert len(jobs) == 4 and {j["state"] for j in jobs} == {"finished"}
    assert len(list(sweep.glob("*/report.html"))) == 4
    capsys.readouterr()
    assert main(["compare", str(sweep)]) == 0
    table = capsys.readouterr().out
    assert "dpo" in table and "ipo" in table and (sweep / "compare.html").is_file()
    assert main(["compare", str(tmp_path / "nowhere")]) == 2


def test_kl_is_to_the_initial_policy_also_when_the_reference_is_the_base(pairs, tmp_path):
    folder = toy.save_model(tmp_path / "model", "llama", "chatml")
    common = ["model=smollm2-135m-lora", f"model.path={folder}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0.25",
              "sampler.max_new_tokens=8"]
    assert train(tmp_path / "first", *common, "optim.lr=0.01") == 0
    again = [*common, f"model.lora.adapter={tmp_path / 'first' / 'model'}"]
    starts = {}
    for which in ("initial", "base"):
        assert train(tmp_path / which, *again, f"reference.policy={which}") == 0
        starts[which] = next(r for r in read_jsonl(tmp_path / which / "metrics.jsonl") if r["split"] == "eval")
    assert starts["initial"]["reward/margin"] == 0 != starts["base"]["reward/margin"]
    assert starts["initial"]["kl"] == starts["base"]["kl"] == 0
