"""Run under torchrun: the runs of `zero_runs`, with no room to gather a whole model, so that every part of a run goes layer by layer.

Writes to PEAKS.R (R is the rank) how many bytes of tensors each part took beyond what was there before it. Arguments: the file of runs,
PEAKS."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prefopt.policies import save_split, split
from prefopt.policies.causal_lm import LanguageModel
from prefopt.training import reference, setup
from prefopt.training.engine import Engine
from prefopt.training.judge import Judge
from prefopt.training.memory import Live
from tests.distributed import zero_runs

SHARD = 8_000_000
PARTS = ((setup, "load"), (reference, "fill"), (Judge, "measure"), (Engine, "step"), (LanguageModel, "save"))


class Memory(Live):
    """Bytes in memory: neither tensors without content nor those that are pages of a file."""

    def _note(self, storage) -> None:
        if storage.device.type == "cpu" and (storage.nbytes() < 10_000 or not of_a_file(storage.data_ptr())):
            super()._note(storage)


def of_a_file(address: int) -> bool:
    """Whether memory is a safetensors file that is mapped."""
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors"))
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)


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
    peaks: dict[str, list[int]] = {}
    for owner, name in PARTS:
        measured(owner, name, peaks)
    zero_runs.STEP = Engine.step
    finish, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    zero_runs.main()
    Path(f"{sys.argv[2]}.{dist.get_rank()}").write_text(json.dumps(peaks))
    finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
