"""A process that torchrun, accelerate or srun has started beside others joins them: rank 0 composes the config, the others receive it."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from prefopt.config.schema import HardwareConfig, TrainConfig
from prefopt.errors import RunFailed, UserError

CONFIG_ENV, ARGV_ENV = "PREFOPT_CONFIG", "PREFOPT_ARGV"
AGENT_ENV = "PREFOPT_AGENT"  # set where prefopt itself started the workers
COMPOSING = timedelta(minutes=30)  # how long the others wait for rank 0 to compose, or to run what comes first


@dataclass(frozen=True)
class Group:
    """The processes that this one was started with."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    by: str  # who started them, for messages


def joined(env: Mapping[str, str] = os.environ) -> Group | None:
    """The group that the environment tells of; None for a process of its own."""
    if AGENT_ENV in env:
        return None
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(env) and int(env["WORLD_SIZE"]) > 1:
        world = int(env["WORLD_SIZE"])
        return Group(int(env["RANK"]), int(env["LOCAL_RANK"]), world, int(env.get("LOCAL_WORLD_SIZE", world)), "torchrun")
    if {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"} <= set(env) and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        world = int(env["SLURM_STEP_NUM_TASKS"])
        nodes = int(env.get("SLURM_STEP_NUM_NODES", 1))
        return Group(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), world, world // nodes, "srun")
    return None


def is_worker(group: Group | None, words: list[str]) -> bool:
    """Whether this process is a worker of `group`. srun may also have started one process per node, each of which starts its workers and
    meets the others at hardware.rendezvous."""
    given = any(re.match(r"[+]*hardware\.rendezvous=(?!null$)", word) for word in words)
    return group is not None and not (group.by == "srun" and group.local_world == 1 and given)


def settle(group: Group) -> None:
    """Puts where the group meets into the environment, as torchrun does; of srun it is made of the job's nodes and number."""
    if group.by != "srun":
        return
    env, job = os.environ, int(os.environ.get("SLURM_JOB_ID", 0))
    env |= {"RANK": str(group.rank), "LOCAL_RANK": str(group.local_rank), "WORLD_SIZE": str(group.world),
            "LOCAL_WORLD_SIZE": str(group.local_world)}
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "localhost")))
    env.setdefault("MASTER_PORT", str(20000 + (job * 37 + int(env["SLURM_STEP_ID"])) % 20000))


def first_host(nodes: str) -> str:
    """The first of SLURM's nodes: gpu-01 of gpu-[01-04,07],login."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def check_world(hardware: HardwareConfig, group: Group) -> None:
    """Raises `UserError` where the config asks for other processes than were started."""
    if hardware.launcher != "local":
        raise UserError(f"hardware.launcher={hardware.launcher} starts processes itself, and {group.by} has started this one; set "
                        f"hardware.launcher=local, or run prefopt train without {group.by}")
    if (hardware.nodes, hardware.processes) != (group.world // group.local_world, group.local_world):
        raise UserError(
            f"{group.by} started {group.world} processes, {group.local_world} on each machine, and hardware={hardware.name} asks for "
            f"{hardware.processes} on each of {hardware.nodes}; set hardware.nodes={group.world // group.local_world} "
            f"hardware.processes={group.local_world}, or run prefopt train without {group.by}"
        )


@cache
def store() -> Any:
    """The key-value store of the group, where its process group will meet as well."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=COMPOSING))[0]


class Leader:
    """Rank 0 of a group that was joined: tells the others what to run."""

    def __init__(self, group: Group):
        self.group, self.said = group, 0

    def tell(self, message: dict[str, Any]) -> None:
        store().set(f"prefopt/{self.said}", json.dumps(message))
        self.said += 1

    def run(self, cfg: TrainConfig) -> None:
        self.tell({"config": asdict(cfg)})

    def end(self, code: int) -> None:
        ran = self.said > 0
        self.tell({"end": code})
        deadline = time.monotonic() + 5
        # The store may live in this process. After a failure the others do not ask any more.
        while not (ran and code) and store().add("prefopt/ended", 0) < self.group.world - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


_leader: Leader | None = None


def leader() -> Leader | None:
    """The leader that this process is; None where it has joined nobody."""
    return _leader


@contextmanager
def leading(group: Group) -> Iterator[None]:
    """As rank 0: the others run what `leader()` is told, and end when this ends."""
    global _leader
    _leader, code = Leader(group), 1
    try:
        yield
        code = 0
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else getattr(error, "exit_code", 1)
        raise
    finally:
        _leader.end(code)
        _leader = None


def follow(work: Callable[[dict[str, Any]], Any]) -> None:
    """On the other ranks: `work(config)` for each run that rank 0 tells of. Exits as rank 0 did."""
    number = 0
    while True:
        try:
            message = json.loads(store().get(f"prefopt/{number}"))
        except RuntimeError as error:  # torch's DistError
            raise RunFailed("rank 0 ended before it had said what to run; what it printed says why") from error
        if "end" in message:
            store().add("prefopt/ended", 1)
            if message["end"]:
                raise SystemExit(message["end"])
            return
        work(message["config"])
        number += 1


def same_folder(folder: Path, rank: int, patience: float = 20.0) -> None:
    """Raises `UserError` on a node that does not see the run folder of rank 0."""
    mark = folder / "logs" / "shared"
    if rank == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(nonce := uuid.uuid4().hex)
        store().set(f"prefopt/folder/{folder}", nonce)
        return
    nonce = store().get(f"prefopt/folder/{folder}").decode()
    deadline = time.monotonic() + patience  # network file systems show a new file a little later
    while not (mark.is_file() and mark.read_text() == nonce):
        if time.monotonic() > deadline:
            raise UserError(f"{folder.absolute()} here is not the folder that rank 0 writes to; hydra.run.dir must be on a file system "
                            "that all machines share, under the same name")
        time.sleep(0.2)
