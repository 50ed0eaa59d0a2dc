"""Who predicts each side of guidance where samples are drawn, as `sampler.negative` says (Diffusion-NPO, arXiv 2505.11245)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from prefopt.config.drawing import check_negative
from prefopt.config.schema import SamplerConfig, TrainConfig
from prefopt.errors import UserError
from prefopt.policies.guidance import Loaded, Side
from prefopt.policies.load import load_policy
from prefopt.policies.reference import AdapterOff, FrozenCopy, make_reference
from prefopt.policies.start import PICTURES, policy_folder, started

KEY = "sampler.negative"


def negative_of(asked: SamplerConfig, run: SamplerConfig) -> SamplerConfig:
    """`asked` of `prefopt eval` or `sample`, with the negative side of the run where it names none of its own."""
    return asked if asked.negative is not None else replace(asked, negative=run.negative)


def make_sides(cfg: TrainConfig, policy: Any, initial: Any, device: torch.device) -> tuple[Side | None, Side | None]:
    """(who predicts with the caption, who without) where that is not the policy. Call it before the first step and before a checkpoint is
    loaded, where the policy still stands where it starts; `initial` is such a copy, if there is one. Raises `UserError`."""
    check_negative(cfg)
    wanted = cfg.sampler.negative
    if wanted in (None, "none"):
        return None, None
    if wanted == "policy":
        return initial if isinstance(initial, (AdapterOff, FrozenCopy)) else make_reference(policy, "initial", name="positive"), None
    adapter = (policy_folder(wanted, KEY) / PICTURES[-1]).is_file()
    model = started(replace(cfg.model, start=wanted, lora=replace(cfg.model.lora, enabled=adapter, adapter=None)), KEY)
    made = load_policy(model, cfg.data, cfg.trust, device, cfg.hardware.precision, cfg.seed, noise=cfg.noise)
    ours, theirs = ((p.process.kind, p.denoiser.latent_channels, p.denoiser.factor) for p in (policy, made))
    if ours != theirs:
        raise UserError(f"{KEY}={wanted} predicts {theirs[0]} of {theirs[1]} channels, and model={cfg.model.name} predicts {ours[0]} of "
                        f"{ours[1]}; give a run of the same model")
    made.encodings = policy.encodings
    return None, Loaded(made)
