"""Run under torchrun: the runs of `zero_runs`, with no room to gather a whole model, so that every part of a run goes layer by layer.

Writes to PEAKS.R (R is the rank) how many bytes of tensors each part took beyond what was there before it. Arguments: the file of runs,
PEAKS."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import modeling_utils

from prefopt.policies import save_split, split
from prefopt.policies.causal_lm import LanguageModel
from prefopt.training import reference, setup
from prefopt.training.engine import Engine
from prefopt.training.judge import Judge
from prefopt.training.memory import Live
from tests.distributed import zero_runs

SHARD = 8_000_000
LOAD = modeling_utils.load_state_dict
PARTS = ((setup, "load"), (reference, "fill"), (Judge, "measure"), (Engine, "step"), (LanguageModel, "save"))


FILES: dict[int, weakref.ref] = {}  # storages that are pages of a mapped file, which the system can take away


class Memory(Live):
    """Bytes in memory: neither tensors without content nor mapped files."""

    reading = False

    def _note(self, storage) -> None:
        if storage.device.type == "cpu" and not Memory.reading and storage._cdata not in FILES:
            super()._note(storage)


def reads(*args, **settings) -> dict[str, Tensor]:
    """transformers' function that maps a safetensors file."""
    Memory.reading = True
    found = LOAD(*args, **settings)
    Memory.reading = False
    for tensor in found.values():
        storage = tensor.untyped_storage()
        FILES[storage._cdata] = weakref.ref(storage, lambda _, key=storage._cdata: FILES.pop(key, None))
    return found


def measured(owner: object, name: str, peaks: dict[str, list[int]]) -> None:
    """Has a function note the bytes of every call."""
    call = getattr(owner, name)

    def wrapped(*args, **settings):
        with Memory() as live:
            gc.collect()
            for tensor in [t for t in gc.get_objects() if issubclass(type(t), Tensor)]:
                live._note(tensor.untyped_storage())
            before = live.peak = live.now
            try:
                return call(*args, **settings)
            finally:
                peaks.setdefault(name, []).append(live.peak - before)

    setattr(owner, name, wrapped)


def main() -> None:
    split.free_memory = lambda device: 0.0
    save_split.SHARD = SHARD
    modeling_utils.load_state_dict = reads
    peaks: dict[str, list[int]] = {}
    for owner, name in PARTS:
        measured(owner, name, peaks)
    zero_runs.STEP = Engine.step
    leave, zero_runs.leave_together = zero_runs.leave_together, lambda: None
    zero_runs.main()
    Path(f"{sys.argv[2]}.{dist.get_rank()}").write_text(json.dumps(peaks))
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
