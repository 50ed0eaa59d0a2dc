"""Starting from the policy of another run: full weights, adapters, adapters over them, and what is no policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from prefopt.config.schema import DataConfig, LoraConfig, ModelConfig, TrustConfig
from prefopt.errors import UserError
from prefopt.policies.causal_lm import CausalLM
from prefopt.policies.load import load_policy
from prefopt.policies.start import started
from prefopt.policies.tabular import Tabular
from tests.toy import data_config, micro, model_config, pair, policy, save_model

LORA = {"enabled": True, "r": 4}


def moved(model: CausalLM, by: float = 0.05) -> CausalLM:
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(by)
    return model.eval()


def saved(model, run: Path, **settings) -> Path:
    """A finished run of this policy, as far as another run reads it."""
    model.save(run / "model")
    (run / "config.yaml").write_text(yaml.safe_dump({"algo": {"name": "dpo"}, "model": {"start": None, **settings}}))
    return run


def load(cfg: ModelConfig):
    return load_policy(started(cfg), data_config(), TrustConfig(), torch.device("cpu"), "fp32", 0).eval()


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return model(micro(model, pair(), pair("How?", "well", "a fox")))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize("what", ["run", "model"])
def test_full_weights(what, base, tmp_path):
    run = saved(moved(policy(base)), tmp_path / "run")
    again = load(replace(model_config(base), start=str(run if what == "run" else run / "model")))
    assert torch.allclose(scores(again), scores(moved(policy(base))), atol=1e-6) and again.source["path"] == str(run / "model")
    assert not torch.allclose(scores(again), scores(policy(base).eval()), atol=1e-3)


def test_an_adapter(base, tmp_path):
    run = saved(moved(policy(base, LORA)), tmp_path / "run")
    again = load(replace(model_config(base, {"enabled": True, "r": 8}), start=str(run)))
    assert torch.allclose(scores(again), scores(moved(policy(base, LORA))), atol=1e-6)
    with again.without_adapter():
        assert torch.allclose(scores(again), scores(policy(base).eval()), atol=1e-6)
    with pytest.raises(UserError, match="holds a LoRA adapter, and model=toy has none to put it into; add adapter=lora"):
        started(replace(model_config(base), start=str(run)))


def test_a_fresh_adapter_over_the_weights_of_a_run(base, tmp_path):
    run = saved(moved(policy(base)), tmp_path / "run")
    again = load(replace(model_config(base, LORA), start=str(run)))
    assert torch.allclose(scores(again), scores(moved(policy(base))), atol=1e-6) and all("lora" in name for name in again.trainable())


def test_an_adapter_lies_over_the_weights_that_its_own_run_has_started_from(base, tmp_path):
    """The stage of a run with an adapter was one of full weights."""
    run = tmp_path / "run"
    saved(moved(policy(base)), run / "stages" / "sft")
    over = moved(policy(run / "stages" / "sft" / "model", LORA))
    saved(over, run, start="${stage:sft}")
    again = load(replace(model_config(base, LORA), start=str(run)))
    assert again.source["path"] == str(run / "stages" / "sft" / "model") and torch.allclose(scores(again), scores(over), atol=1e-6)


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    """Its matrices fit, so that nothing else would notice."""
    run = saved(moved(policy(base, LORA)), tmp_path / "run", name="toy", path=str(base))
    assert load(replace(model_config(base, LORA), start=str(run))).cfg.path == str(base)
    other = save_model(tmp_path / "other")
    with pytest.raises(UserError, match="holds an adapter for .*base.*, and model=toy is .*other; over other weights it means nothing"):
        started(replace(model_config(other, LORA), start=str(run)))


def test_a_table(tmp_path):
    table = Tabular(torch.device("cpu"))
    with torch.no_grad():
        table.logits.mul_(2)
    cfg = ModelConfig(name="bandit", kind="tabular", start=str(saved(table, tmp_path / "run")))
    world = DataConfig(name="bandit", source="bandit")
    again = load_policy(started(cfg), world, TrustConfig(), torch.device("cpu"), "fp32", 0)
    assert torch.equal(again.logits, table.logits) and len(again.source["fingerprint"]) == 64
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is no table of the bandit world"):
        load_policy(started(cfg), world, TrustConfig(), torch.device("cpu"), "fp32", 0)


def test_nothing_is_changed_without_a_start(base):
    cfg = model_config(base, LORA)
    assert started(cfg) is cfg


@pytest.mark.parametrize(("what", "said"), [
    ("nothing", "there is no such folder"),
    ("unfinished", "holds a run that is not finished"),
    ("reward", "holds a reward model, which writes nothing"),
    ("empty", "holds neither a run nor a saved model"),
    ("table", "holds a table of the bandit world, and model=toy is a language model"),
    ("text", "holds a language model, and model=bandit is a table"),
])
def test_what_is_no_start_is_said(what, said, base, tmp_path):
    folder, cfg = tmp_path / what, model_config(base)
    if what != "nothing":
        folder.mkdir()
    if what == "unfinished":
        (folder / "config.yaml").write_text("algo: {name: dpo}\n")
    elif what == "reward":
        (folder / "prefopt_reward.json").write_text("{}")
    elif what == "table":
        saved(Tabular(torch.device("cpu")), folder)
    elif what == "text":
        folder, cfg = base, ModelConfig(name="bandit", kind="tabular", lora=LoraConfig())
    with pytest.raises(UserError, match=said) as caught:
        started(replace(cfg, start=str(folder)), "teacher.path")
    assert str(caught.value).startswith(f"teacher.path={folder} ") or str(caught.value).startswith(f"teacher.path={folder}: ")
