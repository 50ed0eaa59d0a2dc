"""Every model goes with every dataset, every adapter with every model, and the names help when they are mistyped."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from prefopt.config import catalogue, doctor, listing
from prefopt.config.compose import check_together, rephrase, typed
from prefopt.errors import UserError
from tests.toy import micro, oracle, pair, policy, save_model
from tests.unit.test_compose import composed, refusal

MODELS = [m for m in catalogue.groups()["model"] if m != "bandit"]
DATA = [d for d in catalogue.groups()["data"] if d != "bandit"]


@cache
def choice(group: str, name: str):
    """The composed and typed config of one choice, with what it cannot be without: pictures want a model of pictures."""
    keys = catalogue.resolved_keys(group, name)
    extra = ["data.path=x"] if group == "data" and keys["path"].value == "???" else []
    if group == "model" and keys["kind"].value == "diffusion":
        extra.append("data=tiny-pictures")
    elif group == "data" and keys["pictures"].value == "true":
        extra.append("model=tiny-diffusion")
    return typed(composed(f"{group}={name}", *extra), "train", "dpo")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_with_every_dataset(model):
    info = catalogue.algo_info("dpo")
    for data in DATA:
        both = replace(choice("model", model), data=choice("data", data).data)
        if both.data.pictures != (both.model.kind == "diffusion"):
            with pytest.raises(UserError, match="holds (pictures|texts), and model="):
                check_together(both, info)
            continue
        check_together(both, info)
        assert (both.model.name, both.data.name) == (model, data)


@pytest.mark.parametrize("model", ["qwen3-0.6b", "gemma2-9b-it", "llama3-8b"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_an_adapter_sets_what_it_must(model, adapter):
    pytest.importorskip("bitsandbytes")
    plain = choice("model", model)
    cfg = typed(composed(f"model={model}", f"adapter={adapter}", "data=nectar", "algo=dpo"), "train", "dpo")
    assert cfg.model.lora.enabled and cfg.optim.lr == cfg.model.learning_rate == plain.model.lora.learning_rate
    assert cfg.optim.lr > plain.optim.lr == plain.model.learning_rate
    assert cfg.model.quantize == ("4bit" if adapter == "qlora" else None)
    assert cfg.model.path == plain.model.path and cfg.model.attention == plain.model.attention


@pytest.mark.parametrize("model", MODELS)
def test_adapters_take_a_larger_step(model):
    cfg = choice("model", model).model
    if not cfg.lora.enabled:
        assert 5 <= cfg.lora.learning_rate / cfg.learning_rate <= 20


def test_hub_ids_are_names_and_base_models_bring_a_template():
    for model in MODELS:
        cfg = choice("model", model).model
        if cfg.path:
            assert cfg.path.count("/") == 1 and cfg.revision is None
            tuned = any(word in cfg.path for word in ("nstruct", "-it")) or (model.startswith("qwen3") and not model.endswith("-base"))
            assert cfg.kind == "diffusion" or (cfg.chat_template is None) == tuned, model


@pytest.mark.parametrize(("word", "sentence"), [
    ("model=qwen3-8b-lora", "there is no model=qwen3-8b-lora; write model=qwen3-8b adapter=lora"),
    ("model=qwen3-0.6b-qlora", "there is no model=qwen3-0.6b-qlora; write model=qwen3-0.6b adapter=qlora"),
    ("model=qwen3-8", "there is no model=qwen3-8; did you mean 'model=qwen3-8b'?"),
    ("model=hub", "there is no model=hub"),
    ("adapter=qlorra", "there is no adapter=qlorra; did you mean 'adapter=qlora'?"),
    ("data=helpstear2", "there is no data=helpstear2; did you mean 'data=helpsteer2'?"),
])
def test_typos(word, sentence):
    with pytest.raises(Exception) as caught:
        composed(word)
    said = rephrase(caught.value, [word], "train")
    assert said.startswith(sentence) and "_hub" not in said


def test_show_and_list_know_adapters_and_hide_what_is_only_inherited():
    listed = listing.list_text("model")
    assert "qwen2.5-0.5b-instruct" in listed and "_hub" not in listed + listing.list_text("data")
    assert "model.quantize: 4bit" in listing.show_text("qlora")
    with pytest.raises(UserError, match="model=gemma2-2b-it adapter=qlora"):
        listing.show_text("gemma2-2b-it-qlora")
    assert "model.attention: auto" in listing.show_text("gemma2-9b-it")


# ---- four bits ----


@pytest.mark.parametrize(("overrides", "reason"), [
    (["model.quantize=4bit"], "freezes the weights, so there is nothing left to train; add adapter=qlora"),
    (["model=bandit", "data=bandit", "model.quantize=4bit"], "is a table and has no weights to quantise"),
    (["adapter=qlora", "model.gguf_file=x.gguf"], "a GGUF file has a quantisation of its own"),
    (["adapter=qlora", "model.quantize=8bit"], "model.quantize=8bit is none of 4bit"),
])
def test_four_bits_that_cannot_be_trained(overrides, reason):
    assert reason in refusal(*overrides)


def test_four_bits_without_the_package_is_said_at_composition_and_at_loading(monkeypatch, tmp_path):
    folder, find = save_model(tmp_path / "m"), doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more))
    assert 'needs the package bitsandbytes; pip install "prefopt[qlora]"' in refusal("adapter=qlora")
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        policy(folder, lora={"enabled": True}, quantize="4bit")


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_four_bits_are_nf4_twice_quantised_and_the_log_probs_are_the_models_own(family, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = save_model(tmp_path / "m", family, hidden_size=64, intermediate_size=128)
    attention = "eager" if family == "gemma2" else "sdpa"
    p = policy(folder, lora={"enabled": True, "r": 4}, quantize="4bit", attention=attention).eval()
    layers = [m for m in p.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7  # all matrices of two layers; embedding and head stay as they are
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16 and not layer.weight.requires_grad
    example = pair()
    tokens = p.tokenise(example)
    ours = p(micro(p, example))
    wanted = [v for b in tokens.branches for v in oracle(p, tokens.prompt + b.ids, [False] * len(tokens.prompt) + b.mask)]
    torch.testing.assert_close(ours.double(), torch.tensor(wanted, dtype=torch.double), atol=0.05, rtol=0.02)  # bf16 inside
    whole = policy(folder, attention=attention).eval()
    difference = (whole(micro(whole, example)) - ours).abs().mean()
    assert 0.001 < difference < 0.5 * ours.abs().mean()  # four bits are not sixteen, but the same model
    p(micro(p, example)).mean().backward()
    assert all(parameter.grad is not None for parameter in p.trainable().values()) and all("lora" in name for name in p.trainable())


def test_a_saved_adapter_of_a_quantised_model_gives_the_same_log_probs(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_model(tmp_path / "m", hidden_size=64, intermediate_size=128)
    p = policy(folder, lora={"enabled": True, "r": 4}, quantize="4bit").eval()
    with torch.no_grad():
        for parameter in p.trainable().values():
            parameter.add_(0.05)
    ours = p(micro(p, pair()))
    p.save(tmp_path / "adapter")
    again = policy(folder, lora={"enabled": True, "adapter": str(tmp_path / "adapter")}, quantize="4bit").eval()
    assert torch.equal(again(micro(again, pair())), ours)
