"""Jobs for tests of sweeps: processes that write what a run writes and cost nothing, because they import no torch.

Their learning rate says what they do: 0.3 fails on the first start, 0.4 is killed as for want of memory, 0.5 says that a GPU's is full,
0.6 waits until another job has begun, 0.7 waits for the file `go` in the sweep's folder. All others take their steps; the accuracy is
0.9 - lr + 0.01 step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-S", __file__]


def starts(sweep: Path) -> dict[str, list[dict]]:
    """What each job was started with, by the name of its folder, in the order of its starts."""
    return {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(sweep.glob("*/starts"))}


def main() -> int:
    cfg = json.loads(os.environ["PREFOPT_CONFIG"])
    run, lr, total = Path(cfg["run_dir"]), cfg["optim"]["lr"], cfg["train"]["steps"] or 3
    status, stop = run / "status.json", []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    first = json.loads(status.read_text())["step"] if status.exists() else 0

    def say(state: str, step: int, message: str = "") -> None:
        part = status.with_suffix(".part")
        part.write_text(json.dumps({"state": state, "step": step, "total_steps": total, "seconds": 1.0, "message": message, "speed": {}}))
        part.replace(status)

    again = (run / "starts").exists()
    with open(run / "starts", "a") as file:
        about = {"from": first, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}
        print(json.dumps(about), file=file)
    say("running", first)
    if lr == 0.3 and not again:
        say("failed", first, "ValueError: no luck")
        return 1
    if lr == 0.4:
        os.kill(os.getpid(), signal.SIGKILL)
    if lr == 0.5:
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB", file=sys.stderr)
        return 1
    for step in range(first + 1, total + 1):
        with open(run / "metrics.jsonl", "a") as file:
            print(json.dumps({"step": step, "seconds": 1.0, "split": "train", "loss": 1.0 / step}), file=file)
            print(json.dumps({"step": step, "seconds": 1.0, "split": "eval", "accuracy": 0.9 - lr + 0.01 * step,
                              "true_reward": -lr}), file=file)
        say("running", step)
        waits = {0.6: lambda: len(list(run.parent.glob("*/starts"))) < 2, 0.7: lambda: not (run.parent / "go").exists()}.get(lr)
        deadline = time.monotonic() + 60
        while waits and waits() and not stop and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(cfg["optim"]["eps"])  # how long a step takes
        if stop:
            say("stopped", step, "stopped by SIGTERM")
            return 143
        if time.monotonic() >= deadline:
            return 3
    say("finished", total)
    return 0


if __name__ == "__main__":
    sys.exit(main())
