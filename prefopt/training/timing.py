"""Where the time of a step goes, on every process: data, forward and backward pass, communication, optimiser, checkpoint.

A clock notes when the parts begin and end: on a GPU by events, which no one waits for; on a CPU by the clock. A lap lasts from one moment
at which the engine knows all numbers of a step to the next, where every event has passed. So it holds the update of one step and all else
of the step after it.

*Communication* is the time for which a process did nothing else: what overlaps with computing is not in it, and waiting for a slower
process is. A process that keeps others waiting is therefore known by its own time, which is the rest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook as exchange
from torch.nn.parallel import DistributedDataParallel

PARTS = ("data", "forward", "backward", "communication", "optimizer", "checkpoint")
WARM_UP = 2  # first laps of a start: kernels are chosen, memory is taken
STRAGGLES = 1.2  # own time of a process, as a multiple of the median
ENOUGH = 20  # laps from which on someone is named


class Clock:
    """Seconds of this process by part. Parts may lie in one another: the inner one's time is not the outer one's."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[str, Any, Any, int]] = []  # part, begin, end, depth
        self.depth = 0
        self.ready: Any = None  # when the last gradients were handed over to be exchanged
        self.paused = False

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.paused:
            yield
            return
        begin, self.depth, self.ready = self.now(), self.depth + 1, self.ready if self.depth else None
        try:
            yield
        finally:
            self.depth -= 1
            end = self.now()
            if part == "backward" and self.ready is not None:  # the rest was spent on waiting for the exchange
                self.spans.append(("communication", self.ready, end, self.depth + 1))
                self.ready = None
            self.spans.append((part, begin, end, self.depth))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens here, an evaluation say, is part of no step."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap. Only where the device has passed all that was noted."""
        found = dict.fromkeys(PARTS, 0.0)
        inner: dict[int, float] = {}  # by depth, what the parts inside of the next one took
        for part, begin, end, depth in self.spans:
            took = end - begin if self.device.type != "cuda" else begin.elapsed_time(end) / 1000
            found[part] += took - inner.pop(depth + 1, 0.0)
            inner[depth] = inner.get(depth, 0.0) + took
        self.spans.clear()
        return found

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time, and that of waiting for its handle, is communication."""
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self("communication"):
                handle = call(*args, **kwargs)
            if callable(getattr(handle, "wait", None)) and not isinstance(handle, Tensor):
                return Handle(handle, self)
            return handle
        return wrapped


class Handle:
    """What a collective operation returned, timed while it is waited for."""

    def __init__(self, handle: Any, clock: Clock):
        self.handle, self.clock = handle, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock("communication"):
            return self.handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


COLLECTIVES = ("all_reduce", "reduce", "broadcast", "barrier", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather",
               "all_gather_object", "all_to_all_single")


def watch(model: nn.Module, clock: Clock) -> None:
    """Lets `clock` see what the wrapped model sends on its own: the exchange of gradients that ends a backward pass of
    DistributedDataParallel, and DeepSpeed's collective operations. On a GPU DeepSpeed waits for other streams, which is not seen; it stays
    in the part that waits.
    """
    if isinstance(model, DistributedDataParallel):
        def noted(group, bucket):  # torch reads annotations of hooks, if there are any, and wants no text
            clock.ready = clock.now()
            return exchange(group, bucket)

        model.register_comm_hook(None, noted)
    elif comm := getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None):
        for name in COLLECTIVES:
            if hasattr(comm, name):
                setattr(comm, name, clock.timed(getattr(comm, name)))


def own(seconds: Sequence[float]) -> float:
    """What a process spends on its own work: everything but waiting for others, and checkpoints, which one process writes for all."""
    return sum(s for part, s in zip(PARTS, seconds, strict=True) if part not in ("communication", "checkpoint"))


def stragglers(ranks: Sequence[Sequence[float]]) -> list[int]:
    """The processes whose own work takes more than 1.2 times the median's; in a run of two, of the other's."""
    mine = [own(seconds) for seconds in ranks]
    return [rank for rank, s in enumerate(mine) if s > STRAGGLES * median([o for r, o in enumerate(mine) if r != rank] or [s])]


class Times:
    """The split of a run's steps over its processes, since this start."""

    def __init__(self, world: int, per_machine: int):
        self.per_machine, self.laps = per_machine, 0
        self.sums = [[0.0] * len(PARTS) for _ in range(world)]

    def add(self, ranks: Sequence[Sequence[float]]) -> dict[str, float]:
        """Takes a lap of every process in; what a row of metrics says of it: the mean over processes, and the most of any."""
        if not any(map(any, ranks)):  # the first step follows no lap
            return {}
        self.laps += 1
        if self.laps == WARM_UP + 1:
            self.sums = [[0.0] * len(PARTS) for _ in ranks]
        self.sums = [[a + b for a, b in zip(held, lap, strict=True)] for held, lap in zip(self.sums, ranks, strict=True)]
        row = {f"time/{part}": sum(column) / len(ranks) for part, column in zip(PARTS, zip(*ranks, strict=True), strict=True)}
        if len(ranks) > 1:
            row |= {f"time_most/{part}": max(column) for part, column in zip(PARTS, zip(*ranks, strict=True), strict=True)}
        return row

    def averages(self) -> dict[str, Any]:
        """Seconds per step of every process, and who keeps the others waiting."""
        counted = self.laps - WARM_UP if self.laps > WARM_UP else self.laps
        if not counted:
            return {}
        ranks = [[round(s / counted, 6) for s in held] for held in self.sums]
        named = stragglers(ranks) if counted >= ENOUGH else []
        return {"parts": list(PARTS), "steps": counted, "seconds": ranks, "per_machine": self.per_machine, "stragglers": named}


def straggler_lines(times: dict[str, Any]) -> list[str]:
    """A sentence for each process that keeps the others waiting, from `Times.averages`."""
    mine = [own(seconds) for seconds in times.get("seconds", [])]
    lines = []
    for rank in times.get("stragglers", []):
        others = median(s for r, s in enumerate(mine) if r != rank)
        machine = f" (process {rank % times['per_machine']} of machine {rank // times['per_machine']})" \
            if len(mine) > times["per_machine"] else ""
        lines.append(f"process {rank}{machine} takes {mine[rank]:.3g} s a step for its own work, the others {others:.3g} s; they wait "
                     "for it")
    return lines
