"""Betas of papers on diffusion models, in prefopt's unit. Imports nothing heavy.

A picture's log-prob is a sum over its D latent dims, in nats. Papers and their code take the *mean* over latent dims and write beta 5000
for it: the same objective has beta 5000/D here, which is what a setting may say: `beta: 5000/D`. At SD1.5's 512 pixels D is 4 x 64 x 64 =
16,384, so that is 0.305; at SDXL's 1,024 pixels it is 0.076. The one half of Diffusion-DPO (arXiv 2311.12908) is part of the log-prob.

`beta: auto` leaves the number to the run, which finds it before its first step (`training/auto_beta.py`).
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


# ---- beta: auto ----------------------------------------------------------------------------------

AUTO = re.compile(r"auto(?::([0-9.eE+-]+))?")
FACTOR = 0.45  # of plain `auto`


def factor(settings: dict[str, Any]) -> float | None:
    """The gradient factor that `beta: auto` or `beta: auto:FACTOR` asks for; None where beta is a number. Raises `UserError`."""
    value = settings.get("beta")
    if not isinstance(value, str) or not (match := AUTO.fullmatch(value.strip())):
        return None
    try:
        wanted = float(match[1] or FACTOR)
    except ValueError:
        wanted = 0.0
    if not 0 < wanted < 0.5:
        raise UserError(f"algo.beta={value}: the gradient factor after a step must lie between 0 and 0.5, where it starts; "
                        f"auto alone is auto:{FACTOR}")
    return wanted


def with_number(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings where beta is a number; with 1 in place of an `auto` that has not been found yet."""
    return settings if factor(settings) is None else {**settings, "beta": 1.0}
