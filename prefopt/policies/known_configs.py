"""Published configs of a few large models, so that `prefopt plan` can be asked about them where the hub is out of reach or gated.

What the repositories that are named publish of their models, written down by hand; tests hold the numbers of weights to the published ones.
Only what decides sizes and FLOPs is here; weights never are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from prefopt.policies.pipeline_folder import PipelineFolder

CHARACTERS = 4  # of a text that `stand_in` takes as one token; vocabularies of 128k average 4 to 4.5 on English

LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
          "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": False}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": {
        **LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "meta-llama/Meta-Llama-3-70B": {
        **LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}

CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu"}
CLIP_G = {**CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "feed_forward_proj": "gated-gelu"}
VAE = {"block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2,
       "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 1024}
# repository -> (class of the pipeline, part -> (library, class, config))
PIPELINES: dict[str, tuple[str, dict[str, tuple[str, str, dict[str, Any]]]]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", {
        "unet": ("diffusers", "UNet2DConditionModel", {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "in_channels": 4, "out_channels": 4,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 2,
            "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True}),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", {
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "prediction_type": "epsilon", "steps_offset": 1}),
        "vae": ("diffusers", "AutoencoderKL", {**VAE, "latent_channels": 4, "scaling_factor": 0.13025}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G)}),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", {
        "transformer": ("diffusers", "FluxTransformer2DModel", {
            "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": True, "in_channels": 64,
            "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
            "pooled_projection_dim": 768}),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", {
            "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
            "base_image_seq_len": 256, "max_image_seq_len": 4096}),
        "vae": ("diffusers", "AutoencoderKL", {**VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
                                               "use_quant_conv": False, "use_post_quant_conv": False}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "T5EncoderModel", T5_XXL)}),
}


def known_config(path: str | None) -> Any | None:
    """The transformers config of a language model on the hub; None of those that are not known."""
    if path not in LANGUAGE_MODELS:
        return None
    from transformers import AutoConfig

    return AutoConfig.for_model(**LANGUAGE_MODELS[path])


def stand_in() -> Any:
    """A tokenizer that takes every few characters as one token, for lengths alone. It has no chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    class StandIn(PreTrainedTokenizerFast):
        def __call__(self, text: str, **settings: Any) -> Any:
            out = super().__call__(text, **{**settings, "return_offsets_mapping": True})
            # Different text must not look the same: pairs of equal replies are refused.
            places = zip(out["input_ids"], out["offset_mapping"], strict=True)
            out["input_ids"] = [i or 2 + crc32(text[a:b].encode()) for i, (a, b) in places]
            return out

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{CHARACTERS}}}"), "isolated")
    return StandIn(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


@dataclass(frozen=True)
class KnownPipeline(PipelineFolder):
    """A pipeline of diffusers of which the configs are known and nothing else is here."""

    def config(self, part: str) -> dict[str, Any]:
        _, name, settings = PIPELINES[str(self.path)][1][part]
        return settings if part.startswith("text_encoder") else {"_class_name": name, **settings}  # transformers' have no such key


def known_pipeline(path: str | None, max_sequence_length: int | None) -> KnownPipeline | None:
    """The pipeline of this name on the hub; None of those that are not known."""
    if path not in PIPELINES:
        return None
    name, parts = PIPELINES[path]
    return KnownPipeline(Path(path), name, {part: [library, kind] for part, (library, kind, _) in parts.items()}, max_sequence_length)
