"""Several machines: where they meet, the command for each, and ssh to all of them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prefopt.config.schema import HardwareConfig, TrainConfig
from prefopt.errors import UserError
from prefopt.tracking.redact import redact
from prefopt.training.signals import STOPS

PORT = 29400  # torch elastic's
# What the processes on other machines need of this one's environment, beside what they have of their own. Sent over stdin, never as words.
PASSED = re.compile(r"(PREFOPT|HF|HUGGING_FACE|TRANSFORMERS|DIFFUSERS|WANDB|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|NCCL|GLOO|OMP|MKL|DS|"
                    r"DEEPSPEED|TOKENIZERS)_\w+|PATH|PYTHONPATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|HTTPS?_PROXY|https?_proxy|no_proxy|NO_PROXY")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[ipv6]:port`. Raises `UserError`."""
    match = re.fullmatch(r"\[?([^\[\]]+?)\]?:(\d{1,5})", address)
    if not match or not 0 < int(match[2]) < 65536:
        raise UserError(f"hardware.rendezvous={address} is no host:port; give the name of one of the machines and a free port on it, such "
                        f"as hardware.rendezvous=node-1:{PORT}")
    return match[1], int(match[2])


def can_listen(host: str, port: int = 0) -> bool:
    """Whether `host` is this machine, and the port is free (0: whether it is this machine)."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        return False
    with socket.socket(family, kind) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError:
            return False
    return True


def address_towards(host: str) -> str:
    """This machine's address on the network that leads to `host`. Nothing is sent. Raises `UserError` if the name is unknown."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"hardware.rendezvous: {host} cannot be found from this machine ({error.strerror or error}); give a name or an "
                        "address that all machines know") from error


def interface_of(address: str) -> str | None:
    """The network interface that has an address."""
    import psutil

    return next((name for name, all_of_it in psutil.net_if_addrs().items() if any(a.address == address for a in all_of_it)), None)


def check_nodes(cfg: TrainConfig, fixed_folder: bool) -> None:
    """Raises `UserError` for a run that this machine could not start its part of."""
    hardware = cfg.hardware
    if hardware.launcher != "local" or hardware.nodes == 1:
        return
    if hardware.rendezvous is None:
        raise UserError(f"hardware={hardware.name} wants {hardware.nodes} machines and does not say where they meet; run the command on "
                        f"each of them with hardware.rendezvous=HOST:{PORT}, HOST being one of them (prefopt launch --print hardware="
                        f"{hardware.name} prints it), or set hardware.launcher=ssh or slurm")
    split_address(hardware.rendezvous)
    if not fixed_folder:
        raise UserError("hydra.run.dir has a time in its name, which would differ between the machines; give the same folder on each, on a "
                        "file system that they share: hydra.run.dir=/shared/runs/mine")


def tidies_up(hardware: HardwareConfig) -> bool:
    """Whether this is the machine that takes a claim back when nothing began: of several, the one where they meet."""
    return hardware.nodes == 1 or hardware.rendezvous is None or can_listen(split_address(hardware.rendezvous)[0])


def check_job(hardware: HardwareConfig) -> None:
    """Raises `UserError` for a job of a sweep that wants more than this machine."""
    if hardware.launcher != "local" or hardware.nodes > 1:
        raise UserError(f"the jobs of a sweep run on this machine, and hardware={hardware.name} is for others (hardware.launcher="
                        f"{hardware.launcher}, hardware.nodes={hardware.nodes}); choose hardware of one machine, or run prefopt train once "
                        "for each job")


def read_hostfile(hardware: HardwareConfig) -> list[str]:
    """The first `nodes` machines of the hostfile. Raises `UserError` with file and line."""
    if hardware.hostfile is None:
        raise UserError("hardware.launcher=ssh needs a list of machines, one a line; name the file: hardware.hostfile=...")
    try:
        lines = Path(hardware.hostfile).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hardware.hostfile={hardware.hostfile} cannot be read ({getattr(error, 'strerror', None) or error}); it is a text "
                        "file with a line per machine: its name and maybe slots=N") from error
    hosts: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(r"([\w.@:-]+)(?: slots=(\d+))?", " ".join(words))
        if not match or match[1].startswith("-"):
            raise UserError(f"{hardware.hostfile} line {number}: {line.strip()!r} is no machine; write its name and maybe slots=N")
        if match[1] in hosts:
            raise UserError(f"{hardware.hostfile} line {number}: {match[1]} is there twice; one line per machine")
        if match[2] and int(match[2]) < hardware.processes:
            raise UserError(f"{hardware.hostfile} line {number}: {match[1]} has slots={match[2]} and hardware.processes="
                            f"{hardware.processes} are to run there; set hardware.processes={match[2]}, or remove the line")
        hosts.append(match[1])
    if len(hosts) < hardware.nodes:
        raise UserError(f"{hardware.hostfile} names {len(hosts)} machines and hardware.nodes={hardware.nodes}; add machines or set "
                        f"hardware.nodes={len(hosts)}")
    return hosts[: hardware.nodes]


def node_words(cfg: TrainConfig, words: Sequence[str], rendezvous: str | None) -> list[str]:
    """The overrides with which each machine runs its part: what the user typed, and what has to be equal everywhere."""
    for word in words:
        if redact(word) != word:
            raise UserError(f"{word.partition('=')[0]} seems to hold a secret, which other users of a machine would see on its command "
                            "line; put it into the environment")
    own = [w for w in words if not re.match(r"[+]*(hydra\.run\.dir|hardware\.(launcher|rendezvous)|resume)=", w)]
    meets = [f"hardware.rendezvous={rendezvous}"] if rendezvous else []
    launcher = ["hardware.launcher=local"] if cfg.hardware.launcher != "local" else []
    resume = ["resume=auto"] if cfg.resume != "auto" and cfg.hardware.launcher != "local" else []  # its folder was claimed before
    return [*own, f"hydra.run.dir={Path(cfg.run_dir).absolute()}", *launcher, *meets, *resume]


def ssh_rendezvous(hosts: Sequence[str], hardware: HardwareConfig) -> str | None:
    return hardware.rendezvous or (f"{hosts[0].rpartition('@')[2]}:{PORT}" if len(hosts) > 1 else None)


def ssh_command(host: str) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", host, "bash -s"]


def remote_script(words: Sequence[str], environment: dict[str, str]) -> str:
    """What a machine's shell reads from ssh: it runs the command, sends it the signals that are named on the lines that follow, and ends it
    when the connection is closed."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
    command = shlex.join([sys.executable, "-m", "prefopt.cli", "train", *words])
    return "\n".join([
        "{", f"cd {shlex.quote(os.getcwd())} || exit 2", *lines, "exec 3<&0", f"{command} < /dev/null 3<&- &", "pid=$!",
        '(while read -r name <&3; do kill -"$name" "$pid"; done; kill -TERM "$pid") 2> /dev/null &', "listener=$!",
        'wait "$pid"', "code=$?", 'kill "$listener" 2> /dev/null', 'exit "$code"', "}", "",
    ])


def passed_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if PASSED.fullmatch(name)}


@dataclass
class Remote:
    """One machine's part of a run."""

    host: str
    process: subprocess.Popen
    reader: threading.Thread


def run_over_ssh(cfg: TrainConfig, words: Sequence[str]) -> int:
    """Runs the command on every machine of the hostfile and passes on what they print, each line with the machine's name. When one fails,
    the others are ended. Returns the exit code of the first that failed."""
    hosts = read_hostfile(cfg.hardware)
    script = remote_script(node_words(cfg, words, ssh_rendezvous(hosts, cfg.hardware)), passed_environment())
    remotes = [_start(host, script) for host in hosts]
    came: list[int] = []

    def ask(number: int, frame: object) -> None:
        came.append(number)
        for remote in remotes:
            _tell(remote, signal.Signals(number).name.removeprefix("SIG"))

    old = {number: signal.signal(number, ask) for number in STOPS}
    first: tuple[str, int] | None = None
    try:
        since = None
        while any(r.process.poll() is None for r in remotes):
            time.sleep(0.2)
            if first is None and (ended := next((r for r in remotes if r.process.poll()), None)):
                first, since = (ended.host, ended.process.returncode), time.monotonic()
            if since and not came and time.monotonic() - since > 60:  # its processes see that one is gone, and say what they know of it
                for remote in remotes:
                    _tell(remote, "TERM")
                since = float("inf")
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for remote in remotes:
            with suppress(OSError):
                remote.process.stdin.close()
            remote.reader.join(5)
    if first is None:
        return 0
    if first[1] == 255:
        print(f"prefopt: ssh to {first[0]} failed; try `ssh -o BatchMode=yes {first[0]} true`", file=sys.stderr)
    return first[1] if first[1] > 0 else 128 - first[1]


def _start(host: str, script: str) -> Remote:
    try:
        process = subprocess.Popen(ssh_command(host), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    except FileNotFoundError as error:
        raise UserError("there is no ssh on this machine; install it, or use hardware.launcher=local on each machine") from error
    with suppress(BrokenPipeError):  # it has said why, and ends
        process.stdin.write(script.encode())
        process.stdin.flush()
    reader = threading.Thread(target=_pass_on, args=(host, process.stdout), daemon=True)
    reader.start()
    return Remote(host, process, reader)


def _tell(remote: Remote, name: str) -> None:
    with suppress(OSError, ValueError):
        remote.process.stdin.write(f"{name}\n".encode())
        remote.process.stdin.flush()


def _pass_on(host: str, stream: IO[bytes]) -> None:
    for line in stream:
        print(f"{host}| {line.decode(errors='replace').rstrip()}", file=sys.stderr, flush=True)
