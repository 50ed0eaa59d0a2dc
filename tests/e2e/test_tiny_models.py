"""The tiny diffusion models: pipelines as plain diffusers loads them, whose pictures show what a caption asks for.

Making one takes minutes, more than all other tests of pictures, so these are for models that this machine has: `prefopt train
model=tiny-diffusion` makes one, and so do model=tiny-diffusion-v and model=tiny-flow.
"""

from __future__ import annotations

import json
import random
import statistics

import pytest
import torch

from prefopt.data import tiny_pictures as world
from prefopt.policies import tiny_diffusion, tiny_parts

# What captions and pictures of one batch are told apart by: that of another caption matches by chance.
COUNT = 48


@pytest.fixture(scope="module", params=tiny_diffusion.KINDS)
def pipeline(request):
    """The model of the user's cache."""
    from diffusers import DiffusionPipeline

    if not (path := tiny_diffusion.tiny_diffusion_path(request.param)).is_dir():
        pytest.skip(f"the {request.param} model has not been made on this machine")
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


def sampled(pipe, texts: list[str], **options):
    if hasattr(pipe, "transformer"):
        options.setdefault("max_sequence_length", 1)
    generator = torch.Generator().manual_seed(0)
    return pipe(texts, num_inference_steps=16, guidance_scale=2.5, generator=generator, **options).images


def test_pictures_show_what_was_asked_for(pipeline):
    kind, pipe = pipeline
    texts = random.Random(1).sample(world.captions("train"), COUNT)
    images = sampled(pipe, texts)
    own = [world.measures(text, image) for text, image in zip(texts, images, strict=True)]
    others = [world.measures(text, image) for text, image in zip(texts[1:] + texts[:1], images, strict=True)]
    for part in ("colour", "place", "prompt_match"):
        assert statistics.mean(seen[part] for seen in own) > statistics.mean(seen[part] for seen in others) + 0.2, (kind, part)
    for part in ("count", "shape"):  # of which there are few, so that another caption's is often the same
        assert statistics.mean(seen[part] for seen in own) > statistics.mean(seen[part] for seen in others) + 0.1, (kind, part)
    assert statistics.mean(seen["prompt_match"] for seen in own) > 0.75, kind
    assert statistics.mean(world.true_reward(t, i) for t, i in zip(texts, images, strict=True)) < world.HIGHEST_REWARD - 1.5, "much to gain"


def test_captions_that_were_held_out_are_understood_too(pipeline):
    _, pipe = pipeline
    texts = random.Random(2).sample(world.captions("eval"), 24)
    images = sampled(pipe, texts)
    own, others = ([world.measures(t, i)["colour"] for t, i in zip(some, images, strict=True)] for some in (texts, texts[1:] + texts[:1]))
    assert statistics.mean(own) > statistics.mean(others) + 0.2


def test_captions_are_understood_behind_as_many_zeros_as_diffusers_puts_there(pipeline):
    kind, pipe = pipeline
    if kind != "flow":
        pytest.skip("it has no T5")
    texts = random.Random(3).sample(world.captions("train"), 24)
    images = sampled(pipe, texts, max_sequence_length=256)
    own, others = ([world.measures(t, i)["colour"] for t, i in zip(some, images, strict=True)] for some in (texts, texts[1:] + texts[:1]))
    assert statistics.mean(own) > 0.5 and statistics.mean(own) > statistics.mean(others) + 0.2


def test_the_folder_is_a_pipeline_of_its_kind(pipeline):
    kind, pipe = pipeline
    folder = tiny_diffusion.tiny_diffusion_path(kind)
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.p*t*h")) and list(folder.rglob("*.safetensors"))
    record = json.loads((folder / "tiny_diffusion.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(tiny_diffusion._recipe(kind)))
    if kind == "flow":
        assert type(pipe).__name__ == "StableDiffusion3Pipeline" and type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    else:
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert pipe.scheduler.config.prediction_type == {"epsilon": "epsilon", "v": "v_prediction"}[kind]
    assert pipe.vae.config.latent_channels == (pipe.transformer if kind == "flow" else pipe.unet).config.in_channels


def test_latents_have_unit_variance_and_are_shared(pipeline):
    _, pipe = pipeline
    from safetensors.torch import load_file

    parts = tiny_parts.ensure_parts(progress=False)
    mean = load_file(parts / "latents.safetensors")["mean"].float()
    assert mean.std((0, 2, 3)).sub(1).abs().max() < 0.1 and mean.mean((0, 2, 3)).abs().max() < 0.1
    ours = load_file(tiny_diffusion.tiny_diffusion_path(pipeline[0]) / "vae" / "diffusion_pytorch_model.safetensors")
    for name, value in load_file(parts / "vae" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(ours[name], value)
