"""The parts of the tiny diffusion models that need no training, and how all of them are made: with a few steps, which teach nothing."""

from __future__ import annotations

import json
import math
import random
import shutil

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


@pytest.fixture(scope="module")
def short_recipe(tmp_path_factory):
    """Models that have learnt nothing, in a cache of their own: the recipes with few pictures and steps."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(cache))
        patch.setitem(tiny_parts.PICTURES, "count", 32)
        for settings in (tiny_parts.TEXT_TRAINING, tiny_parts.VAE_TRAINING, *tiny_diffusion.TRAINING.values()):
            short = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "many_from": 1}
            for key in settings.keys() & short.keys():
                patch.setitem(settings, key, short[key])
        yield cache


@pytest.mark.parametrize(("kind", "network", "prediction"), [
    ("epsilon", "UNet2DConditionModel", "epsilon"), ("v", "UNet2DConditionModel", "v_prediction"), ("flow", "SD3Transformer2DModel", None),
])
def test_a_model_is_made_once_and_plain_diffusers_draws_with_it(kind, network, prediction, short_recipe, monkeypatch, capfd):
    """Made as a user's first run makes it, but for the number of pictures and steps."""
    from diffusers import DiffusionPipeline

    threads = torch.get_num_threads()
    torch.manual_seed(11)
    random.seed(11)
    before, python_before = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        path = tiny_diffusion.ensure_tiny_diffusion(kind)
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python_before
    assert torch.get_num_threads() == threads and torch.get_default_dtype() == torch.float32
    out, err = capfd.readouterr()
    assert not out and f"pre-training denoiser (3 steps, some minutes on two cores) once into {path}" in err
    assert path.parent == short_recipe and path == tiny_diffusion.tiny_diffusion_path(kind)
    assert not [f for f in path.rglob("*") if f.suffix in (".bin", ".pt", ".pkl")] and not list(short_recipe.glob("*.part"))

    monkeypatch.setattr(tiny_diffusion, "made", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(tiny_diffusion, "ensure_parts", lambda *_: pytest.fail("its parts were asked for"))
    assert tiny_diffusion.ensure_tiny_diffusion(kind) == path and capfd.readouterr() == ("", "")

    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    made = pipe.transformer if kind == "flow" else pipe.unet
    scheduler = "FlowMatchEulerDiscreteScheduler" if kind == "flow" else "DDIMScheduler"
    assert (type(made).__name__, type(pipe.scheduler).__name__) == (network, scheduler)
    assert pipe.scheduler.config.get("prediction_type") == prediction
    record = json.loads((path / "tiny_diffusion.json").read_text())
    assert record["parameters"] == made.num_parameters() and record["final_loss"] > 0
    assert all(weight.isfinite().all() for part in (made, pipe.vae, pipe.text_encoder) for weight in part.parameters())
    more = {"max_sequence_length": 1} if kind == "flow" else {}
    (picture,) = pipe("a red circle", num_inference_steps=2, guidance_scale=2.0, output_type="np", **more).images
    assert picture.shape == (world.SIZE, world.SIZE, 3)


def test_the_models_share_their_parts(short_recipe, monkeypatch):
    """They are made with the first model. A recipe with other parts is another model, in another folder."""
    paths = [tiny_diffusion.ensure_tiny_diffusion(kind, progress=False) for kind in tiny_diffusion.KINDS]
    (parts,) = (path for path in short_recipe.glob("tiny-pictures-parts-*") if path.is_dir())
    assert sorted(path for path in short_recipe.iterdir() if path.is_dir()) == sorted([parts, *paths])
    assert tiny_parts.ensure_parts(progress=False) == parts
    for path in paths:
        assert (path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == (
            parts / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setitem(tiny_parts.VAE_TRAINING, "steps", 4)
    assert not {tiny_diffusion.tiny_diffusion_path(kind) for kind in tiny_diffusion.KINDS} & set(paths)


def test_making_a_model_is_repeatable(short_recipe):
    """Whatever the caller's seed; in another cache, or after a user has removed it."""
    path = tiny_diffusion.ensure_tiny_diffusion("v", progress=False)
    first = (path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    path.rename(short_recipe / "elsewhere")
    try:
        torch.manual_seed(12)
        tiny_diffusion.ensure_tiny_diffusion("v", progress=False)
        assert (path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first
    finally:
        shutil.rmtree(short_recipe / "elsewhere")
