"""model=tiny-diffusion and model=tiny-flow: small text-to-image models of the tiny_pictures world, made on first use and cached.

They are pipelines as diffusers saves them (safetensors), for `DiffusionPipeline.from_pretrained`:

- "epsilon" and "v": a StableDiffusionPipeline around a UNet that predicts the noise (arXiv 2006.11239) or v (arXiv 2202.00512);
- "flow": a StableDiffusion3Pipeline around an MMDiT (arXiv 2403.03206) that predicts the velocity of a rectified flow (arXiv 2209.03003).

All are pre-trained on pictures of every quality, so that they speak the world's language and have much to gain from preferences. They share
their tokenizer, text encoder and VAE (3x16x16 latents), which are made first: latents and caption embeddings of one serve the others. The
flow pipeline does not load without a T5, so it has one that is silent: its embeddings are zeros, 256 of them unless `max_sequence_length`
says fewer. The network knows captions with 256 zeros and with one, and `max_sequence_length=1` is several times faster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.data import tiny_pictures
from prefopt.policies.tiny_parts import (
    TEXT_ENCODER,
    batches,
    cache_path,
    ensure_parts,
    made,
    parts_recipe,
    start_straight,
    tokens_of,
    train,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SD3Transformer2DModel
    from torch import Tensor
    from transformers import T5EncoderModel, T5TokenizerFast

KINDS = ("epsilon", "v", "flow")
UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "attention_head_dim": 4,  # the number of heads: diffusers keeps the name that it had by mistake
    "norm_num_groups": 16,
}
MMDIT = {"patch_size": 2, "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 3, "pos_embed_max_size": 8}
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.014}
# `muon_lr` is that of the blocks' matrices and kernels. With AdamW alone the networks are far behind after as many steps.
TRAINING = {
    "epsilon": {"steps": 1000, "batch_size": 32, "lr": 2e-3, "muon_lr": 1e-2, "warmup_steps": 50, "dropout": 0.1, "most_weight": 50.0},
    "v": {"steps": 1000, "batch_size": 32, "lr": 2e-3, "muon_lr": 1e-2, "warmup_steps": 50, "dropout": 0.1},
    "flow": {
        "steps": 1600,
        "batch_size": 32,
        "lr": 3e-3,
        "muon_lr": 1e-2,
        "warmup_steps": 50,
        "dropout": 0.1,
        "shift": 5.0,
        "many_from": 1150,
    },
}
PERIODS = (2, 16)  # shortest and longest of the waves that tell the MMDiT's 8 x 8 places apart, in places
_ZEROS = 256  # how many embeddings of its T5 diffusers puts behind a caption


def _recipe(kind: str) -> dict[str, object]:
    network = {"network": MMDIT, "periods": PERIODS, "zeros": _ZEROS} if kind == "flow" else {"network": UNET, "noise": NOISE}
    return {"kind": kind, "parts": parts_recipe(), **network, "training": TRAINING[kind]}


def tiny_diffusion_path(kind: str) -> Path:
    """Where this recipe's model lies, or will lie, in the cache."""
    return cache_path("tiny-flow" if kind == "flow" else f"tiny-diffusion-{kind}", _recipe(kind))


def ensure_tiny_diffusion(kind: str, progress: bool = True) -> Path:
    """The folder of a diffusers pipeline of this kind ("epsilon", "v" or "flow"); makes it if it is not there.

    Making it takes a fixed number of steps, some minutes on two cores, and leaves the caller's RNG state, thread count and default dtype as
    they were. `progress` shows lines and bars on stderr. Of several processes that ask at once, one makes it and the others wait.
    """
    if kind not in KINDS:
        raise ValueError(f"a tiny diffusion model is of one of the kinds {', '.join(KINDS)}, not {kind!r}")
    path = tiny_diffusion_path(kind)
    if path.is_dir():
        return path
    parts = ensure_parts(progress)
    what = f"denoiser ({TRAINING[kind]['steps']} steps, some minutes on two cores)"
    return made(path, what, lambda folder, progress: _make_pipeline(kind, parts, folder, progress), progress)


def _make_pipeline(kind: str, parts: Path, folder: Path, progress: bool) -> None:
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(parts / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    text_encoder = CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder").eval()
    data = load_file(parts / "latents.safetensors")
    with torch.no_grad():  # the last one, -1, is the empty caption, which stands for a dropped one
        said = text_encoder(input_ids=tokens_of(tokenizer, [*tiny_pictures.captions("train"), ""]), output_hidden_states=True)
    make = _flow_pipeline if kind == "flow" else _unet_pipeline
    pipeline, loss = make(kind, vae, tokenizer, text_encoder, data, said, progress)
    pipeline.save_pretrained(folder, safe_serialization=True)
    network = pipeline.transformer if kind == "flow" else pipeline.unet
    record = {"recipe": _recipe(kind), "parameters": network.num_parameters(), "final_loss": round(loss, 4)}
    (folder / "tiny_diffusion.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _noisy_batches(kind: str, data: dict[str, Tensor]) -> Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A function that gives the next latents [B, C, 16, 16], their caption numbers [B], noise, and evenly spread shares of time [B]."""
    import torch

    settings = TRAINING[kind]
    mean, std, caption = data["mean"].float(), data["std"].float(), data["caption"]
    coming = batches(len(mean), settings["batch_size"], settings["steps"])

    def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = next(coming)
        x0 = mean[rows] + std[rows] * torch.randn(mean[rows].shape)
        dropped = torch.rand(len(rows)) < settings["dropout"]
        share = (torch.arange(len(rows)) + torch.rand(len(rows))) / len(rows)
        return x0, torch.where(dropped, -1, caption[rows]), torch.randn(x0.shape), share[torch.randperm(len(rows))]

    return batch


def _unet_pipeline(kind, vae, tokenizer, text_encoder, data, said, progress) -> tuple[DiffusionPipeline, float]:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        sample_size=data["mean"].shape[-1],
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=TEXT_ENCODER["hidden_size"],
        **UNET,
    ).train()
    start_straight(unet)
    scheduler = DDIMScheduler(
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[kind],
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # as diffusers wants it of this pipeline; it says nothing about steps that trail
        timestep_spacing="trailing",
        **NOISE,
    )
    encoded = said.last_hidden_state
    batch = _noisy_batches(kind, data)

    def loss(_: int) -> Tensor:
        x0, caption, eps, share = batch()
        t = (share * NOISE["num_train_timesteps"]).long()
        cumprod = scheduler.alphas_cumprod[t][:, None, None, None]
        x_t = cumprod.sqrt() * x0 + (1 - cumprod).sqrt() * eps
        predicted = unet(x_t, t, encoded[caption]).sample
        if kind == "v":
            return (predicted - (cumprod.sqrt() * eps - (1 - cumprod).sqrt() * x0)).square().mean()
        # At high noise a small error of eps is a large one of the picture: weigh by what the same error is in v, up to a limit.
        weight = (1 / cumprod).clamp(max=TRAINING[kind]["most_weight"])
        return (weight * (predicted - eps).square()).mean()

    final = train(f"tiny-diffusion {kind}", unet, TRAINING[kind], loss, progress)
    plain = CLIPTextModel(text_encoder.config)
    state = text_encoder.state_dict()
    plain.load_state_dict({name: state[name if name in state else f"text_model.{name}"] for name in plain.state_dict()})
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=plain.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ), final


class _ManyZeros:
    """Joint attention in which the last caption token stands for `_ZEROS` equal ones: log(_ZEROS) is added to its attention logits.

    Equal tokens stay equal in every layer, so this is what the network computes with all of them, at the cost of one. It is what diffusers'
    JointAttnProcessor2_0 computes, for an MMDiT without normalised queries and keys.
    """

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None) -> tuple[Tensor, Tensor]:
        import torch
        from torch.nn import functional as F

        image, caption = hidden_states.shape[1], encoder_hidden_states.shape[1]
        own = (attn.to_q, attn.to_k, attn.to_v)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        joint = (torch.cat([a(hidden_states), b(encoder_hidden_states)], 1) for a, b in zip(own, added, strict=True))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in joint)
        bias = query.new_zeros(image + caption)
        bias[-1] = math.log(_ZEROS)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None, None, None].expand(1, 1, image + caption, -1))
        mixed = mixed.transpose(1, 2).flatten(2)
        told = mixed[:, image:]
        return attn.to_out[0](mixed[:, :image]), told if attn.context_pre_only else attn.to_add_out(told)


def _place(transformer: SD3Transformer2DModel) -> None:
    """Sines and cosines of each row and column [1, 64, width] with geometrically spaced periods, all of which fit the picture.

    The usual ones reach 63,000 places: most of a vector is then the same everywhere, and shapes of a few places are learnt late.
    """
    import torch

    table = transformer.pos_embed.pos_embed
    side, waves = transformer.config.pos_embed_max_size, table.shape[-1] // 4
    periods = PERIODS[0] * (PERIODS[1] / PERIODS[0]) ** torch.linspace(0, 1, waves)
    angles = torch.arange(side)[:, None] * (2 * math.pi / periods)
    one = torch.cat([angles.sin(), angles.cos()], 1)
    row, column = one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)
    table.copy_(torch.cat([row, column], 2).view_as(table))


def _t5_tokenizer() -> T5TokenizerFast:
    from transformers import T5TokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in tiny_pictures.vocabulary())]
    return T5TokenizerFast(vocab=[(word, 0.0) for word in words], extra_ids=0)


def _silent_t5(width: int) -> T5EncoderModel:
    """A T5 encoder whose embeddings are zeros [T, width]."""
    import torch
    from transformers import T5Config, T5EncoderModel

    words = len(tiny_pictures.vocabulary()) + 3
    model = T5EncoderModel(T5Config(vocab_size=words, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)).eval()
    torch.nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model


def _flow_pipeline(kind, vae, tokenizer, text_encoder, data, said, progress) -> tuple[DiffusionPipeline, float]:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    channels = vae.config.latent_channels
    # The pipeline joins the embeddings of two CLIP text encoders; here both are the same one.
    encoded, pooled = said.hidden_states[-2].repeat(1, 1, 2), said.text_embeds.repeat(1, 2)
    transformer = SD3Transformer2DModel(
        sample_size=data["mean"].shape[-1],
        in_channels=channels,
        out_channels=channels,
        joint_attention_dim=encoded.shape[-1],
        pooled_projection_dim=pooled.shape[-1],
        caption_projection_dim=MMDIT["attention_head_dim"] * MMDIT["num_attention_heads"],
        **MMDIT,
    ).train()
    start_straight(transformer)
    _place(transformer)
    batch, shift = _noisy_batches(kind, data), TRAINING[kind]["shift"]
    zero = torch.zeros_like(encoded[:, :1])

    def loss(step: int) -> Tensor:
        x0, caption, eps, share = batch()
        share = shift * share / (1 + (shift - 1) * share)  # more of the noisy end, where captions are learnt
        t = share[:, None, None, None]
        words = torch.cat([encoded[caption], zero[caption]], 1)
        many = step >= TRAINING[kind]["many_from"] and step % 2  # one zero and many by turns: see the module's first lines
        transformer.set_attn_processor(_ManyZeros() if many else JointAttnProcessor2_0())
        predicted = transformer((1 - t) * x0 + t * eps, words, pooled[caption], t.flatten() * 1000, return_dict=False)[0]
        return (predicted - (eps - x0)).square().mean()

    final = train("tiny-flow", transformer, TRAINING[kind], loss, progress)
    transformer.set_attn_processor(JointAttnProcessor2_0())
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=_silent_t5(encoded.shape[-1]),
        tokenizer_3=_t5_tokenizer(),
    ), final
