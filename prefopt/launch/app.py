"""The commands that take Hydra overrides. Hydra composes; `compose.typed` checks; then the command runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import shlex
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefopt.config.catalogue import GROUPS, groups
from prefopt.config.completion import OPTIONS
from prefopt.config.compose import rephrase, typed
from prefopt.config.schema import TrainConfig, config_of
from prefopt.config.stages import quote
from prefopt.data.fits import check_data
from prefopt.errors import UserError, nearest
from prefopt.launch import multirun
from prefopt.launch.commands import launch_text
from prefopt.launch.group import check_world, follow, is_worker, joined, leader, leading, settle
from prefopt.launch.local import join, run_here
from prefopt.launch.nodes import check_nodes, run_over_ssh, tidies_up
from prefopt.launch.slurm import SCRIPT, submit
from prefopt.launch.stages import run_stages, stages_of
from prefopt.launch.worker import config_from
from prefopt.tracking.redact import redact
from prefopt.tracking.trackers import check_trackers
from prefopt.training.deepspeed_json import check_zero
from prefopt.training.locks import check_free
from prefopt.training.rundir import claim, release


def run(command: str, words: list[str]) -> Any:
    """Runs `train`, `plan`, `launch`, `eval`, `sample`, `label` or `data_check` with the command line `words`; returns what the command
    returned. Under torchrun, accelerate or srun, rank 0 of `train` composes and the others do what it says."""
    group = joined()
    if command != "train" or not is_worker(group, words):
        return compose_and_run(command, words)
    settle(group)
    if group.rank > 0:
        return follow(lambda plain: join(config_from(plain)))
    with leading(group):
        return compose_and_run(command, words)


def compose_and_run(command: str, words: list[str]) -> Any:
    """One command in this process, with Hydra."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, and the sentence is ours
    version.setbase("1.3")
    OmegaConf.register_new_resolver("slug", _slug, replace=True)
    OmegaConf.register_new_resolver("output_dir", _output_dir, replace=True)
    _register_plugins()
    sys.argv = ["prefopt", *command.split("_"), *words]  # what the manifest shows, however this function was reached
    dry = command == "plan" and "--dry-run" in words
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    args = parse(parser, [word for word in words if not (dry and word == "--dry-run")])
    if args.multirun and command != "train":
        raise UserError(f"-m makes sweeps of prefopt train; run prefopt {' '.join(command.split('_'))} once for each")
    if args.multirun and (ahead := leader()):
        by = ahead.group.by
        raise UserError(f"-m starts the processes of each job itself, and {by} has started this one; run the sweep without {by}")
    result: list[Any] = []
    failed: list[BaseException] = []
    MADE.clear()

    def task(cfg: DictConfig) -> None:
        try:
            config = typed(cfg, command, HydraConfig.get().runtime.choices.get("algo"))
            result.append((dry_run if dry else TASKS[command])(config))
        except BaseException as error:  # Hydra would print its own line about it; it is raised again outside
            failed.append(error)

    try:
        _run_hydra(args=args, args_parser=parser, task_function=task, config_path="pkg://prefopt.conf", config_name=config_of(command))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(rephrase(error, args.overrides, command)) from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise UserError(f"the folder {error.filename} cannot be made ({error.strerror}); choose another hydra.run.dir") from error
        raise
    finally:
        remove_made()
    if failed:
        raise failed[0]
    return result[0] if result else None


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Hydra's options and overrides, in any order. Refuses what Hydra would take and prefopt cannot answer for."""
    words = ["--info=all" if w in ("--info", "-i") and "=" in "".join(words[i + 1 : i + 2]) else w for i, w in enumerate(words)]
    args = parser.parse_intermixed_args(words)
    if args.experimental_rerun:
        raise UserError("--experimental-rerun reads a pickle, which could run any code; repeat the command in the run's manifest.json")
    # These groups are in the defaults list, where Hydra refuses its own customary plus sign.
    args.overrides = [re.sub(r"^\+(adapter|transforms|experiment|sweep|debug)=", r"\1=", o) for o in args.overrides]
    # A question is free text: its commas, quotes and colons mean nothing to Hydra.
    args.overrides = [_quoted(o) if o.startswith("prompt=") else o for o in args.overrides]
    if not (args.multirun or args.cfg or any("hydra.mode=" in word for word in args.overrides)):
        if word := next((o for o in args.overrides if re.match(r"sweep=(?!null$|\[\]$)", o)), None):
            raise UserError(f"{word} names the jobs of a sweep: prefopt train -m {word}")
    for word in args.overrides:
        if re.match(r"[+~]*=", word):
            raise UserError(f"'{word}' names no key; write key=value, such as seed=1")
        if (match := re.match(r"(\w+)=[\[{]", word)) and match[1] in GROUPS and not _names(word):
            raise UserError(f"{word}: a group is chosen by name, such as {match[1]}={groups()[match[1]][0]} (prefopt list {match[1]})")
        if word.startswith("~") and (key := word[1:].partition("=")[0]) not in GROUPS and not key.startswith("hydra"):
            raise UserError(f"{word}: a key cannot be taken away, it would silently fall back to a default; set it: {key}=...")
        several = {"transforms", "experiment", "sweep", "debug"}
        if (match := re.match(r"(\w+)=\[([\w-]+)\b.*\]$", word)) and match[1] in set(GROUPS) - several:
            both = "; for both trackers: tracker=wandb tracker.tensorboard=true" if match[1] == "tracker" else ""
            raise UserError(f"{word}: Hydra would merge these into one, and the last would win; choose one: {match[1]}={match[2]}{both}")
    return args


def _names(word: str) -> bool:
    """Whether an override is a list of names, or nothing that Hydra can read, which it says itself."""
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:
        return True
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _quoted(word: str) -> str:
    key, _, text = word.partition("=")
    if text in ("", "null") or (len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"):
        return word
    return f"{key}={quote(text)}"


def refuse(message: str) -> NoReturn:
    """What argparse says about an option, in one sentence."""
    if match := re.search(r"unrecognized arguments: (.*)", message):
        word = match[1].split()[0]
        raise UserError(f"unknown option {word}{nearest(word, OPTIONS)}")
    raise UserError(re.sub(r"^argument (\S+?)(/-\w+)*:", r"\1:", message))


# Files and folders that Hydra or a command is about to make: those that stay empty are taken back.
MADE: list[Path] = []


def note(path: Path) -> None:
    MADE.extend(p for p in (path, *path.parents) if p not in MADE and not p.exists())


def remove_made() -> None:
    """A command that was refused leaves nothing behind, neither the folder of its run nor the folders above it."""
    for path in sorted(MADE, key=lambda p: -len(p.parts)):
        if path.name == "multirun.yaml" and not path.with_name("sweep.json").exists():
            path.unlink(missing_ok=True)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


class Folders(Callback):
    """Called by Hydra before it makes a folder (see `hydra.callbacks` in conf/train.yaml)."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        HydraConfig.instance().set_config(config)
        note(Path(config.hydra.run.dir).absolute())

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        HydraConfig.instance().set_config(config)
        note(Path(config.hydra.sweep.dir).absolute() / "multirun.yaml")


def _output_dir() -> str:
    """The run's folder. With --cfg there is no run yet, and it is the folder that one would have."""
    hydra = HydraConfig.get()
    return hydra.run.dir if OmegaConf.is_missing(hydra.runtime, "output_dir") else hydra.runtime.output_dir


def _slug(text: Any) -> str:
    """What names a job's folder behind its number. Names hold 255 bytes; a sweep may have more words, and the number tells jobs apart."""
    return re.sub(r"[^\w.,=+-]+", "_", redact(str(text))).encode()[:240].decode(errors="ignore")


def _register_plugins() -> None:
    """Hydra takes plugins from the namespace package hydra_plugins only; registering there by hand needs no second top-level package."""
    plugins = Plugins.instance()
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        namespace = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
    namespace.prefopt = sys.modules["hydra_plugins.prefopt"] = multirun
    for plugin in (multirun.JobLauncher, multirun.OptunaSweeper):
        plugin.__module__ = "hydra_plugins.prefopt"
        plugins.register(plugin)


def train(cfg: TrainConfig) -> dict[str, Any]:
    first = stages_of(cfg)
    for part in (*(stage.cfg for stage in first), cfg):
        check_data(part)
        check_trackers(part.tracker)
        check_zero(part)
        note(Path(part.run_dir).absolute())
    if ahead := leader():
        check_world(cfg.hardware, ahead.group)
    else:
        check_nodes(cfg, fixed_folder=_fixed_folder())
    folder, words = Path(cfg.run_dir), sys.argv[2:]
    if claim(cfg, cfg.algo["name"]) == "finished":
        print(f"{folder} is finished; choose another hydra.run.dir to run again", file=sys.stderr)
        return {"finished": True}
    if ahead or cfg.hardware.launcher != "local" or cfg.hardware.nodes == 1:  # else rank 0 may run, on another machine, what this one joins
        check_free(folder)
    submitted = False
    try:
        if cfg.hardware.launcher == "slurm":
            job, submitted = submit(cfg, words), True
            print(f"job {job} is in the queue: {folder / SCRIPT}; it writes to {folder / 'logs'}/slurm-{job}.log", file=sys.stderr)
            return {"submitted": job}
        if cfg.hardware.launcher == "ssh":
            if code := run_over_ssh(cfg, words):
                raise SystemExit(code)
            return {}
        return run_stages(first, cfg.run_dir) or run_here(cfg)
    finally:
        if not submitted and tidies_up(cfg.hardware):
            release(folder)


def launch(cfg: TrainConfig) -> None:
    print(launch_text(cfg, sys.argv[2:]))


def _fixed_folder() -> bool:
    """Whether the run folder is the same each time the command is run."""
    return "${now" not in str(OmegaConf.to_container(HydraConfig.get().run, resolve=False)["dir"])


def plan(cfg: TrainConfig) -> None:
    from prefopt.training.plan_text import plan_text

    first = stages_of(cfg)
    for part in (*(stage.cfg for stage in first), cfg):
        check_data(part)
    for stage in first:
        print(f"stage {stage.name}, which comes first: prefopt plan {shlex.join(stage.words)}\n\n{plan_text(stage.cfg)}\n")
    print(plan_text(cfg))


def dry_run(cfg: TrainConfig) -> None:
    """`prefopt plan --dry-run`: one step on processes that are not there, of each stage and of the run."""
    from prefopt.training.rehearsal import rehearsal_text

    first = stages_of(cfg)
    for part in (*(stage.cfg for stage in first), cfg):
        check_data(part)
        print(rehearsal_text(part))


def evaluate(cfg: Any) -> dict[str, Any]:
    from prefopt.evaluation.commands import evaluate

    return evaluate(cfg)


def sample(cfg: Any) -> None:
    from prefopt.evaluation.commands import sample

    return sample(cfg)


def label(cfg: Any) -> dict[str, Any]:
    from prefopt.evaluation.label import label

    return label(cfg)


def data_check(cfg: Any) -> None:
    from prefopt.evaluation.data_check import check_text

    print(check_text(cfg))


TASKS = {"train": train, "plan": plan, "launch": launch, "eval": evaluate, "sample": sample, "label": label, "data_check": data_check}
