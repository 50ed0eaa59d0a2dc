"""Run under torchrun: whole runs as `zero_runs` makes them, where the second process stands for a machine that computes otherwise. It
trains a step-aware scorer for a single step, and in the run in the folder `rounded`, which must fail, its walks are rounded once drawn.
"""

from __future__ import annotations

import gc
import os

import diffusers  # noqa: F401
import pytest
import transformers  # noqa: F401

from prefopt.errors import RunFailed
from prefopt.rewards import step_aware
from prefopt.training.trajectories import TrajectorySource
from tests.distributed import zero_runs

SCORER_STEPS = 10  # in place of 500
SET, TRAIN = TrajectorySource._set, zero_runs.train


def rounding(self, *args):
    SET(self, *args)
    if self.folder.parent.name == "rounded":
        for walk in self.engine.policy.walks.values():
            walk.latents = walk.latents.bfloat16().float()


def training(cfg):
    if not cfg.run_dir.endswith("rounded"):
        return TRAIN(cfg)
    with pytest.raises(RunFailed, match="replay check"):  # on both processes: none is left waiting
        TRAIN(cfg)


if __name__ == "__main__":
    gc.freeze()  # what the imports made, or each run looks through it again
    second = os.environ["RANK"] == "1"
    step_aware.STEPS = 1 if second else SCORER_STEPS
    if second:
        TrajectorySource._set = rounding
    zero_runs.train = training
    zero_runs.main()
