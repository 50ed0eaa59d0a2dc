"""Runs the jobs of a sweep, several at once: each a process group of its own with its own folder, log and share of the machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError
from prefopt.launch.board import BEFORE, Board, Screen
from prefopt.launch.local import worker_command, worker_environment
from prefopt.launch.machine import Machine, Share
from prefopt.launch.stages import Stage
from prefopt.tracking.redact import redact
from prefopt.training.locks import hold
from prefopt.training.ranks import forget_records
from prefopt.training.rundir import claim, hide_secrets, read_status, release

OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|memory ran out|MemoryError|n(o|')t allocate memory|ALLOC_FAILED")


@dataclass(eq=False)
class Job:
    """A composed job and, while it runs, what it has of the machine and the process group it is in."""

    number: int
    overrides: list[str]
    cfg: TrainConfig
    first: Sequence[Stage] = ()
    share: Share | None = None
    group: int | None = None
    left: int | None = None  # the process group of an earlier start that may still run
    asked: str = ""  # what it was asked to end as: stopped or pruned
    why: str = ""
    label: str = ""  # the words that tell it from the others
    told: set[int] = field(default_factory=set)  # process groups that were sent SIGTERM

    def ask(self, end: str, why: str) -> None:
        """The job is to end, after its step and with a checkpoint."""
        self.asked, self.why = end, why


class Given:
    """Jobs that are known from the start, in their order."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = deque(jobs)

    def next(self) -> Job | None:
        return self.jobs.popleft() if self.jobs else None

    def look(self, job: Job) -> str:
        """Asked about each running job again and again: why it is to be pruned, or nothing."""
        return ""

    def ended(self, job: Job, state: str, message: str) -> tuple[str, str]:
        """What a job's end is recorded as."""
        return state, message


def run_jobs(queue: Given, board: Board, machine: Machine) -> int | None:
    """Runs until the queue has no more, or a signal came, which is then passed on to all jobs and returned."""
    running: dict[Future, Job] = {}
    screen, coming = Screen(board), None
    with ThreadPoolExecutor(max_workers=1024) as threads, signals() as came:
        try:
            while True:
                while not came and (not running or coming or _room(machine, running)):
                    coming = coming or queue.next()
                    if coming is None or not _start(coming, running, board, machine, screen, threads):
                        break
                    coming = None
                if not running:
                    break
                wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
                for job in running.values():
                    if came:
                        job.ask("stopped", "stopped by a signal; prefopt sweep resume goes on with it")
                    elif not job.asked and (why := queue.look(job)):
                        job.ask("pruned", why)
                    _tell(job, again=len(came) > 1)
                if len(came) > 1:
                    del came[1:]
                for future in [f for f in running if f.done()]:
                    job = running.pop(future)
                    state, message = queue.ended(job, *_result(future))
                    board.set(job.number, state, message, process="")
                    said = f" ({message.splitlines()[-1]})" if message else ""
                    screen.say(f"job {job.number + 1} {state} after {board.jobs[job.number]['seconds']:.0f} s{said}")
                for job in running.values():
                    if job.group and board.jobs[job.number].get("process") != place(job.group):
                        board.set(job.number, "running", process=place(job.group))
                screen.draw()
        except BaseException:
            while not all(future.done() for future in running):  # nothing runs on unseen
                for job in running.values():
                    job.ask("stopped", "the sweep ended early")
                    _tell(job)
                wait(running, timeout=0.3)
            for job in running.values():
                board.set(job.number, "stopped", job.why, process="")
            raise
    screen.close()
    return came[0] if came else None


def _room(machine: Machine, running: dict[Future, Job]) -> bool:
    """Whether another job like the last one could begin: what comes next may depend on those that run, so it is not asked for earlier."""
    last = list(running.values())[-1]
    return machine.share(last.cfg.hardware, [job.share for job in running.values()]) is not None


def _start(job: Job, running: dict[Future, Job], board: Board, machine: Machine, screen: Screen, threads: ThreadPoolExecutor) -> bool:
    job.share = machine.share(job.cfg.hardware, [other.share for other in running.values()])
    if job.share is None:
        return False
    board.set(job.number, "running", gpus=job.share.gpus)
    where = f" on GPU {','.join(job.share.gpus)}" if job.share.gpus else ""
    screen.say(f"job {job.number + 1} begins{where}: {redact(job.label) or 'no overrides'}")
    running[threads.submit(run_job, job)] = job
    return True


def _result(future: Future) -> tuple[str, str]:
    """(state, message); what a job could not even begin with is its own failure."""
    error = future.exception()
    return ("failed", f"{type(error).__name__}: {error}") if error else future.result()


def _tell(job: Job, again: bool = False) -> None:
    """SIGTERM to a job that was asked to end, once for each of its process groups; SIGINT, which ends it at once, if it is asked again."""
    if job.asked and job.group and (again or job.group not in job.told):
        number = signal.SIGINT if job.group in job.told else signal.SIGTERM
        job.told.add(job.group)
        with suppress(ProcessLookupError):
            os.killpg(job.group, number)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and a lost terminal, in the order in which they came. Jobs are in sessions of their own and get what is passed on."""
    came: list[int] = []
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]  # nohup means that a terminal may go
    old = {number: signal.signal(number, lambda n, frame: came.append(n)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---- one job, in a thread of its own ------------------------------------------------------------------


def run_job(job: Job) -> tuple[str, str]:
    """(state, message) of a job that has ended. As in `prefopt train`, its folder is claimed before the stages that come first are run:
    nothing is trained for a run that is there already, or cannot follow.
    """
    return _claimed(job, job.cfg, job.overrides, job.first)


def _claimed(job: Job, cfg: TrainConfig, words: list[str], first: Sequence[Stage]) -> tuple[str, str]:
    try:
        if claim(cfg, cfg.algo["name"]) == "finished":
            return "finished", BEFORE
    except UserError as error:
        return "failed", str(error)
    try:
        for stage in first:
            state, message = _claimed(job, stage.cfg, stage.words, ())
            if state != "finished":
                return state, f"stage {stage.name}: {message}"
        return run_apart(job, cfg, words)
    finally:
        release(Path(cfg.run_dir))


def run_apart(job: Job, cfg: TrainConfig, words: list[str]) -> tuple[str, str]:
    """(state, message) of a claimed run in processes of its own, whose output goes to log.txt in its folder."""
    folder = Path(cfg.run_dir)
    with open(folder / "log.txt", "ab") as log:
        _wait_for_others(job, log)
        finished = read_status(folder).get("state") == "finished"
        code = None if finished or job.asked else _run(job, cfg, words, log)
    hide_secrets(folder / "log.txt")
    if finished or code == 0:
        return "finished", ""
    if job.asked:
        return job.asked, job.why
    return _why(folder, code)


def _wait_for_others(job: Job, log: IO) -> None:
    """The processes of a sweep that was killed go on: the run is theirs until they end."""
    if hold(log):
        return
    where = f" (process group {job.left})" if job.left else ""
    print(f"job {job.number + 1}: what an earlier start of the sweep began still runs{where}; waiting for its end", file=sys.stderr)
    job.group = job.left
    while not hold(log):
        time.sleep(0.2)
    job.group = None


def _run(job: Job, cfg: TrainConfig, words: list[str], log: IO) -> int:
    """The exit code of the run's process group, of which nothing is left behind."""
    forget_records(Path(cfg.run_dir))
    process = subprocess.Popen(worker_command(cfg), env=environment(job, cfg, words), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                               start_new_session=True)
    job.group = process.pid
    try:
        return process.wait()
    finally:
        job.group = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _why(folder: Path, code: int) -> tuple[str, str]:
    """What became of a run that ended with this exit code, which is negative after a signal."""
    status = read_status(folder)
    said = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-20:]
    if status.get("state") == "stopped" and code in (130, 143):
        return "stopped", status["message"]
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "out of memory", "killed by SIGKILL, which is what the system does to a process when memory runs out"
    reason = status.get("message") if status.get("state") == "failed" else ""
    reason = reason or (said[-1] if said else "")
    memory = OUT_OF_MEMORY.search("\n".join([reason, *said]))
    return "out of memory" if memory else "failed", f"exit code {code}: {reason}"


def environment(job: Job, cfg: TrainConfig, words: list[str]) -> dict[str, str]:
    """A worker's environment, with the job's share of the machine."""
    env = worker_environment(cfg, ["train", *words])
    if job.share and job.share.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(job.share.gpus)
    if job.share and job.share.threads and "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(job.share.threads)
    return env


def place(group: int) -> str:
    """A process group, and the machine it is on."""
    return f"{socket.gethostname()}:{group}"


def left_of(recorded: str) -> int | None:
    """The process group that a board has recorded, if it is one of this machine."""
    host, _, group = recorded.rpartition(":")
    return int(group) if host == socket.gethostname() and group.isdigit() else None


def warn_if_shared(machine: Machine, jobs: Sequence[Job]) -> None:
    """Says so where more jobs run at once than there are GPUs for."""
    need = max((len(machine.share(job.cfg.hardware, []).gpus) for job in jobs), default=0)
    if need and machine.at_once and need * machine.at_once > len(machine.gpus):
        print(f"hydra.launcher.jobs={machine.at_once}: jobs share {len(machine.gpus)} GPU(s), whose memory must do for all of them",
              file=sys.stderr)
