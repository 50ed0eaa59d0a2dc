"""The typed shape of `conf/noise`: at which times and noises a picture is scored. Part of `prefopt.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

BY_A_MODEL = ("inverted", "path", "truncated")  # plans that a model makes while it trains


@dataclass
class NoiseConfig:
    plan: str = "shared"  # shared | independent | inverted | path | states | truncated
    draws: int = 1
    pool: Optional[int] = None
    timesteps: str = "uniform"  # uniform | logit_normal | importance
    low: float = 0.0
    high: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: str = "constant"  # constant | snr | min_snr | dsm
    gamma: float = 5.0
    dropout: float = 0.0
    user_dropout: float = 0.0
    inverter: str = "policy"  # policy | reference
    inversion_steps: int = 10
    inversion_guidance: float = 1.0
    renoise: int = 0
    eta: float = 0.0
    truncation: int = 5
    truncation_grid: int = 25
    truncation_guidance: float = 0.0
    truncation_start: str = "noise"  # noise | picture
    truncation_caption: bool = False
    huber: float = 1e-3
    held_out: int = 4


CHOICES: dict[str, tuple[str, ...]] = {
    "noise.truncation_start": ("noise", "picture"),
    "noise.plan": ("shared", "independent", "inverted", "path", "states", "truncated"),
    "noise.inverter": ("policy", "reference"),
    "noise.timesteps": ("uniform", "logit_normal", "importance"),
    "noise.weighting": ("constant", "snr", "min_snr", "dsm"),
}

BOUNDS: tuple[tuple[str, str, str], ...] = (
    ("noise.draws", "x >= 1", "at least 1"),
    ("noise.pool", "x is None or x >= 1", "at least 1, or null"),
    ("noise.low", "0 <= x < 1", "a share of the process, in [0, 1)"),
    ("noise.high", "0 < x <= 1", "a share of the process, in (0, 1]"),
    ("noise.logit_std", "x > 0", "above 0"),
    ("noise.gamma", "x > 0", "above 0"),
    ("noise.dropout", "0 <= x < 1", "in [0, 1)"),
    ("noise.user_dropout", "0 <= x < 1", "in [0, 1)"),
    ("noise.inversion_steps", "x >= 1", "at least 1"),
    ("noise.inversion_guidance", "x >= 0", "0 or more"),
    ("noise.renoise", "x >= 0", "0 or more"),
    ("noise.eta", "0 <= x <= 1", "in [0, 1]"),
    ("noise.held_out", "x >= 1", "at least 1"),
    ("noise.truncation", "x >= 0", "0 or more"),
    ("noise.truncation_grid", "x >= 2", "at least 2"),
    ("noise.huber", "x > 0", "above 0"),
)
