"""`prefopt runs ls | show | verify | rm`: the runs in a folder, what became of them and whether their checkpoints are whole."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import UserError, nearest
from prefopt.evaluation.store import in_bytes
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.rundir import read_manifest, read_status

ACTIONS = ("ls", "show", "verify", "rm")
USAGE = "prefopt runs ls [FOLDER] | show RUN | verify FOLDER... | rm RUN... [--checkpoints]"
# A run writes at least at every evaluation; one that has been silent for so long has been killed.
SILENT = 600.0  # seconds
FIGURES = ("true_reward", "reward", "win_rate", "accuracy", "kl", "prompt_match", "loss")


def main(argv: Sequence[str]) -> None:
    """The command line. `verify` exits with 1 if a checkpoint is damaged."""
    action, rest = argv[0] if argv else "", list(argv[1:])
    if action not in ACTIONS:
        said = f"unknown command 'runs {action}'{nearest(action, ACTIONS)}" if action else "prefopt runs is no command of its own"
        raise UserError(f"{said} ({USAGE})")
    only = "--checkpoints" in rest and action == "rm"
    words = [word for word in rest if not (only and word == "--checkpoints")]
    if bad := next((word for word in words if word.startswith("-")), None):
        raise UserError(f"prefopt runs {action} does not know {bad} ({USAGE})")
    if action == "ls" and len(words) > 1 or action == "show" and len(words) != 1 or action in ("verify", "rm") and not words:
        raise UserError(f"prefopt runs {action} takes {'one folder' if action in ('ls', 'show') else 'folders'} ({USAGE})")
    if action == "ls":
        print(listing(Path(words[0] if words else "runs")))
    elif action == "show":
        print(about(_run(Path(words[0]))))
    elif action == "verify":
        _verify([run for word in words for run in runs_in(Path(word))])
    else:
        print("\n".join([remove(run, only) for run in [_run(Path(word)) for word in words]]))


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder and below it, the oldest first; a run is a folder with config.yaml and status.json. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder (looked from {Path.cwd()})")
    found = [f.parent for f in folder.rglob("status.json") if (f.parent / "config.yaml").is_file()]
    if not found:
        raise UserError(f"{folder} holds no run (no folder in it has config.yaml and status.json)")
    return sorted(found, key=lambda run: (run / "config.yaml").stat().st_mtime)


def _run(folder: Path) -> Path:
    if not (folder / "config.yaml").is_file() or not (folder / "status.json").is_file():
        beside = [p.parent.name for p in folder.parent.glob("*/status.json")] if folder.parent.is_dir() else []
        inside = f"; its runs are {folder}/*" if (folder / "sweep.json").is_file() else nearest(folder.name, beside)
        raise UserError(f"{folder} is no run (it lacks config.yaml or status.json){inside}")
    return folder


def listing(folder: Path) -> str:
    """One line for each run, the oldest first."""
    rows = [("run", "algo", "model", "data", "state", "step", "last figure", "size", "changed")]
    total = 0
    for run in runs_in(folder):
        config, status, size = _config(run), read_status(run), _bytes(run)
        total += size
        figures = last_figures(run)
        figure = next((f"{name} {figures[name]:.3g}" for name in FIGURES if name in figures), "")
        when, step = _date(_changed(run)), f"{status.get('step', 0)}/{status.get('total_steps', '?')}"
        rows.append((str(run.relative_to(folder)) if run != folder else run.name, _name(config, "algo"), _name(config, "model"),
                     _name(config, "data"), state_of(run), step, figure, in_bytes(size), when))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", f"{len(rows) - 1} runs, {in_bytes(total)} in {folder}"])


def about(run: Path) -> str:
    """What a run is, how far it is, what it was last judged at and what it keeps."""
    from prefopt.training.checkpoint import steps

    config, status, manifest, figures = _config(run), read_status(run), read_manifest(run), last_figures(run)
    message = f" ({status['message']})" if status.get("message") else ""
    lines = [
        f"run          {run}",
        f"command      {manifest.get('command', 'unknown')}",
        f"what         algo={_name(config, 'algo')} model={_name(config, 'model')} data={_name(config, 'data')} seed={config.get('seed')}",
        f"started      {manifest.get('started', 'unknown')}",
        f"state        {state_of(run)}{message}, step {status.get('step', 0)} of {status.get('total_steps', '?')}, "
        f"{status.get('seconds', 0):.0f} s",
        f"size         {in_bytes(_bytes(run))}",
    ]
    if figures:
        shown = ", ".join(f"{name} {figures[name]:.4g}" for name in FIGURES if name in figures)
        lines.append(f"last judged  step {figures['step']}: {shown}")
    for checkpoint in steps(run / "checkpoints"):
        lines.append(f"checkpoint   {checkpoint.name}, {in_bytes(_bytes(checkpoint))}, {_date(checkpoint.stat().st_mtime)}")
    return "\n".join([*lines, *(f"{name:<12} {run / file}" for name, file in (("report", "report.html"), ("model", "model"))
                                if (run / file).exists())])


def _verify(runs: list[Path]) -> None:
    from prefopt.training.checkpoint import problem, steps

    checked = [(path, problem(path)) for run in runs for path in steps(run / "checkpoints")]
    broken = [(path, why) for path, why in checked if why]
    for path, why in broken:
        print(f"damaged: {path} ({why})")
    if broken:
        print(f"{len(broken)} of {len(checked)} checkpoints are damaged; a run goes on from the newest whole one")
        raise SystemExit(1)
    print(f"{len(runs)} runs, {len(checked)} checkpoints, all as they were written")


def remove(run: Path, only_checkpoints: bool) -> str:
    """Removes a run's folder, or its checkpoints alone, and says what went. A run that is going on is refused (`UserError`)."""
    if state_of(run) == "running":
        raise UserError(f"{run} is running (it wrote something {time.time() - _changed(run):.0f} s ago); stop it first (Ctrl-C or SIGTERM)")
    target = run / "checkpoints" if only_checkpoints else run
    if not target.is_dir():
        return f"{run} has no checkpoints"
    size = _bytes(target)
    shutil.rmtree(target)
    return f"removed {target}, {in_bytes(size)}"


def state_of(run: Path) -> str:
    """The state of status.json; `killed` for a run that was running and has been silent since."""
    state = str(read_status(run).get("state", "unknown"))
    return "killed" if state == "running" and time.time() - _changed(run) > SILENT else state


def last_figures(run: Path) -> dict[str, Any]:
    """The finite numbers of the last evaluation, and its step; empty where there is none."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if row.get("split") == "eval"] if (run / "metrics.jsonl").is_file() else []
    return {k: v for k, v in rows[-1].items() if isinstance(v, (int, float)) and math.isfinite(v)} if rows else {}


def _config(run: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _name(config: dict[str, Any], part: str) -> str:
    block = config.get(part)
    return str(block.get("name", "?")) if isinstance(block, dict) else "?"


def _changed(run: Path) -> float:
    return max(f.stat().st_mtime for name in ("config.yaml", "status.json", "metrics.jsonl") if (f := run / name).is_file())


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
