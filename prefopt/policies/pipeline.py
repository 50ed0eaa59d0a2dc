"""From a config to a diffusion policy: where the pipeline is, its network, and the encoders that pictures and captions go through once."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch

from prefopt.config.schema import ModelConfig, NoiseConfig
from prefopt.errors import UserError
from prefopt.paths import cache_dir
from prefopt.policies.denoisers import open_denoiser
from prefopt.policies.diffusion import DiffusionPolicy
from prefopt.policies.encoders import Encoders, open_encoders
from prefopt.policies.locate import Located
from prefopt.policies.pipeline_folder import open_folder

TINY = {"tiny-diffusion": "epsilon", "tiny-diffusion-v": "v", "tiny-flow": "flow"}  # model -> what it predicts
# Single-file checkpoints at the top of a repository, pickles and other frameworks' weights stay where they are.
WANTED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]


def load_diffusion(cfg: ModelConfig, device: torch.device, precision: str, seed: int, noise: NoiseConfig) -> DiffusionPolicy:
    """The policy of `cfg`, without the pictures and captions that it is to score (`DiffusionPolicy.encode`). Raises `UserError`."""
    located = locate_pipeline(cfg)
    folder = open_folder(located.folder, cfg.max_sequence_length)
    print(f"model: {located.where}", file=sys.stderr)
    frozen = torch.bfloat16 if precision == "bf16" and cfg.frozen else torch.float32
    denoiser = open_denoiser(folder, frozen, device, cfg.lora if cfg.lora.enabled else None, seed, cfg.gradient_checkpointing,
                             cfg.channels_last, cfg.compile, cfg.resolution, cfg.dropout, cfg.user_width, cfg.recompute)
    if cfg.start:
        denoiser.restore(cfg.start)
    if cfg.latent != [denoiser.latent_channels, denoiser.factor]:
        raise UserError(f"model.latent={cfg.latent}: the pictures of {located.where} have {denoiser.latent_channels} channels and "
                        f"{denoiser.factor} pixels to each place; set model.latent=[{denoiser.latent_channels},{denoiser.factor}]")
    if cfg.resolution % (denoiser.factor * denoiser.packs):
        raise UserError(f"model.resolution={cfg.resolution} is no multiple of {denoiser.factor * denoiser.packs} pixels, which "
                        f"{located.where} needs")
    base = located.folder if cfg.frozen or not cfg.start else cfg.start  # of an adapter, its own weights are told apart
    weights = Located(str(Path(base) / folder.network), None, "").fingerprint()
    source = {"path": cfg.path, "where": located.where, "revision": located.revision, "fingerprint": weights}

    @cache
    def encoders() -> Encoders:
        return open_encoders(folder, torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32, device)

    return DiffusionPolicy(cfg, noise, denoiser, encoders, device, precision, seed, source)


def locate_pipeline(cfg: ModelConfig, weights: bool = True) -> Located:
    """Where the folder of a pipeline is: made here, local, on the hub, or kept in the cache. Raises `UserError` naming all that was tried.
    Without `weights` only configs and vocabularies of one on the hub are fetched."""
    if cfg.path is None:
        if (kind := TINY.get(cfg.name)) is None:
            raise UserError(f"model.path is not set for model={cfg.name}; give a hub id or a folder")
        from prefopt.policies.tiny_diffusion import ensure_tiny_diffusion

        folder = ensure_tiny_diffusion(kind)
        return Located(str(folder), None, f"made on this machine, kept at {folder}")
    given = Path(cfg.path).expanduser()
    if given.is_dir():
        return Located(str(given), None, f"local folder {given}")
    if cfg.path.startswith((".", "/", "~")):
        raise UserError(f"model.path={cfg.path}: there is no such folder (looked from {Path.cwd()})")
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(cfg.path, revision=cfg.revision, allow_patterns=WANTED if weights else WANTED[:-1])
        return Located(folder, None, f"hub {cfg.path}", Path(folder).name)
    except Exception as error:  # not found, gated, no network: the hub client has many types for one situation
        tried = f"hub {cfg.path} ({type(error).__name__})"
    kept = cache_dir() / "models" / cfg.path.split("/")[-1]
    if kept.is_dir():
        return Located(str(kept), None, f"local folder {kept}")
    raise UserError(f"model={cfg.name} is nowhere to be had; tried {tried}, folder {kept} (not there). Check the name and the network "
                    "(gated models also need `hf auth login`), or set model.path to a folder of a diffusers pipeline.")
