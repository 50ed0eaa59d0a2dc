"""Where the time of a step goes, on every process: data, forward and backward pass, communication, optimiser, checkpoint.

A clock notes when the parts begin and end: on a GPU by events, which no one waits for; on a CPU by the clock. A lap lasts from one moment at
which the engine knows all numbers of a step to the next, where every event has passed. So it holds the update of one step and all else of
the step after it.

*Communication* is the time for which a process did nothing else: what overlaps with computing is not in it, and waiting for a slower process
is. A process that keeps others waiting is therefore known by its own time, which is the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
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

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
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
