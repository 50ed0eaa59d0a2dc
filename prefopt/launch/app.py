"""The commands that take Hydra overrides. Hydra composes; `compose.typed` checks; then the command runs."""

from __future__ import annotations

import importlib
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefopt.config.compose import rephrase, typed
from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError
from prefopt.launch import multirun
from prefopt.launch.local import run_here
from prefopt.training.rundir import claim


def run(command: str, overrides: list[str]) -> Any:
    """Runs `train`, `eval`, `sample` or `data_check` with Hydra's command line `overrides`; returns what the command returned."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, and the sentence is ours
    OmegaConf.register_new_resolver("slug", lambda text: re.sub(r"[^\w.,=+-]+", "_", str(text)), replace=True)
    _register_launcher()
    result: list[Any] = []
    failed: list[BaseException] = []

    def task(cfg: DictConfig) -> None:
        try:
            config = typed(cfg, command, HydraConfig.get().runtime.choices.get("algo"))
            result.append(TASKS[command](config))
        except BaseException as error:  # Hydra would print its own line about it; it is raised again outside
            remove_empty(Path(HydraConfig.get().runtime.output_dir))
            failed.append(error)

    # These groups are in the defaults list, where Hydra refuses its own customary plus sign.
    overrides = [re.sub(r"^\+(experiment|sweep|debug)=", r"\1=", o) for o in overrides]
    sys.argv = [f"prefopt {command}", *overrides]
    try:
        hydra.main(version_base="1.3", config_path="pkg://prefopt.conf", config_name=command)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(rephrase(error)) from error
    if failed:
        raise failed[0]
    return result[0] if result else None


def _register_launcher() -> None:
    """Hydra takes plugins from the namespace package hydra_plugins only; registering there by hand needs no second top-level package."""
    plugins = Plugins.instance()
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        namespace = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
    namespace.prefopt = sys.modules["hydra_plugins.prefopt"] = multirun
    multirun.JobLauncher.__module__ = "hydra_plugins.prefopt"
    plugins.register(multirun.JobLauncher)


def remove_empty(folder: Path) -> None:
    """Hydra makes the output folder before a command can refuse; an empty one is taken back."""
    while folder != Path.cwd() and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def train(cfg: TrainConfig) -> dict[str, Any]:
    if claim(cfg, cfg.algo["name"]) == "finished":
        print(f"{cfg.run_dir} is finished; choose another hydra.run.dir to run again", file=sys.stderr)
        return {"finished": True}
    return run_here(cfg)


def evaluate(cfg: Any) -> dict[str, Any]:
    from prefopt.evaluation.commands import evaluate

    return evaluate(cfg)


def sample(cfg: Any) -> None:
    from prefopt.evaluation.commands import sample

    return sample(cfg)


def data_check(cfg: Any) -> None:
    from prefopt.data.check import check_text

    print(check_text(cfg))


TASKS = {"train": train, "eval": evaluate, "sample": sample, "data_check": data_check}
