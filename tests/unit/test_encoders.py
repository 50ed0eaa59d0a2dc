"""VAEs and text encoders of diffusers' pipelines: each test compares with what the pipeline itself computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from prefopt.policies.encoders import NotFinite, open_encoders
from tests.tiny_pipelines import FAMILIES, PROMPT, alike, folders, pipeline, run, unpack


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return folders(tmp_path_factory)


def test_trap_4_12_pictures_are_decoded_in_fp32_under_autocast(folder, monkeypatch):
    encoders, latents = open_encoders(folder("sdxl")), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decode, seen = encoders.vae.decode, []
    monkeypatch.setattr(encoders.vae, "decode", lambda *args, **kwargs: [seen.append(decode(*args, **kwargs)[0]), seen[-1]][1:])
    encoders.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoders.decode(latents)
    assert torch.equal(*seen)  # before they are rounded to 8 bits



@pytest.mark.parametrize("family", FAMILIES)
def test_trap_4_12_pictures_are_encoded_and_decoded_as_the_pipeline_does(folder, family):
    pipe, encoders = pipeline(folder(family)), open_encoders(folder(family), dtype=torch.bfloat16)
    latents, images = unpack(family, run(pipe, family)), run(pipe, family, output_type="pil")
    alike(encoders.decode(latents), images)
    pixels = torch.rand(2, 3, 16, 32) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, std = encoders.latents(pixels)
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape == (2, 4, 8, 16)
    with torch.no_grad():
        made = pipe.vae.encode(pixels)
        raw = made.latent if family == "sana" else made.latent_dist.mode()
        back = pipe.vae.decode(raw, return_dict=False)[0]
    alike(encoders.decode(mean), pipe.image_processor.postprocess(back))
    config = pipe.vae.config
    shift = config.get("shift_factor") or 0.0
    torch.testing.assert_close(mean, (raw - shift) * config.scaling_factor, atol=1e-5, rtol=1e-5)
    if family == "sana":
        assert std.abs().max() == 0
    else:
        torch.testing.assert_close(std, made.latent_dist.std * config.scaling_factor, atol=1e-5, rtol=1e-5)


def test_latents_with_a_mean_and_deviation_for_each_channel(folder, tmp_path):
    model = shutil.copytree(folder("sdxl"), tmp_path / "model")
    about = json.loads((model / "vae" / "config.json").read_text())
    about |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    (model / "vae" / "config.json").write_text(json.dumps(about))
    pipe, encoders = pipeline(model), open_encoders(model)
    images = run(pipe, "sdxl", output_type="pil")
    alike(encoders.decode(run(pipe, "sdxl")), images)
    mean, _ = encoders.latents(torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        raw = pipe.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean
    wanted = (raw - torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1)) / torch.arange(1, 5).view(1, 4, 1, 1) * 0.13025
    torch.testing.assert_close(mean, wanted, atol=1e-6, rtol=1e-5)


def test_trap_4_12_a_picture_that_is_not_finite_is_named(folder):
    encoders = open_encoders(folder("sdxl"))
    pixels = torch.zeros(3, 3, 16, 16)
    pixels[1, 0, 4, 4] = torch.nan
    with pytest.raises(NotFinite, match="picture 1 of its batch") as caught:
        encoders.latents(pixels)
    assert caught.value.place == 1
    with pytest.raises(NotFinite):
        encoders.decode(torch.full((1, 4, 8, 8), torch.inf))


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_do_not_depend_on_what_they_are_encoded_with(folder, family):
    encoders = open_encoders(folder(family))
    texts = [PROMPT, "", "a blue square", PROMPT, " "]
    together = encoders.captions(texts)
    assert len(together) == 5 and together[0].keys() == together[1].keys()
    for text, made in zip(texts, together, strict=True):
        for name, value in encoders.captions([text])[0].items():
            torch.testing.assert_close(value, made[name], atol=1e-5, rtol=1e-4)
    assert (together[0]["prompt_embeds"] - together[2]["prompt_embeds"]).abs().max() > 1e-3
    assert "mask" in together[0] if family.startswith(("pixart", "sana")) else "mask" not in together[0]


def test_trap_4_10_no_caption_is_what_the_pipeline_has_for_it(folder, tmp_path):
    """Zeros of SDXL models that say so, and the encoding of "" of those that do not."""
    zeros = open_encoders(folder("sdxl")).captions([""])[0]
    assert not zeros["prompt_embeds"].any() and not zeros["pooled"].any()
    model = shutil.copytree(folder("sdxl"), tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    made, pipe = open_encoders(model).captions([""])[0], pipeline(model)
    _, negative, _, pooled = pipe.encode_prompt(PROMPT, device="cpu")
    torch.testing.assert_close(made["prompt_embeds"], negative[0])
    torch.testing.assert_close(made["pooled"], pooled[0])
    assert open_encoders(model).fingerprint["text"] != open_encoders(folder("sdxl")).fingerprint["text"]


@pytest.mark.parametrize(("family", "words", "limit"), [
    ("sd15", 14, 16), ("sdxl", 14, 16), ("sd3-no-t5", 14, 16), ("sd3", 255, 256), ("pixart", 299, 300), ("pixart-alpha", 119, 120),
    ("flux", 511, 512), ("sana", 298, 300),
])
def test_captions_over_the_limit_are_counted_without_weights(folder, family, words, limit, capsys, monkeypatch):
    warned = []  # its stream is the one of when it was imported
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda said, *_: warned.append(said))
    encoders = open_encoders(folder(family))
    short, long = "red " * words, "red " * (words + 1)
    assert encoders.limit == limit
    assert encoders.too_long([short, long]) == [1]
    capsys.readouterr()  # the folder may have been saved just now
    assert encoders.count_long([short, PROMPT, ""]) == {"distinct": 2, "cut": 0, "limit": limit} and not capsys.readouterr().err
    assert encoders.count_long([long, PROMPT, "", long]) == {"distinct": 2, "cut": 1, "limit": limit}
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"captions: 1 of 2 captions are longer than {limit} tokens and are cut there, such as 'red red")
    assert not {"vae", "texts"} & set(vars(encoders))
    encoders.captions([long])
    assert not capsys.readouterr().err and not warned, "transformers would warn of indexing errors"


def test_fingerprints_follow_the_contents(folder, tmp_path):
    here = open_encoders(folder("sd15")).fingerprint
    model = shutil.copytree(folder("sd15"), tmp_path / "model")
    assert open_encoders(model).fingerprint == here and set(here) == {"vae", "text"}
    weights = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    next(iter(weights.values())).add_(1)
    from safetensors.torch import save_file

    save_file(weights, model / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    there = open_encoders(model).fingerprint
    assert there["vae"] != here["vae"] and there["text"] == here["text"]


def test_encoders_are_let_go_of(folder):
    encoders = open_encoders(folder("sd15"))
    before = encoders.captions([PROMPT])[0]["prompt_embeds"]
    assert "texts" in encoders.__dict__ and "vae" not in encoders.__dict__
    encoders.free()
    assert "texts" not in encoders.__dict__
    torch.testing.assert_close(encoders.captions([PROMPT])[0]["prompt_embeds"], before)
