"""The typed shape of `conf/trajectory`: how trajectories are drawn and what of them is learned. Part of `prefopt.config.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass
class TrajectoryConfig:
    kind: str = "sde"  # sde | cps
    steps: int = 10
    noise: float = 0.7
    guidance: Optional[float] = None
    guidance_differs: bool = False
    blank_gradient: bool = False
    window: Optional[list[int]] = None  # first step, first step beyond
    window_size: Optional[int] = 3
    early: float = 0.5  # without a window: share of the steps that one begins in
    outside: str = "sde"  # sde | ode
    reduction: str = "mean"  # mean | sum
    kl: str = "exact"  # exact | code | error
    advantage: str = "group"  # group | global | running | none
    buffer: int = 16
    min_count: int = 16
    shared_start: bool = False
    candidates: Optional[int] = None
    scorer: str = "step_aware"  # step_aware | reward
    threshold: float = 0.0
    go_on: str = "random"  # random | best


CHOICES: dict[str, tuple[str, ...]] = {
    "trajectory.kind": ("sde", "cps"),
    "trajectory.outside": ("sde", "ode"),
    "trajectory.reduction": ("mean", "sum"),
    "trajectory.kl": ("exact", "code", "error"),
    "trajectory.advantage": ("group", "global", "running", "none"),
    "trajectory.scorer": ("step_aware", "reward"),
    "trajectory.go_on": ("random", "best"),
}

BOUNDS: tuple[tuple[str, str, str], ...] = (
    ("trajectory.steps", "x >= 2", "at least 2"),
    ("trajectory.noise", "x > 0", "above 0: steps without noise have no log-prob"),
    ("trajectory.guidance", "x is None or x >= 0", "0 or more, or null"),
    ("trajectory.window", "x is None or len(x) == 2", "two numbers or null: first step and first step beyond, from the noise on"),
    ("trajectory.window_size", "x is None or x >= 1", "at least 1, or null"),
    ("trajectory.early", "0 < x <= 1", "in (0, 1]: a share of the steps, from the noise on"),
    ("trajectory.buffer", "x >= 1", "at least 1"),
    ("trajectory.min_count", "x >= 2", "at least 2"),
    ("trajectory.candidates", "x is None or x >= 2", "at least 2, or null"),
    ("trajectory.threshold", "0 <= x <= 1", "in [0, 1]: it is a difference of two probabilities"),
)
