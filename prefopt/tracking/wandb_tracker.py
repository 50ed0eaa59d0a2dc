"""Weights & Biases: the real client, online or offline, without what could carry a secret."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from prefopt.errors import UserError, nearest
from prefopt.tracking.redact import redact

MODES = ("online", "offline", "off")
SAMPLE_COLUMNS = ("step", "prompt", "before", "after", "reward")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# The manifest already holds versions, hardware and git state, with the secrets taken out.
_PRIVATE = {
    "x_disable_meta": True,  # argv, program, executable, working directory
    "x_disable_machine_info": True,  # the same and the hardware, also through the system probe
    "x_disable_stats": True,
    "x_save_requirements": False,
    "disable_git": True,  # a remote's URL may hold a token
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
    "label_disable": True,  # would read the main script
    "host": "",  # kept in the run record whatever the switches above say
    "username": "",
    "email": "",
    "console": "off",
}
_QUIET = {
    "silent": True,
    "x_transaction_log_flush_interval": 1.0,  # what a kill may cost, instead of 15 s
    "symlink": False,  # a link to the latest run breaks when a run directory is copied
    "sagemaker_disable": True,
    "finish_timeout": 120.0,  # a lost network must not hold a finished run for ever
    "finish_timeout_raises": True,
}


class WandbConfig(Protocol):
    mode: str
    project: str
    entity: str | None
    init_timeout: float


class WandbTracker:
    """Rows as `train/<key>` or `eval/<key>` (by the row's `split`, else train) at the row's step."""

    def __init__(self, run: Any):
        self.run = run
        self.folder = Path(run.settings.sync_dir)
        self.url: str | None = None if run.offline else run.url
        self._step = run.starting_step  # 0, or what follows the last step the server has
        self._broken = False
        run.define_metric("step", hidden=True)
        for split in ("train", "eval"):
            run.define_metric(f"{split}/*", step_metric="step")

    def log(self, row: Mapping) -> None:
        split = row.get("split", "train")
        numbers = {}
        for key, value in row.items():
            value = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(value, (int, float)) and key != "step":
                numbers[key if key.startswith(("train/", "eval/")) else f"{split}/{key}"] = value
        self._send(numbers, int(row["step"]))

    def log_samples(self, rows: Sequence[Mapping]) -> None:
        """A table of what the policy wrote before and after. A path to an image is shown as the image."""
        import wandb

        if not rows:
            return
        table = wandb.Table(columns=list(SAMPLE_COLUMNS))
        for row in rows:
            table.add_data(*(_cell(row.get(column)) for column in SAMPLE_COLUMNS))
        self._send({"samples": table}, max(int(row["step"]) for row in rows))

    def log_report(self, path: Path) -> None:
        import wandb

        html = wandb.Html(Path(path).read_text(encoding="utf-8"), inject=False, data_is_not_path=True)
        self._send({"report": html}, self._step)

    def _send(self, data: dict, step: int) -> None:
        # W&B steps only go up. What lies behind is there already: a run resumed from an earlier
        # checkpoint repeats it.
        if step < self._step or self._broken:
            return
        self._step = step
        self._guard(lambda: self.run.log({**data, "step": step}, step=step))

    def close(self) -> None:
        if not self._broken:
            self._guard(self.run.finish)

    def _guard(self, call: Callable[[], Any]) -> None:
        """A W&B process that dies or an upload that hangs must not take the training run with it."""
        try:
            call()
        except Exception as e:
            self._broken = True
            reason = redact(" ".join(f"{type(e).__name__} {e}".split()))
            print(
                f"W&B logging has stopped ({reason}); metrics.jsonl is complete. To send what W&B has: "
                f"{self.sync_command}",
                file=sys.stderr,
            )

    @property
    def sync_command(self) -> str:
        return f"wandb sync {shlex.quote(str(self.folder))}"


def _cell(value: Any) -> Any:
    import wandb

    if isinstance(value, Path) and value.suffix.lower() in IMAGE_SUFFIXES:
        return wandb.Image(str(value))
    return str(value) if isinstance(value, Path) else value


def make_wandb(
    cfg: WandbConfig, run_dir: Path, config: dict, group: str | None, name: str
) -> WandbTracker | None:
    """The tracker `cfg` asks for, or None when it is off. Online without a key or a server goes offline."""
    if cfg.mode not in MODES:
        raise UserError(f"tracker.mode: unknown mode '{cfg.mode}'{nearest(cfg.mode, MODES)}")
    if cfg.mode == "off":
        return None
    # Error reports go to W&B with tracebacks, and hold the exit for 10 s when there is no network.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            "tracker.mode: the package 'wandb' is not installed; `pip install wandb`, or set tracker.mode=off"
        ) from None

    run_dir = Path(run_dir).resolve()
    run_id = _run_id(run_dir)
    wandb.setup(wandb.Settings(silent=True))  # logging in prints before it looks at a run's settings
    quiet = {k: v for k, v in _QUIET.items() if k in wandb.Settings.model_fields}  # some are recent

    def start(mode: str) -> WandbTracker:
        with _no_prompt():
            run = wandb.init(
                project=cfg.project,
                entity=cfg.entity,
                dir=str(run_dir),
                id=run_id,
                name=redact(name),
                group=redact(group),
                config=redact(config),
                mode=mode,
                resume="allow",
                reinit="create_new",  # several runs of one process must not share a run
                settings=wandb.Settings(init_timeout=cfg.init_timeout, **_PRIVATE, **quiet),
            )
        return WandbTracker(run)

    def start_offline() -> WandbTracker:
        try:
            return start("offline")
        except wandb.Error as e:  # nothing is left to fall back to, so it is a setting
            raise UserError(f"tracker: W&B refuses to start: {redact(str(e))}") from None

    if cfg.mode == "offline":
        return start_offline()
    folders = set((run_dir / "wandb").glob("run-*"))
    try:
        return start("online")
    except wandb.Error as e:  # UsageError: no key. CommError: no network, or a key that is refused.
        wandb.teardown()  # the service holds on to the id of the failed attempt
        for folder in set((run_dir / "wandb").glob(f"run-*-{run_id}")) - folders:
            shutil.rmtree(folder, ignore_errors=True)  # the attempt holds no data, and would be synced too
        tracker = start_offline()
        reason = redact(" ".join(str(e).split()))
        print(
            f"W&B is not reachable ({reason}); this run is logged offline. To send it later: "
            f"{tracker.sync_command}",
            file=sys.stderr,
        )
        return tracker


def _run_id(run_dir: Path) -> str:
    """The run's W&B id, drawn once and kept, so that a resumed run goes on as the same W&B run."""
    path = run_dir / "wandb_id.txt"
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    run_dir.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n")
    return run_id


@contextlib.contextmanager
def _no_prompt() -> Iterator[None]:
    """Without a terminal on stdin the client raises UsageError where it would ask for a key."""
    stdin = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = stdin
