"""Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning): the first asks the loop to stop after this step, a second ends the process at once."""

from __future__ import annotations

import signal
import sys
import time

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A batch system signals every process of a job, and each of them passes it on: what comes within these seconds is one request.
BURST = 3.0


class StopSignals:
    """Context manager; `name` is the signal that asked for a stop, or None."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in STOPS:
            self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
            print(f"\n{self.name}: finishing this step, then saving (once more to stop at once)", file=sys.stderr)
        elif number == signal.SIGINT or time.monotonic() - self._since > BURST:
            raise KeyboardInterrupt

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
