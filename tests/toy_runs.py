"""Small runs for tests: in process, on the CPU, in a temporary folder."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from prefopt.cli import main
from prefopt.training.engine import Engine

FAST = ["debug=fast", "hardware=cpu", "hardware.threads=1"]


def train(folder: Path, *overrides: str) -> int:
    """`prefopt train` into `folder`; returns the exit code."""
    AcceleratorState._reset_state(True)  # accelerate fixes the precision of a process at its first use
    return main(["train", f"hydra.run.dir={folder}", *FAST, *overrides])


@contextmanager
def fresh_accelerator():
    """Accelerate keeps process-wide state; tests of the engine start from none."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def gradients(engine: Engine, micros: list) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient of a step, before clipping and update, and its loss."""
    seen: dict[str, torch.Tensor] = {}
    engine.optimizer.step = lambda *a, **k: seen.update({n: p.grad.clone() for n, p in engine.policy.trainable().items()})
    result = engine.step(micros, lr=0.0)
    return seen, result.loss
