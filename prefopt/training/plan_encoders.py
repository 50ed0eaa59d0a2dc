"""What the VAE and the text encoders of a pipeline take, from their configs: their sizes, and the VAE's memory and FLOPs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from prefopt.data.latents import BATCH
from prefopt.policies.pipeline_folder import PipelineFolder
from prefopt.training import memory
from prefopt.training.memory import Live

DECODED = 4  # pictures that the VAE decodes at a time (`Encoders.decode`)


def vae_needs(folder: PipelineFolder, resolution: int) -> tuple[float, float, float]:
    """Bytes of the VAE in fp32, of what it takes to encode a batch beside, and of what it takes to decode one."""
    with FakeTensorMode(), Live() as live, memory._quiet(), torch.no_grad():
        memory._fake(vae := on_meta(folder, "vae"))
        held = live.peak = live.now
        latent = _latent(vae.encode(torch.zeros(BATCH, 3, resolution, resolution)))
        encoding = live.peak - held
        latent = torch.zeros(DECODED, *latent.shape[1:])
        live.peak = live.now
        vae.decode(latent)
        return held, encoding, live.peak - held


def _latent(out: Any) -> torch.Tensor:
    return out.latent_dist.mean if hasattr(out, "latent_dist") else out.latent


def on_meta(folder: PipelineFolder, part: str) -> nn.Module:
    """A part of the pipeline without storage, from its config."""
    library, name = folder.parts[part]
    kind = getattr(importlib.import_module(library), name)
    config = folder.config(part)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if library == "diffusers":
            return kind.from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()
        return kind(kind.config_class.from_dict(config)).eval()


def numbers_of(folder: PipelineFolder, part: str) -> int:
    return sum(p.numel() for p in on_meta(folder, part).parameters())


def vae_flops(folder: PipelineFolder, resolution: int, what: str) -> float:
    """To `encode` or to `decode` one picture."""
    vae, (channels, factor) = on_meta(folder, "vae"), folder.latent
    shape = (3, resolution, resolution) if what == "encode" else (channels, resolution // factor, resolution // factor)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        getattr(vae, what)(torch.empty(1, *shape))
    return float(counter.get_total_flops())
