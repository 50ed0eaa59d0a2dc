"""`prefopt launch --print`: what `prefopt train` would start, machine by machine. Starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from prefopt.config.schema import TrainConfig
from prefopt.launch.nodes import (
    PORT,
    node_words,
    passed_environment,
    read_hostfile,
    remote_script,
    split_address,
    ssh_command,
    ssh_rendezvous,
)
from prefopt.launch.slurm import SCRIPT, job_script


def launch_text(cfg: TrainConfig, words: Sequence[str]) -> str:
    """The commands of a run, with comments, as a shell would take them. Values of the environment are not shown: some are secret."""
    hardware = cfg.hardware
    workers = f"{hardware.processes} worker process{'es' if hardware.processes > 1 else ''}"
    if hardware.launcher == "slurm":
        return f"# sbatch {Path(cfg.run_dir).absolute() / SCRIPT}, which holds:\n{job_script(cfg, words, Path.cwd())}".rstrip()
    if hardware.launcher == "ssh":
        hosts = read_hostfile(hardware)
        remote = node_words(cfg, words, ssh_rendezvous(hosts, hardware))
        script = remote_script(remote, dict.fromkeys(passed_environment(), "..."))
        each = "\n".join(f"cat script - | {shlex.join(ssh_command(host))}" for host in hosts)  # the end of stdin ends the run
        return f"# on each of {len(hosts)} machines, {workers}\n{each}\n# script:\n{script}".rstrip()
    if hardware.nodes == 1:
        start = f"# on this machine, {workers}" if hardware.processes > 1 else "# on this machine, in one process"
        joins = ["torchrun", "--standalone", f"--nproc-per-node={hardware.processes}", "--no-python", "prefopt", "train", *words]
        other = f"\n# or as part of what torchrun starts\n{shlex.join(joins)}" if hardware.processes > 1 else ""
        return f"{start}\n{shlex.join(['prefopt', 'train', *words])}{other}"
    meets = hardware.rendezvous or f"HOST:{PORT}"
    split_address(meets)
    hint = "" if hardware.rendezvous else "; HOST is the name of one of them, which all of them know"
    command = shlex.join(["prefopt", "train", *node_words(cfg, words, meets)])
    return f"# on each of {hardware.nodes} machines, {workers}{hint}; the folder is one that they share\n{command}"
