"""`prefopt sweep status | resume`: how a sweep stands, and going on with it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.config.stages import quote
from prefopt.errors import UserError, nearest
from prefopt.launch.board import DONE, FAILED, FILE, counts, standing, table
from prefopt.launch.multirun import COMMAND
from prefopt.launch.optuna_sweeper import BEST
from prefopt.tracking.redact import REDACTED
from prefopt.training.locks import locked

ACTIONS = ("status", "resume")
USAGE = "prefopt sweep status FOLDER | resume FOLDER [--only-unfinished] [overrides]"
ONLY = "--only-unfinished"


def main(argv: Sequence[str]) -> Any:
    """The command line."""
    action, rest = argv[0] if argv else "", list(argv[1:])
    if action not in ACTIONS:
        said = f"unknown command 'sweep {action}'{nearest(action, ACTIONS)}" if action else "prefopt sweep is no command of its own"
        raise UserError(f"{said} ({USAGE})")
    known = (ONLY,) if action == "resume" else ()
    if bad := next((word for word in rest if word.startswith("-") and word not in known), None):
        raise UserError(f"prefopt sweep {action} does not know {bad}{nearest(bad, known)} ({USAGE})")
    folders = [word for word in rest if word not in known and ("=" not in word or Path(word).is_dir())]
    words = [word for word in rest if word not in known and word not in folders]
    if len(folders) != 1 or (words and action == "status"):
        raise UserError(f"prefopt sweep {action} takes one folder ({USAGE})")
    if action == "status":
        print(status_text(Path(folders[0])))
        return None
    return resume(Path(folders[0]), words, ONLY in rest)


def status_text(sweep: Path) -> str:
    """The table of the jobs as they stand now, what is known of the sweep as a whole, and what to do next."""
    jobs = standing(sweep)
    lines = [table(jobs, [job["seconds"] for job in jobs], None, 300, sweep), "", f"{len(jobs)} jobs: {counts(jobs)}"]
    if (best := sweep / BEST).is_file():
        about = json.loads(best.read_text(encoding="utf-8"))
        lines.append(f"best: {about['metric']}={about['value']:.6g} (job {about['job']}, {about['run_dir']})")
    if locked(sweep / ".lock"):
        lines.append("the sweep is running")
    elif any(job["state"] not in DONE for job in jobs):
        left = " looks after the jobs that run, and" if any(job["state"] == "running" for job in jobs) else ""
        failed = f"; with {ONLY} it leaves failed jobs alone" if any(job["state"] in FAILED for job in jobs) else ""
        lines.append(f"no process runs the sweep: prefopt sweep resume {sweep}{left} goes on with it{failed}")
    return "\n".join(lines)


def resume(sweep: Path, words: Sequence[str], only_unfinished: bool) -> Any:
    """Runs the command of the sweep again, in the folder it was typed in; what has finished is left alone. `words` take the place of those
    that set the same key: values that were not kept because they are secret, or settings of launcher, hardware and tracker.
    """
    from prefopt.launch.app import run

    if not (sweep / FILE).is_file():
        raise UserError(f"{sweep} is no sweep (there is no {FILE} in it; prefopt train -m writes one)")
    try:
        command = json.loads((sweep / COMMAND).read_text(encoding="utf-8"))
        typed, folder = list(command["words"]), Path(command["folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{sweep / COMMAND} cannot be read ({error}); repeat the command of the sweep with hydra.sweep.dir={sweep} "
                        "instead") from error
    words = [f"hydra.launcher.retry_failed={str(not only_unfinished).lower()}", *words]
    here = sweep.absolute()
    if folder.is_dir() and REDACTED not in str(folder):
        os.chdir(folder)  # paths among the words mean what they meant
    place = os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here)
    line = replaced(typed, [*words, f"hydra.sweep.dir={quote(place)}"])
    if hidden := [word for word in line if REDACTED in word]:
        key = hidden[0].partition("=")[0]
        raise UserError(f"{key} held a secret when the sweep began, and secrets are not kept; give it again: prefopt sweep resume {sweep} "
                        f"{key}=...")
    return run("train", line)


def replaced(line: Sequence[str], words: Sequence[str]) -> list[str]:
    """A command line in which `words` take the places of those that set the same keys; new ones come last."""
    new = {_key(word): word for word in words}
    kept = [new.pop(_key(word), word) if "=" in word and not word.startswith("--") else word for word in line]
    return [*kept, *new.values()]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
