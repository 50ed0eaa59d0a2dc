"""Weights & Biases: the real client, online or offline, without what could carry a secret."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from prefopt.errors import UserError, nearest
from prefopt.tracking.redact import redact
from prefopt.tracking.trackers import is_image, numbers

MODES = ("online", "offline", "off")
SAMPLE_COLUMNS = ("step", "prompt", "before", "after", "reward")
ID_FILE = "wandb_id.txt"

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
    "program": "prefopt",  # else the path of the script
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
    """Rows as `train/<key>` or `eval/<key>` at the row's step. `sent` are (split, step) of rows that W&B has from an earlier start."""

    name = "W&B"

    def __init__(self, run: Any, sent: Set[tuple[str, int]] = frozenset()):
        self.run, self.sent = run, sent
        self.folder = Path(run.settings.sync_dir)
        self.url: str | None = None if run.offline else run.url
        self._next = run.starting_step  # the least W&B step that can still be written
        self._last = max((step for _, step in sent), default=0)
        run.define_metric("step", hidden=True)
        for metric in ("train/*", "eval/*", "samples", "images"):
            run.define_metric(metric, step_metric="step")

    def log(self, row: Mapping) -> None:
        if (row.get("split", "train"), row["step"]) not in self.sent:
            self._send(dict(numbers(row)), int(row["step"]))

    def log_samples(self, rows: Sequence[Mapping]) -> None:
        """A table of what the policy wrote before and after. A path to an image is shown as the image."""
        import wandb

        if not rows or ("eval", rows[0]["step"]) in self.sent:
            return
        table = wandb.Table(columns=list(SAMPLE_COLUMNS))
        for row in rows:
            table.add_data(*(_cell(row.get(column)) for column in SAMPLE_COLUMNS))
        self._send({"samples": table}, int(rows[0]["step"]))

    def log_images(self, step: int, images: Sequence[tuple[str, Path]]) -> None:
        import wandb

        if images and ("eval", step) not in self.sent:
            self._send({"images": [wandb.Image(str(path), caption=caption) for caption, path in images]}, step)

    def log_report(self, path: Path) -> None:
        import wandb

        html = wandb.Html(Path(path).read_text(encoding="utf-8"), inject=False, data_is_not_path=True)
        self._send({"report": html}, self._last)

    def _send(self, data: dict, step: int) -> None:
        """At W&B's own step = `step`, except behind what W&B has: its steps only go up, so such a row is put at the end. Charts are
        right all the same, because they are drawn over the metric `step`."""
        late = step < self._next
        at = self._next + 1 if late else step  # the row at _next is still open
        self._next, self._last = at + late, max(step, self._last)
        self.run.log({**data, "step": step}, step=at, commit=late)

    def close(self, state: str) -> None:
        self.run.finish(exit_code=0 if state == "finished" else 1)

    def abandon(self) -> None:
        atexit.register(_end_quietly)  # runs before W&B's own hook, and takes that back

    @property
    def advice(self) -> str:
        return f"To send what W&B has: {self.sync_command}"

    @property
    def sync_command(self) -> str:
        """Uploads all parts of the run: each start of an offline run writes one."""
        parts = shlex.quote(str(self.folder.parent)) + f"/*run-*-{self.run.id}*"
        return f"wandb sync {parts}"


def _end_quietly() -> None:
    """W&B's process may be dead; W&B's own hook would then end the program's output with a traceback."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _cell(value: Any) -> Any:
    import wandb

    return wandb.Image(str(value)) if is_image(value) else str(value) if isinstance(value, Path) else value


def wandb_labels(config: Mapping) -> dict[str, Any]:
    """Job type and tags by which W&B groups and filters: the method, the model, the data, the seed. W&B takes 64 letters for each."""
    algo = config["algo"]["name"]
    tags = [f"algo={algo}", f"model={config['model']['name']}", f"data={config['data']['name']}", f"seed={config['seed']}"]
    return {"job_type": redact(algo)[:64], "tags": [redact(tag)[:64] for tag in tags]}


def make_wandb(
    cfg: WandbConfig, run_dir: Path, config: dict, group: str | None, name: str, labels: Mapping = MappingProxyType({}),
    rows: Sequence[Mapping] = (),
) -> WandbTracker | None:
    """The tracker `cfg` asks for, or None when it is off. Online without a key or a server goes offline.

    `labels` are job type and tags (`wandb_labels`); `rows` those that an earlier start of this run has logged.
    """
    if cfg.mode not in MODES:
        raise UserError(f"tracker.mode: unknown mode '{cfg.mode}'{nearest(cfg.mode, MODES)}")
    if cfg.mode == "off":
        return None
    # Error reports go to W&B with tracebacks, and hold the exit for 10 s when there is no network.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    run_dir = Path(run_dir).resolve()
    known = (run_dir / ID_FILE).exists()  # else the earlier starts had no W&B
    sent = {(row.get("split", "train"), row["step"]) for row in rows if "step" in row} if known else set()
    run_id = _run_id(run_dir)
    wandb.setup(wandb.Settings(silent=True))  # logging in prints before it looks at a run's settings
    logging.getLogger("wandb").setLevel(logging.ERROR)  # its debug.log would name paths
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
                **labels,
                mode=mode,
                resume="allow",
                reinit="create_new",  # several runs of one process must not share a run
                settings=wandb.Settings(init_timeout=cfg.init_timeout, **_PRIVATE, **quiet),
            )
        return WandbTracker(run, sent)

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
        for folder in set((run_dir / "wandb").glob(f"run-*-{run_id}*")) - folders:
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
    path = run_dir / ID_FILE
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
