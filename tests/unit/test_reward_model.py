"""Reward models as policies: which token is read, what is trained, and that a saved one gives the same rewards in plain transformers."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt.config.schema import OptimConfig, TrustConfig
from prefopt.data.batch import build, split_step
from prefopt.errors import UserError
from prefopt.objectives.reward_model import BradleyTerry
from prefopt.policies.reward_model import RewardModel
from prefopt.training.engine import Engine
from prefopt.training.source import OfflineSource
from tests.toy import data_config, example, micro, model_config, pair, rows, save_model
from tests.toy_runs import fresh_accelerator, gradients

PAIRS = (
    pair(), pair("Two and two make?", "four", "Paris. The capital of Peru is Lima."), pair("Is that so?", "I am well, thank you.", "a fox"),
)  # fmt: skip


def reward_model(folder, lora=None, precision="fp32", seed=0, **data):
    return RewardModel(model_config(folder, lora), data_config(**data), TrustConfig(), torch.device("cpu"), precision, seed)


def alone(model, ids: list[int]) -> float:
    """The reward of one unpadded sequence: the head on the last hidden state."""
    inner = model.model.get_base_model() if model.cfg.lora.enabled else model.model
    with torch.no_grad(), model.plainly():
        hidden = inner.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        return float(inner.score(hidden))


def sequences(model, *examples) -> list[list[int]]:
    return [row.tokens.prompt + b.ids for row in rows(model, *examples) for b in row.tokens.branches]


@pytest.mark.parametrize(("family", "pad"), [
    ("llama", "<pad>"), ("llama", "<eos>"), ("llama", None), ("qwen2", "<eos>"), ("gpt2", "<eos>"),
])  # fmt: skip
def test_reads_the_last_token_whatever_pads(tmp_path, family, pad):
    """The reply ends with <eos>; where that is the padding token too, a search for padding stops one token early."""
    model = reward_model(save_model(tmp_path, family, template=None, special={"pad_token": pad}))
    batch = micro(model, *PAIRS)
    ends = [ids[-1] for ids in sequences(model, *PAIRS)]
    assert set(ends) == {model.tokenizer.eos_token_id} and not batch.attention.all(), "the batch must be padded"
    got = model(batch)
    assert got.shape == (6,) and got.dtype == torch.float32
    assert got.tolist() == pytest.approx([alone(model, ids) for ids in sequences(model, *PAIRS)], abs=1e-6)
    before_last = [alone(model, ids[:-1]) for ids in sequences(model, *PAIRS)]
    assert min(abs(a - b) for a, b in zip(got.tolist(), before_last, strict=True)) > 1e-5


@pytest.mark.parametrize(("template", "pad"), [("chatml", "<pad>"), ("chatml", "<|im_end|>"), (None, "<eos>")])
def test_a_saved_model_gives_the_same_rewards_in_plain_transformers(tmp_path, template, pad):
    model = reward_model(save_model(tmp_path / "base", template=template, special={"pad_token": pad}))
    wanted = model(micro(model, *PAIRS)).tolist()
    model.save(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    assert plain.config.num_labels == 1
    with torch.no_grad():
        one_by_one = [float(plain(input_ids=torch.tensor([ids])).logits) for ids in sequences(model, *PAIRS)]
    assert one_by_one == pytest.approx(wanted, abs=1e-6)
    batch = micro(model, *PAIRS)
    if pad == "<pad>":
        with torch.no_grad():
            together = plain(input_ids=batch.input_ids, attention_mask=batch.attention.long()).logits[:, 0]
        assert together.tolist() == pytest.approx(wanted, abs=1e-6)
    else:  # it cannot tell padding from the end of a reply: refused, rather than read wrongly
        with pytest.raises(ValueError, match="padding token"):
            plain(input_ids=batch.input_ids, attention_mask=batch.attention.long())
    again = reward_model(tmp_path / "rm", seed=5)
    assert again(micro(again, *PAIRS)).tolist() == pytest.approx(wanted, abs=1e-6), "a saved head must not be drawn anew"
    words = AutoTokenizer.from_pretrained(tmp_path / "rm")
    assert words.chat_template == model.tokeniser.template


def test_a_saved_adapter_loads_in_plain_peft_with_its_head(tmp_path):
    from peft import PeftModel

    base = save_model(tmp_path / "base")
    model = reward_model(base, {"enabled": True, "r": 4})
    step(model)
    wanted = model(micro(model, *PAIRS)).tolist()
    model.save(tmp_path / "rm")
    plain = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), tmp_path / "rm").eval()
    with torch.no_grad():
        got = [float(plain(input_ids=torch.tensor([ids])).logits) for ids in sequences(model, *PAIRS)]
    assert got == pytest.approx(wanted, abs=1e-5)


def test_a_fresh_head_is_small_seeded_and_leaves_the_random_state_alone(tmp_path):
    folder = save_model(tmp_path)
    state = torch.get_rng_state()
    heads = [reward_model(folder, seed=seed).model.score.weight.detach() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (1, 32) and 0.2 / 33 < float(heads[0].std()) < 3 / 33
    base = AutoModelForCausalLM.from_pretrained(folder).model
    assert torch.equal(base.embed_tokens.weight, reward_model(folder).model.model.embed_tokens.weight)
    assert not hasattr(reward_model(folder), "generate")


def step(model, lr: float = 0.05):
    made = rows(model, *PAIRS)
    with fresh_accelerator() as accelerator:
        engine = Engine(model, BradleyTerry(), None, OptimConfig(lr=lr), accelerator)
        return engine.step(OfflineSource(made, "pairs", 3, 10**6, model.pad, True, 0).step(0), lr)


@pytest.mark.parametrize("lora", [None, {"enabled": True, "r": 4}])
def test_training_moves_the_head_and_the_rest(tmp_path, lora):
    model = reward_model(save_model(tmp_path), lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = step(model)
    assert result.loss == pytest.approx(0.6931, abs=0.1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("score" in name for name in moved)
    if lora:
        assert all("lora" in name or "score" in name for name in moved) and any("lora" in name for name in moved)
        assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    else:
        assert any("embed" in name for name in moved) and any("q_proj" in name for name in moved)


@pytest.mark.parametrize("lora", [None, {"enabled": True, "r": 4}])
def test_bf16_keeps_the_head_in_fp32(tmp_path, lora):
    """Equal to the head's own product with the hidden states that bf16 made, which the same product in bf16 is not."""
    model = reward_model(save_model(tmp_path), lora, precision="bf16")
    model.layout = "rows"  # as below; other layouts round differently
    batch = micro(model, *PAIRS)
    inner = model.model.get_base_model() if lora else model.model
    with torch.no_grad(), model.autocast():
        hidden = inner.base_model(input_ids=batch.input_ids, attention_mask=batch.attention.long(), use_cache=False).last_hidden_state
        state = hidden[torch.arange(6), batch.attention.sum(1) - 1]
        low = inner.score(state)[:, 0].float()
    with torch.no_grad():
        got, want = model(batch), inner.score(state.float())[:, 0]
    assert got.dtype == torch.float32 and next(inner.score.parameters()).dtype == torch.float32
    assert torch.equal(got, want) and not torch.equal(got, low)


def test_neither_cuts_nor_ranks_nor_padding_change_a_step(tmp_path):
    model = reward_model(save_model(tmp_path))
    rng = random.Random(0)
    examples = [pair(f"How {'so ' * rng.randint(0, 9)}?", "well " * rng.randint(1, 9), "six " * rng.randint(1, 9) + "x") for _ in range(7)]
    made = rows(model, *examples)
    with fresh_accelerator() as accelerator:
        engine = Engine(model, BradleyTerry(centring=0.01), None, OptimConfig(max_grad_norm=1e9), accelerator)
        whole, loss = gradients(engine, OfflineSource(made, "pairs", 7, 10**6, model.pad, True, 0).step(0))
        cut = OfflineSource(made, "pairs", 7, 40, model.pad, True, 0).step(0)
        assert len(cut) > 2
        split, split_loss = gradients(engine, cut)
        ranks = split_step(made, range(7), "pairs", 40, 2)
        dealt = [build(made, part, "pairs", model.pad) for rank in ranks for part in rank]
        shared, shared_loss = gradients(engine, dealt)
    assert loss == pytest.approx(split_loss, rel=1e-5) == pytest.approx(shared_loss, rel=1e-5)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(shared[name], whole[name], rtol=1e-3, atol=1e-6)


def test_an_encoder_is_no_reward_model(tmp_path):
    from transformers import BertConfig, BertModel

    from tests.toy import tokenizer

    words = tokenizer("bytes", "chatml")
    shape = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(shape).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="decoder-only"):
        reward_model(tmp_path)


def test_rows_of_other_kinds_are_refused():
    from prefopt.data.fits import check_use

    with pytest.raises(UserError, match="pairs"):
        check_use(example(prompt="a", completion="b", label=True), data_config(), BradleyTerry.view, BradleyTerry.columns)
