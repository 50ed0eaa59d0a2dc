"""A head with LoRA on it in the chunked op: the log-probs and gradients of the model's own forward pass, adapter on, off and several."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from prefopt.data.batch import build
from prefopt.errors import UserError
from prefopt.policies.head import head_of
from prefopt.policies.reference import AdapterCopy, AdapterOff
from tests.toy import pair, policy, rows, save_model

LORA = {"enabled": True, "r": 2, "targets": "lm_head, q_proj"}


@pytest.fixture
def made(tmp_path):
    """A policy with an adapter on its head that is not the identity, and a micro-batch of two trees."""
    p = policy(save_model(tmp_path, "llama"), lora=LORA)
    shake(p)
    return p, build(rows(p, pair(), pair(prompt="Is that so?")), [0, 1], "pairs", p.pad)


def shake(p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in p.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def plainly(p, micro):
    with p.plainly():
        return p._from_logits(micro, micro.input_ids[:, 1:][micro.trained[:, 1:]])


def test_values_and_gradients_are_the_model_s_own(made):
    p, micro = made
    assert p.fuse and p.share
    weights = list(p.trainable().values())
    assert any("lm_head" in name for name in p.trainable())
    upstream = torch.linspace(-1, 2, int(micro.trained[:, 1:].sum()))
    fast, plain = p(micro), plainly(p, micro)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(fast @ upstream, weights), torch.autograd.grad(plain @ upstream, weights), strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_switched_off_it_is_the_base_model(made):
    p, micro = made
    with torch.no_grad():
        on, off = p(micro), AdapterOff(p)(micro)
        base = p.model.unload()  # takes the adapter away
        p.cfg.lora.enabled, p.model = False, base
        torch.testing.assert_close(off, plainly(p, micro), rtol=1e-5, atol=1e-5)
    assert (on - off).abs().max() > 0.1


def test_a_second_adapter_is_used_alone_and_together(made):
    p, micro = made
    other = AdapterCopy(p, "other")
    shake(p, seed=1)
    with torch.no_grad():
        for names in (["default"], [other.name], ["default", other.name]):
            p.model.base_model.set_adapter(names)
            assert (head_of(p.inner).down.shape[0], len(names)) in ((2, 1), (4, 2))
            torch.testing.assert_close(p(micro), plainly(p, micro), rtol=1e-5, atol=1e-5)


def test_a_merged_adapter_is_not_counted_twice(made):
    p, micro = made
    with torch.no_grad():
        before = p(micro)
        p.model.merge_adapter()
        torch.testing.assert_close(p(micro), before, rtol=1e-4, atol=1e-4)


def test_a_bias_of_the_adapter_counts(tmp_path):
    from torch import nn

    p = policy(save_model(tmp_path, "llama"), lora=LORA)
    base = p.inner.lm_head.base_layer
    base.bias = nn.Parameter(torch.randn(base.out_features))
    p.model.add_adapter("biased", LoraConfig(r=2, lora_alpha=6, target_modules=["lm_head"], lora_bias=True))
    p.model.base_model.set_adapter("biased")
    nn.init.normal_(p.inner.lm_head.lora_B["biased"].bias)
    micro = build(rows(p, pair()), [0], "pairs", p.pad)
    with torch.no_grad():
        torch.testing.assert_close(p(micro), plainly(p, micro), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "reason"), [({"lora_dropout": 0.5}, "has dropout"), ({"use_dora": True}, "is a Dora")],
                         ids=["dropout", "dora"])
def test_adapters_that_are_no_matrix_product_are_refused(made, config, reason):
    p, _ = made
    p.model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], **config))
    p.model.base_model.set_adapter("other")
    with pytest.raises(TypeError, match=reason):
        head_of(p.inner)


def test_dropout_on_the_head_falls_back_aloud(tmp_path, capsys):
    p = policy(save_model(tmp_path, "llama"), lora=LORA | {"dropout": 0.1})
    assert not p.fuse
    assert "model.fused_head is off for this model (TypeError: the adapter on its head has dropout)" in capsys.readouterr().err


@pytest.mark.parametrize(("targets", "part"), [("lm_head, q_proj", "head"), ("embed_tokens", "embedding")], ids=["head", "embedding"])
def test_an_adapter_on_a_tied_head_is_refused(tmp_path, targets, part):
    """Trap: merging it changes the embedding too, or the head of whoever loads it."""
    folder = save_model(tmp_path, "llama", tie_word_embeddings=True)
    with pytest.raises(UserError, match=f"model.lora.targets puts an adapter on the {part} of .* head is its embedding.*all-linear"):
        policy(folder, lora=LORA | {"targets": targets})
    assert policy(folder, lora=LORA | {"targets": "all-linear"}).fuse
