"""What learning from sampling trajectories adds to the plan of a run on pictures: rounds that are drawn, and steps on their transitions.

The reward itself is not counted, nor the small network of a step-aware scorer, and of pairs that ties or a threshold may leave out none is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prefopt.config.schema import TrainConfig
from prefopt.data.batch import Row
from prefopt.data.tokenise import Tokens
from prefopt.policies.denoiser_flops import DrawShape
from prefopt.policies.guidance import Guidance
from prefopt.policies.noise import address
from prefopt.policies.process import Process
from prefopt.policies.trajectory import transition_branch, window_of


@dataclass
class Rounds:
    """How a run learns from what it draws. `window`: the steps of the sampler that a round learns from."""

    cfg: TrainConfig
    prompts: int  # of the data
    window: range
    guidance: Guidance

    @property
    def pictures(self) -> int:
        """Drawn in a round."""
        return self.cfg.source.prompts * self.cfg.source.samples

    @property
    def steps(self) -> int:
        """Optimiser steps of a round."""
        return self.cfg.source.epochs * math.ceil(self.cfg.source.prompts / self.cfg.train.batch_size)

    @property
    def total(self) -> int:
        """Optimiser steps of the run."""
        cfg = self.cfg
        return cfg.train.steps or max(1, math.ceil(cfg.train.epochs * self.prompts / cfg.source.prompts)) * self.steps

    @property
    def calls(self) -> int:
        """Forward passes over the pictures of a round while they are drawn; candidates are foreseen by one each, but at the end."""
        foreseen = (self.cfg.trajectory.candidates or 0) * sum(step + 1 < self.cfg.trajectory.steps for step in self.window)
        return (1 + self.guidance.on) * (self.cfg.trajectory.steps + foreseen)

    @property
    def decoded(self) -> int:
        """Pictures that a round decodes."""
        trajectory = self.cfg.trajectory
        each = (trajectory.candidates or 0) * len(self.window) if trajectory.scorer == "reward" else 0
        return self.pictures * (1 + each)

    @property
    def at_once(self) -> int:
        """Predictions of one call while a round is drawn."""
        return (1 + self.guidance.on) * min(self.cfg.sampler.batch_size, self.pictures) * (self.cfg.trajectory.candidates or 1)

    @property
    def latents(self) -> int:
        """That a round keeps: whole walks, or of candidates a parent and two of them at each step."""
        trajectory = self.cfg.trajectory
        return self.pictures * (3 * len(self.window) if trajectory.candidates else trajectory.steps + 1)

    def drawing(self, shape: DrawShape) -> float:
        """FLOPs of drawing a round, over all processes, without decoding."""
        return self.calls * shape.forward(self.pictures)

    def rows(self, view: str) -> list[Row]:
        """What an optimiser step learns from, at most, under made-up addresses."""
        source, each, row = self.cfg.source, 1, "group"
        if view == "pairs":
            n, row = source.samples, "pair"
            each = n if self.cfg.trajectory.candidates else 1 if self.cfg.data.pairs == "best_worst" else n * (n - 1) // 2
        else:
            each = source.samples
        branches = [transition_branch(address("planned", side), 0, self.window[0]) for side in range(2 if view == "pairs" else 1)]
        count = min(self.cfg.train.batch_size, source.prompts) * each * len(self.window)
        return [Row(Tokens([0], branches), row, scores=[0.0], stored={"previous": [[0.0]] * len(branches)}) for _ in range(count)]

    def about(self) -> list[tuple[str, str]]:
        """Lines of the plan."""
        cfg, scale = self.cfg, self.guidance.scale
        blank = {0: "no guidance", 1: f"guidance {scale:g}, its unconditional prediction without a gradient",
                 2: f"guidance {scale:g}, with a gradient through both predictions"}[self.guidance.blank_passes]
        made = f", {cfg.trajectory.candidates} candidates at each" if cfg.trajectory.candidates else ""
        return [("rounds", f"{math.ceil(self.total / self.steps):,}, each of {self.pictures:,} pictures ({cfg.source.samples} for each of "
                           f"{cfg.source.prompts} prompts), and {self.steps} optimiser step{'s' * (self.steps > 1)}"),
                ("sampler", f"{cfg.trajectory.steps} steps, of which {len(self.window)} are trained{made}; {blank}")]


def rounds_of(cfg: TrainConfig, prompts: int, process: Process) -> Rounds | None:
    """None for a run that learns from other things. Raises `UserError` for a window that the schedule does not have."""
    if cfg.source.kind != "trajectories":
        return None
    scale = cfg.model.guidance if cfg.trajectory.guidance is None else cfg.trajectory.guidance
    return Rounds(cfg, prompts, window_of(cfg.trajectory, process, lambda n: 0), Guidance(scale, cfg.trajectory.blank_gradient))
