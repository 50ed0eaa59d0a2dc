"""Pipelines of diffusers with random weights and a few thousand parameters, one for each family, saved to folders as published ones are."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefopt.config.schema import LoraConfig
from prefopt.policies.denoisers import open_denoiser
from prefopt.policies.encoders import open_encoders

WORDS = "a red blue green circle square on the left right of two three small large Please generate only User Prompt :".split()
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
FAMILIES = ("sd15", "sd21", "sdxl", "pixart", "pixart-alpha", "sd3", "sd3-no-t5", "flux", "sana")
LATENT = 8  # places of a side
PROMPT = "a red circle on the left"
UNETS = ("sd15", "sd21", "sdxl")
NETWORKS = [family for family in FAMILIES if family not in ("sd3-no-t5", "pixart-alpha")]
ALL = LoraConfig(enabled=True, r=4, alpha=8, targets="attention")
SAVED: dict[str, Path] = {}  # by family, those of this process


def tokenizer(template: str, pad: str = "<pad>", most: int = 512) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(mark, VOCABULARY[mark]) for mark in ("<bos>", "<eos>") if mark in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                                   model_max_length=most, padding_side="right")


def clip(projection: bool, width: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                            max_position_embeddings=16, projection_dim=width, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def clip_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer("<bos> $A <eos>", "<eos>", 16)


def t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=len(VOCABULARY), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()


def vae(**settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **settings).eval()


def unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{
        "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": LATENT, "in_channels": 4,
        "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 4,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **settings,
    }).eval()


def make(family: str) -> Any:
    """The pipeline of a family; the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FAMILIES.index(family))
        return _make(family)


def _make(family: str) -> Any:
    import diffusers as d

    ddim = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
            "steps_offset": 1}
    if family in ("sd15", "sd21"):
        width, kind = 16, {}
        if family == "sd21":
            width, kind = 1024, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        network = unet(cross_attention_dim=width, use_linear_projection=family == "sd21")
        return d.StableDiffusionPipeline(vae=vae(scaling_factor=0.18215), text_encoder=clip(False, width), tokenizer=clip_tokenizer(),
                                         unet=network, scheduler=d.DDIMScheduler(**ddim, **kind), safety_checker=None,
                                         feature_extractor=None, requires_safety_checker=False)
    if family == "sdxl":
        network = unet(layers_per_block=2, cross_attention_dim=32, use_linear_projection=True, addition_embed_type="text_time",
                       addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16)
        euler = {k: v for k, v in ddim.items() if k.startswith("beta") or k == "steps_offset"}
        return d.StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025, force_upcast=True), text_encoder=clip(False), text_encoder_2=clip(True), unet=network,
            tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), scheduler=d.EulerDiscreteScheduler(**euler), add_watermarker=False)
    if family.startswith("pixart"):
        size = 128 if family == "pixart-alpha" else 32
        network = d.PixArtTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, cross_attention_dim=24,
            sample_size=size, patch_size=2, caption_channels=16, use_additional_conditions=size == 128, interpolation_scale=1).eval()
        kind = d.PixArtAlphaPipeline if size == 128 else d.PixArtSigmaPipeline
        return kind(vae=vae(scaling_factor=0.13025), text_encoder=t5(16), tokenizer=tokenizer("$A <eos>"), transformer=network,
                    scheduler=d.DPMSolverMultistepScheduler())
    if family.startswith("sd3"):
        network = d.SD3Transformer2DModel(
            sample_size=LATENT, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16, qk_norm="rms_norm",
            dual_attention_layers=(0,)).eval()
        t5s = (t5(32), tokenizer("$A <eos>")) if family == "sd3" else (None, None)
        return d.StableDiffusion3Pipeline(
            vae=vae(scaling_factor=1.5305, shift_factor=0.0609), text_encoder=clip(True), text_encoder_2=clip(True), text_encoder_3=t5s[0],
            tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=t5s[1], transformer=network,
            scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0))
    if family == "flux":
        network = d.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8)).eval()
        return d.FluxPipeline(
            vae=vae(scaling_factor=0.3611, shift_factor=0.1159), text_encoder=clip(False), text_encoder_2=t5(32),
            tokenizer=clip_tokenizer(), tokenizer_2=tokenizer("$A <eos>"), transformer=network,
            scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0))
    assert family == "sana"
    from transformers import Gemma2Config, Gemma2Model

    gemma = Gemma2Config(vocab_size=len(VOCABULARY), hidden_size=8, head_dim=8, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, attn_implementation="eager", pad_token_id=0, bos_token_id=1,
                         eos_token_id=2)
    deep = d.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407).eval()
    network = d.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2,
        cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=32).eval()
    scheduler = d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return d.SanaPipeline(tokenizer=tokenizer("<bos> $A"), text_encoder=Gemma2Model(gemma).eval(), vae=deep, transformer=network,
                          scheduler=scheduler)


def save(family: str, folder: Path) -> Path:
    make(family).save_pretrained(folder)
    return folder


# ---- what tests ask of them -----------------------------------------------------------------------------


def folders(tmp_path_factory: Any) -> Callable[[str], Path]:
    """family -> its folder, written once, whichever file of tests asks for it."""

    def get(family: str) -> Path:
        if family not in SAVED:
            SAVED[family] = save(family, tmp_path_factory.mktemp("pipelines") / family)
        return SAVED[family]

    return get


def pipeline(folder):
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]]
    pipe = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, family, **more):
    """Two steps of the pipeline, wider than high."""
    side = 2 * LATENT * (2 if family == "sana" else 1)
    settings = {"height": side, "width": 2 * side, "num_inference_steps": 2, "output_type": "latent",
                "generator": torch.Generator().manual_seed(0)}
    if family.startswith(("pixart", "sana")):
        settings["use_resolution_binning"] = False
    if family == "sdxl":
        settings |= {"original_size": (1001, 1365), "crops_coords_top_left": (3, 5), "target_size": (1023, 771)}
    return pipe(PROMPT, **(settings | more)).images


def unpack(family, latents):
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(latents, 2 * LATENT, 4 * LATENT, 2) if family == "flux" else latents


def batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@functools.cache
def encoders_of(folder):
    return open_encoders(folder)


def condition(folder, *texts):
    return batch(encoders_of(folder).captions(list(texts)))


@functools.cache
def plain(folder):
    """For tests that change nothing about it."""
    return open_denoiser(folder)


def noisy(denoiser, rows=2, seed=1):
    side = LATENT * (2 if denoiser.family == "sana" else 1)
    x = torch.randn(rows, denoiser.latent_channels, side, side, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((rows,), 0.5) if denoiser.process.kind == "flow" else torch.full((rows,), 501)


def disturb(network):
    """Second matrices of fresh adapters are zero; with others something is left to compare."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def alike(images, others):
    """But for the rounding of a level."""
    assert len(images) == len(others) and images[0].size == others[0].size
    for image, other in zip(images, others, strict=True):
        assert (np.asarray(image).astype(int) - np.asarray(other)).__abs__().max() <= 1


def asked(pipe, family):
    """(inputs, output) of the network's last call in two steps of the pipeline."""
    seen = []
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = network.register_forward_hook(lambda module, args, kwargs, out: seen.append((args, kwargs, out[0])), with_kwargs=True)
    run(pipe, family)
    handle.remove()
    return seen[-1]
