"""Run under torchrun: whole runs, one after the other, from their configs. Argument: a file with a JSON list of
{"config": a run's config, "algo": its name, "kill": the optimiser step before which its processes die, or null, "spoil": a step whose
loss is made infinite, or null}."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf

from prefopt.config.schema import TrainConfig
from prefopt.training import engine
from prefopt.training.engine import Engine
from prefopt.training.loop import train
from prefopt.training.rundir import claim
from tests.distributed.launching import leave_together

STEP = Engine.step


class Killed(Exception):
    """In place of a signal, so that the next run can have the processes."""


def killed_before(step: int | None, spoil: int | None = None):
    """In place of `Engine.step`: the processes die where they would make optimiser step `step` (from 1) of this start, and the loss of step
    `spoil` is infinite on the main one, though its gradient is not."""
    calls = []

    def stepping(self, *args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        if len(calls) != spoil:
            return STEP(self, *args)
        real = engine.reduce_terms
        more = float("inf") if self.accelerator.is_main_process else 0.0
        engine.reduce_terms = lambda *a: (real(*a)[0] + more, real(*a)[1])
        try:
            return STEP(self, *args)
        finally:
            engine.reduce_terms = real

    return stepping


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state(reset_partial_state=False)
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), job["config"]))
        if not dist.is_initialized() or dist.get_rank() == 0:
            claim(cfg, job["algo"])
        Engine.step = killed_before(job["kill"], job.get("spoil"))
        try:
            train(cfg)
        except Killed:
            pass
    leave_together()


if __name__ == "__main__":
    main()
