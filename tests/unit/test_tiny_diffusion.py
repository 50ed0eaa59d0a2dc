"""The parts of the tiny diffusion models that need no training."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.data import tiny_pictures as world
from prefopt.policies import muon, tiny_diffusion, tiny_parts


def test_one_token_for_many_equal_ones_is_the_same_function():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    width = tiny_diffusion.MMDIT["attention_head_dim"] * tiny_diffusion.MMDIT["num_attention_heads"]
    shape = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    network = SD3Transformer2DModel(**shape, caption_projection_dim=width, **tiny_diffusion.MMDIT)
    x, words, pooled, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 16), torch.tensor([100.0, 900.0])

    def out(zeros: int):
        return network(x, torch.cat([words, torch.zeros(2, zeros, 16)], 1), pooled, t, return_dict=False)[0]

    with torch.no_grad():
        many, few = out(tiny_diffusion._ZEROS), out(1)
        network.set_attn_processor(tiny_diffusion._ManyZeros())
        torch.testing.assert_close(out(1), many, rtol=1e-4, atol=1e-5)
    assert (many - few).abs().max() > 0.01


def test_the_mmdit_tells_its_places_apart_by_waves_that_fit_the_picture(tmp_path):
    from diffusers import SD3Transformer2DModel

    width = tiny_diffusion.MMDIT["attention_head_dim"] * tiny_diffusion.MMDIT["num_attention_heads"]
    shape = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    network = SD3Transformer2DModel(**shape, caption_projection_dim=width, **tiny_diffusion.MMDIT)
    usual = network.pos_embed.pos_embed[0].clone()
    tiny_diffusion._place(network)
    table, waves = network.pos_embed.pos_embed[0], width // 4
    row, column, longest = 3, 5, 2 * math.pi / tiny_diffusion.PERIODS[1]
    told = table.view(8, 8, 4, waves)[row, column]
    expected = [f(x * longest) for x in (row, column) for f in (math.sin, math.cos)]
    torch.testing.assert_close(told[:, -1], torch.tensor(expected))
    torch.testing.assert_close(told[:, 0], torch.tensor([0.0, -1.0, 0.0, -1.0]), atol=1e-5, rtol=0)  # two places: half a wave each
    torch.testing.assert_close(table.norm(dim=1), usual.norm(dim=1))  # neither louder nor quieter beside the picture
    assert torch.nn.functional.pdist(table).min() > 2 * torch.nn.functional.pdist(usual).min()
    network.save_pretrained(tmp_path)
    assert torch.equal(SD3Transformer2DModel.from_pretrained(tmp_path).pos_embed.pos_embed[0], table)


def test_every_word_is_a_token_and_any_text_can_be_encoded(tmp_path):
    from transformers import CLIPTokenizer

    tiny_parts.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for text in world.captions("train") + world.captions("eval"):
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text
    assert tokenizer.unk_token_id not in tokenizer("zwölf 🦊 zebras!").input_ids[1:-1]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="epsilon, v, flow"):
        tiny_diffusion.ensure_tiny_diffusion("x0")


def test_the_t5_of_the_flow_pipeline_is_silent_and_can_be_cut_to_one_token():
    tokenizer, encoder = tiny_diffusion._t5_tokenizer(), tiny_diffusion._silent_t5(16)
    for length in (1, 9):
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(world.captions("eval")[:3], **options).input_ids
        assert tokens.shape == (3, length) and tokenizer.unk_token_id not in tokens
        assert torch.equal(encoder(tokens)[0], torch.zeros(3, length, 16))


def test_muon_steps_as_torchs_does_but_for_rounding():
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((6, 16), (16, 6), (6, 16))]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    mine = muon.Muon(ours, lr=0.05)
    torchs = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - w).norm()  # torch multiplies in bf16


def test_training_with_muon_leaves_no_weight_behind():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.Linear(4, 4), "out": torch.nn.Linear(4, 4)})
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    x = torch.randn(32, 4)

    def loss(_: int):
        return (model["out"](model["transformer_blocks"](x)) - x).square().mean()

    settings = {"steps": 60, "warmup_steps": 5, "lr": 0.1, "muon_lr": 0.1}
    kinds = tiny_parts._optimizers(model, settings)
    assert [sum(len(group["params"]) for group in kind.param_groups) for kind in kinds] == [3, 1] and isinstance(kinds[1], muon.Muon)
    first = loss(0).item()
    assert tiny_parts.train("test", model, settings, loss, progress=False) < 0.2 * first
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
