"""Starts the worker processes of one machine with torch elastic, and says why they ended. `python -m prefopt.launch.elastic`.

Torch elastic runs in a thread; the main thread passes signals on. Left to itself, elastic would give the workers thirty seconds from the
first signal to SIGKILL, which is too short for a checkpoint of a large model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError
from prefopt.launch.group import AGENT_ENV, CONFIG_ENV
from prefopt.launch.nodes import address_towards, can_listen, interface_of, split_address
from prefopt.launch.verdict import conclude, verdict
from prefopt.launch.worker import config_from, die_with_parent
from prefopt.tracking.redact import redact
from prefopt.training.ranks import FOLDER, forget_records, log_path, read_records
from prefopt.training.rundir import hide_secrets, write_atomic
from prefopt.training.signals import BURST, STOPS

PATIENCE = 10.0  # seconds that workers have to end by themselves when the run is lost, or after a second signal


def main() -> int:
    die_with_parent()
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # the agent's own notices would bury the workers' one sentence
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # elastic looks for GPUs, and only the workers are to touch CUDA
    os.environ[AGENT_ENV] = str(os.getpid())
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "15")  # seconds for the other workers when one has failed
    cfg = config_from(json.loads(os.environ[CONFIG_ENV]))
    agent = Agent(cfg)
    code, sentence = agent.run()
    if sentence:
        print(f"prefopt: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # a rendezvous that the other machines have left keeps its threads


class Agent:
    """The workers of this machine."""

    def __init__(self, cfg: TrainConfig):
        self.cfg, self.folder = cfg, Path(cfg.run_dir)
        self.world = cfg.hardware.nodes * cfg.hardware.processes
        self.failed = self.folder / FOLDER / "failed.json"  # written by the first machine on which workers failed, read by all
        self.exits: dict[int, int] = {}
        self.error: Exception | None = None
        self.done = self.began = False
        self.came: list[tuple[int, float]] = []

    def run(self) -> tuple[int, str]:
        """(exit code, what the user should know)."""
        for number in STOPS:
            signal.signal(number, lambda n, _: self.came.append((n, time.monotonic())))
        forget_records(self.folder)  # no worker of any machine begins before all of them have come this far
        thread = threading.Thread(target=self._elastic, daemon=True)
        thread.start()
        told: set[tuple[int, int]] = set()  # (pid, which signal of those that came)
        alone, doomed = time.monotonic(), None  # since when there are no workers; since when workers on another machine have failed
        while thread.is_alive():
            thread.join(0.2)
            now, children = time.monotonic(), psutil.Process().children()
            if children:
                alone, self.began = now, True
            for index, (number, _) in enumerate(self.came):
                for child in children:
                    if (child.pid, index) not in told:
                        _send(child, number)
                        told.add((child.pid, index))
            if self.came and now - alone > 2:
                break  # it waits for other machines
            if doomed is None and self.failed.exists():
                doomed = now
            if (doomed and now - doomed > PATIENCE) or (self.again and now - self.again > PATIENCE):
                for child in children:
                    _send(child, signal.SIGKILL)
        for rank in self.exits:
            hide_secrets(log_path(self.folder, rank))
        return self._outcome()

    @property
    def again(self) -> float | None:
        """When somebody lost patience after a first signal. A batch system sends its signal to each process at once, which is one."""
        return next((when for _, when in self.came if when - self.came[0][1] > BURST), None)

    def _elastic(self) -> None:
        with _quiet_torch():
            import torch  # noqa: F401
        from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

        deadline = time.monotonic() + self.cfg.hardware.timeout
        while True:
            try:
                self.exits = exits_of(launch_config(self.cfg), "-m", "prefopt.launch.worker")
                self.done = not self.exits
            except RendezvousConnectionError as error:  # the machine where they meet is not up yet, or just left the stage before this one
                if not self.began and time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                self.error = error
            except Exception as error:
                self.error = error
            return

    def _outcome(self) -> tuple[int, str]:
        records = read_records(self.folder)
        if stopped := [r["code"] for r in records if r["state"] == "stopped"]:
            if self.done or not any(r["state"] == "failed" and r["kind"] == "error" for r in records):
                return self._asked() or max(stopped), ""
        if self.done:
            return 0, ""
        if self.came and not any(r["state"] == "failed" for r in records):
            return self._asked(), "stopped; the same command goes on with it"
        if not self.began and self.error is not None:
            return self._nobody_came(self.error)
        if self.failed.exists():
            said = json.loads(self.failed.read_text())
            return said["code"], said["message"]
        patience = 0.0 if self.cfg.hardware.nodes == 1 else 5.0  # here all have ended
        sentence, code = verdict(self.folder, self.world, self.exits, self.cfg.hardware.timeout, patience)
        self.failed.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.failed, json.dumps({"message": redact(sentence), "code": code}))
        conclude(self.folder, sentence)
        return code, sentence

    def _asked(self) -> int:
        """The exit code of the signal that came here, 0 for none."""
        return 0 if not self.came else 130 if self.came[0][0] == signal.SIGINT else 143

    def _nobody_came(self, error: Exception) -> tuple[int, str]:
        hardware = self.cfg.hardware
        if isinstance(error, UserError):
            return error.exit_code, str(error)
        if hardware.nodes == 1:
            return 1, f"the worker processes could not be started: {type(error).__name__}: {error}"
        return 1, (f"not all of {hardware.nodes} machines came to {hardware.rendezvous} within {hardware.timeout:g} s (hardware.timeout; "
                   f"{type(error).__name__}). The same command, with the same hydra.run.dir, has to run on each of them, and that port has "
                   "to be open: prefopt launch --print")


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Torch reads this when it is imported. A store that another machine has left would print stack traces; the workers keep theirs."""
    name = "TORCH_CPP_LOG_LEVEL"
    given = name in os.environ
    os.environ.setdefault(name, "ERROR")
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def exits_of(config: Any, *words: str) -> dict[int, int]:
    """Runs `python WORDS` as torch elastic's `config` says. Nothing if all went well, else the exit codes of this machine's workers by
    rank, 0 for those that elastic ended because of others. Its own list may lack the first to die (its connections close, and the others
    fail, before it can be waited for), and has SIGTERM as the cause where elastic sent it.
    """
    from torch.distributed.elastic.multiprocessing import subprocess_handler
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    handlers, told = {}, {}  # by rank: the process, the signals that elastic sent to it
    kind = subprocess_handler.SubprocessHandler
    start, close = kind.__init__, kind.close

    def started(self: Any, entrypoint: str, args: tuple, env: dict[str, str], *rest: Any, **named: Any) -> None:
        start(self, entrypoint, args, env, *rest, **named)
        self.rank = int(env["RANK"])
        handlers[self.rank] = self

    def closed(self: Any, death_sig: signal.Signals | None = None) -> None:
        told.setdefault(self.rank, set()).add(-(death_sig or signal.SIGTERM))
        close(self, death_sig)

    kind.__init__, kind.close = started, closed
    try:
        elastic_launch(config, sys.executable)(*words)
        return {}
    except ChildFailedError:
        exits = {rank: handler.proc.poll() or 0 for rank, handler in handlers.items()}
        return {rank: 0 if code in told.get(rank, ()) else code for rank, code in exits.items()}
    finally:
        kind.__init__, kind.close = start, close


def launch_config(cfg: TrainConfig) -> Any:
    """How torch elastic starts the workers of this machine, and where it meets those of others."""
    from torch.distributed.launcher.api import LaunchConfig

    hardware = cfg.hardware
    patience = int(max(1, hardware.timeout))
    settings: dict[str, Any] = {"join_timeout": patience, "read_timeout": patience}
    if hardware.nodes == 1:
        run, endpoint, address = uuid.uuid4().hex, "localhost:0", "localhost"
    else:
        # Only the same run can meet: the same config in the same folder.
        run, endpoint = hashlib.sha256(json.dumps(asdict(cfg), sort_keys=True).encode()).hexdigest(), hardware.rendezvous
        host, port = split_address(endpoint)
        settings["is_host"], address = can_listen(host, port), address_towards(host)
        if interface := interface_of(address):  # gloo would take the one that the machine's name leads to, often the loopback
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return LaunchConfig(min_nodes=hardware.nodes, max_nodes=hardware.nodes, nproc_per_node=hardware.processes, run_id=run,
                        rdzv_backend="c10d", rdzv_endpoint=endpoint, rdzv_configs=settings, max_restarts=0, monitor_interval=0.2,
                        local_addr=address)


if __name__ == "__main__":
    sys.exit(main())
