"""Where pictures are scored and how they are drawn: which settings go together. Imports no torch."""

from __future__ import annotations

from typing import Any

from prefopt.config.noise import BY_A_MODEL
from prefopt.config.objective_source import ObjectiveInfo
from prefopt.errors import UserError


def check_noise(noise: Any, info: ObjectiveInfo) -> None:
    """Refuses a plan of noise that has no times, not the model that it is made by, or not the pictures that it suits."""
    if noise.low >= noise.high:
        raise UserError(f"noise.low={noise.low:g} and noise.high={noise.high:g} leave no time between; low must be less")
    if noise.plan not in BY_A_MODEL:
        return
    if "reference" not in info.quantities and (noise.plan != "inverted" or noise.inverter == "reference"):
        raise UserError(f"noise.plan={noise.plan} inverts pictures by the reference here, and {info.name} has none; use noise=inverted "
                        "(by the policy), or an algorithm with a reference (prefopt list algo --needs reference)")
    if info.extra:
        raise UserError(f"noise.plan={noise.plan} inverts each picture under its caption, and {info.name} compares one picture under "
                        "several captions, which needs one noise for all; use noise=default")


def check_negative(cfg: Any) -> None:
    """Refuses another model for the side of guidance without caption where there is no such side."""
    sampler = getattr(cfg, "sampler", None)
    if sampler is None or sampler.negative in (None, "none"):
        return
    said = f"sampler.negative={sampler.negative} predicts without the caption"
    if cfg.model.kind != "diffusion":
        raise UserError(f"{said} where pictures are drawn, and model={cfg.model.name} writes texts; leave it out")
    if (cfg.model.guidance if sampler.guidance is None else sampler.guidance) == 1:
        raise UserError(f"{said}, and with a guidance of 1 nobody does; set sampler.guidance=2.5, say, or sampler.negative=null")
    if cfg.model.user_width is not None:
        raise UserError(f"{said}, and model={cfg.model.name} is told users as well; set sampler.negative=null")
