"""Betas of papers on diffusion models, in prefopt's unit. Imports nothing heavy.

A picture's log-prob is a sum over its D latent dims, in nats. Papers and their code take the *mean* over latent dims and write beta 5000
for it: the same objective has beta 5000/D here, which is what a setting may say: `beta: 5000/D`. At SD1.5's 512 pixels D is 4 x 64 x 64 =
16,384, so that is 0.305; at SDXL's 1,024 pixels it is 0.076. The one half of Diffusion-DPO (arXiv 2311.12908) is part of the log-prob.
"""

from __future__ import annotations

import re
from typing import Any

from prefopt.errors import UserError

SD15 = 4 * 64 * 64  # latent dims of Stable Diffusion 1.5 at 512 pixels: where nothing else is known
PER_MEAN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*/\s*D\s*")


def per_mean(value: Any) -> float | None:
    """The number before "/D", or None for all else."""
    match = PER_MEAN.fullmatch(value) if isinstance(value, str) else None
    return float(match[1]) if match else None


def latent_dims(model: Any) -> int:
    """D of a diffusion model's config: channels x height x width of a picture's latents."""
    channels, factor = model.latent
    return channels * (model.resolution // factor) ** 2


def in_nats(settings: dict[str, Any], dims: int) -> dict[str, Any]:
    """Settings of an algorithm with numbers in place of "x/D"."""
    return {key: value if per_mean(value) is None else per_mean(value) / dims for key, value in settings.items()}


def for_model(settings: dict[str, Any], model: Any) -> dict[str, Any]:
    """The same at the resolution of a model's config. Raises `UserError` for a model that makes no pictures."""
    if model.kind == "diffusion":
        return in_nats(settings, latent_dims(model))
    for key, value in settings.items():
        if per_mean(value) is not None:
            raise UserError(f"algo.{key}={value} is meant for a mean over the D latent dims of a picture, and model={model.name} makes no "
                            "pictures; choose model=tiny-diffusion or another diffusion model, or an algorithm for texts "
                            "(prefopt list algo --modality llm)")
    return settings
