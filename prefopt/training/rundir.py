"""The run folder: what belongs to it, whether it may be used, and the manifest of what made it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from prefopt.config.schema import TrainConfig
from prefopt.config.stages import FOLDER, as_references
from prefopt.config.strength import with_number
from prefopt.errors import UserError, nearest
from prefopt.tracking.redact import redact
from prefopt.training.locks import FILE as LOCK
from prefopt.training.locks import locked

# Keys that may change between the first start and a resume: they decide where and how a run goes, not what it computes.
NOT_IDENTITY = ("run_dir", "resume", "tracker", "hardware", "reference.store", "reference.store_limit_gb")
# Written before a run begins: a sweep's log of a job, logs of processes, what SLURM is given, finished stages, a killed one's lock.
LEFT = ("log.txt", "logs", "job.sh", FOLDER, LOCK)
PACKAGES = ("prefopt", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "hydra-core", "omegaconf", "wandb")


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that a resumed run must share."""
    blocks = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    return {k: {n: x for n, x in v.items() if f"{k}.{n}" not in NOT_IDENTITY} if isinstance(v, dict) else v for k, v in blocks.items()}


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two configs differ."""
    out = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            out += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            out.append(f"{prefix}{key}: {left} -> {right}")
    return out


def claim(cfg: TrainConfig, algo_name: str) -> str:
    """Makes the folder this run's own: 'fresh', 'resume' or 'finished'. Writes config.yaml on a fresh start.

    Raises `UserError` if the folder holds another run, or files that are none.
    """
    folder, config = Path(cfg.run_dir), redact(plain_config(cfg, algo_name))
    known = folder / "config.yaml"
    if known.is_file():
        old = _read_config(known)
        if changed := differences(identity(old), identity(config)):
            raise UserError(
                f"{folder} belongs to a run with another config ({'; '.join(changed[:5])}{'; ...' if len(changed) > 5 else ''}). "
                "Choose another hydra.run.dir, or repeat the command that began it."
            )
        if cfg.resume == "never":
            raise UserError(f"{folder} already holds this run and resume=never; choose another hydra.run.dir or set resume=auto")
        # The page is written last: a run that was killed before it goes on from its last checkpoint, and writes it.
        return "finished" if read_status(folder).get("state") == "finished" and (folder / "report.html").is_file() else "resume"
    # What a run may leave that never began, temporary files of a killed one, and what another machine is writing for the same run just now.
    if folder.is_dir() and (foreign := sorted(f.name for f in folder.iterdir() if f.name not in LEFT and f.suffix != ".part")):
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(f"{folder} is not empty and holds no run of prefopt (it has {shown}); choose another hydra.run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    # The machines of a run claim it at once, and write the same.
    write_atomic(known, yaml.safe_dump(config, sort_keys=False, allow_unicode=True), f".{uuid.uuid4().hex}")
    return "fresh"


def release(folder: Path) -> None:
    """Takes back what a run that never began has written, so that a corrected command can have the folder."""
    if not (folder / "status.json").exists() and not locked(folder / LOCK):
        for name in ("config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "wandb_id.txt"):
            (folder / name).unlink(missing_ok=True)
        for pattern in ("events.out.tfevents.*", ".*.part"):
            for file in folder.glob(pattern):
                file.unlink()
        shutil.rmtree(folder / "wandb", ignore_errors=True)


def plain_config(cfg: TrainConfig, algo_name: str) -> dict[str, Any]:
    """The resolved config as plain data, with the algorithm's name beside its settings."""
    config = asdict(cfg)
    config["algo"] = {"name": algo_name, **{k: v for k, v in config["algo"].items() if k != "name"}}
    return as_references(config, cfg.run_dir)


def load_run_config(folder: Path) -> TrainConfig:
    """The config of an existing run folder."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from prefopt.config.compose import check_algo
    from prefopt.config.filled import filled

    known = folder / "config.yaml"
    if not known.is_file():
        beside = [p.parent.name for p in folder.parent.glob("*/config.yaml")] if folder.parent.is_dir() else []
        raise UserError(f"{folder} holds no run (there is no config.yaml in it){nearest(folder.name, beside)}")
    try:
        cfg = filled(TrainConfig, _read_config(known))
    except OmegaConfBaseException as error:
        raise UserError(f"{known} is no config of this version of prefopt ({str(error).splitlines()[0]})") from error
    cfg.run_dir = str(folder)
    out = OmegaConf.to_object(cfg)
    check_algo(with_number(out.algo), out.trust.packages, out.algo.get("name"))  # the folder may be made or edited by others
    return out


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no keys")
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({said}); choose another folder, or put the run's own config.yaml back") from error
    return config


def write_status(folder: Path, state: str, step: int, total: int, seconds: float, message: str = "", speed: dict | None = None,
                 times: dict | None = None) -> None:
    """One small JSON file that says how far the run is, how fast it was on average, and where each process spent its time."""
    status = {"state": state, "step": step, "total_steps": total, "seconds": round(seconds, 3), "message": redact(message),
              "speed": speed or {}, "times": times or {}}
    write_atomic(folder / "status.json", json.dumps(status, indent=2))


def read_status(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "status.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def manifest(cfg: TrainConfig, about: dict[str, Any]) -> dict[str, Any]:
    """Versions, machine and inputs: what somebody needs to judge or repeat the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return redact({
        # A worker's own command line says nothing; its parent passes on what the user typed.
        "command": shlex.join(["prefopt", *(json.loads(os.environ.get("PREFOPT_ARGV", "[]")) or sys.argv[1:])]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git": _git(),
        **({"stages": {name: {"run": f"{FOLDER}/{name}", "settings": s} for name, s in cfg.stages.items()}} if cfg.stages else {}),
        **about,
    })


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a run that goes on has written when it began; empty for a fresh one."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_atomic(path: Path, text: str, writer: str = "") -> None:
    """Writes under a temporary name and renames, so that no reader sees half a file. Several writers at once need a name each."""
    part = path.with_name(f".{path.name}{writer}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write names no file of its own accord
    finally:
        part.unlink(missing_ok=True)


def hide_secrets(file: Path) -> None:
    """Takes what looks like a secret out of a text file that was written by others."""
    if file.exists() and (clean := redact(text := file.read_text(errors="replace"))) != text:
        write_atomic(file, clean)


def _git() -> dict[str, Any] | None:
    def ask(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
