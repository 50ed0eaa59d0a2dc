"""Ctrl-C and SIGTERM: the first asks the loop to stop after the current step, the second ends the process at once."""

from __future__ import annotations

import signal
import sys


class StopSignals:
    """Context manager; `name` is the signal that asked for a stop, or None."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: finishing this step, then saving (once more to stop at once)", file=sys.stderr)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
