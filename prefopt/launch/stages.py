"""Runs that another run needs first: composed and checked with it, before anything is trained, and run in its folder, one after the other.

A stage is the same command line with the stage's settings (`stages.NAME`) in place of what it says of them. It is a run like any other, in
RUN/stages/NAME: it can be resumed, evaluated and sampled from, and it is left alone once it has finished.
"""

from __future__ import annotations

import gc
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefopt.config.compose import rephrase, typed
from prefopt.config.schema import TrainConfig
from prefopt.config.stages import REFERENCE, quote, stage_folder, without_stages, words
from prefopt.errors import RunFailed, UserError
from prefopt.launch.local import run_here
from prefopt.training.rundir import claim, release


@dataclass
class Stage:
    """A run that comes first. `words` are the command line that makes it."""

    name: str
    words: list[str]
    cfg: TrainConfig


def stages_of(cfg: TrainConfig) -> list[Stage]:
    """The stages of a run that Hydra has just composed, in their order. Raises `UserError` for one that could not be run."""
    made = []
    for name, settings in cfg.stages.items():
        try:
            made.append(_compose(cfg, name, words(settings)))
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from error
    return made


def _compose(cfg: TrainConfig, name: str, own: list[str]) -> Stage:
    hydra, run_dir = HydraConfig.get(), stage_folder(cfg.run_dir, name)
    given, of_hydra = (OmegaConf.to_container(part, resolve=False) for part in (hydra.overrides.task, hydra.overrides.hydra))
    given = [word for word in given if not REFERENCE.search(word)]  # what the main run takes from its stages
    settled = {_key(word) for word in own} | {"stages", "run_dir"}
    if "algo" in settled:  # settings that mean something to the main run's algorithm only
        chosen = "transforms" not in settled and any(_key(word) == "transforms" for word in given)
        settled |= {"teacher"} if chosen else {"teacher", "data.transforms"}
    kept = [word for word in given if not any(_key(word) == key or _key(word).startswith(f"{key}.") for key in settled)]
    typed_words = [*(word for word in of_hydra if _key(word) == "hydra.searchpath"), *kept, *own]
    line = [*typed_words, f"run_dir={quote(run_dir)}"]
    try:
        composed = GlobalHydra.instance().config_loader().load_configuration(hydra.job.config_name, line, RunMode.RUN)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(rephrase(error, line, "train")) from error
    algo = composed.hydra.runtime.choices.algo
    plain = OmegaConf.to_container(composed, resolve=False)
    plain.pop("hydra")
    # An experiment that brings stages brings them to its stages as well, where they mean nothing.
    if not set(plain.get("stages") or {}) <= set(cfg.stages):
        raise UserError(f"algo={algo} has stages of its own ({', '.join(plain['stages'])}), and a stage can have none; run it first")
    return Stage(name, [*typed_words, f"hydra.run.dir={quote(run_dir)}"], typed(OmegaConf.create(without_stages(plain)), "train", algo))


def _key(word: str) -> str:
    return re.match(r"[+~]*([^=@]*)", word)[1]


def run_stages(stages: Sequence[Stage], run_dir: str) -> dict[str, Any] | None:
    """Runs those that have not finished. Returns what a stage that was stopped by a signal returned, else None."""
    for stage in stages:
        folder = Path(stage.cfg.run_dir)
        if claim(stage.cfg, stage.cfg.algo["name"]) == "finished":
            print(f"stage {stage.name}: had finished before, in {folder}", file=sys.stderr)
            continue
        print(f"stage {stage.name}: prefopt train {shlex.join(stage.words)}", file=sys.stderr)
        typed_line, sys.argv = sys.argv, ["prefopt", "train", *stage.words]  # what the manifest of the stage shows
        goes_on = f"stage {stage.name} was stopped; the command of the main run, with hydra.run.dir={run_dir}, goes on with it"
        try:
            result = run_here(stage.cfg)
        except (UserError, RunFailed) as error:
            raise type(error)(f"stage {stage.name}: {error}") from error
        except (SystemExit, KeyboardInterrupt) as error:  # of its worker processes, or a second Ctrl-C
            print(goes_on if getattr(error, "code", 130) in (130, 143) else f"stage {stage.name} failed", file=sys.stderr)
            raise
        finally:
            sys.argv = typed_line
            release(folder)
        if "stopped" in result:
            print(goes_on, file=sys.stderr)
            return result
        _free()
    return None


def _free() -> None:
    """What a stage held in memory: a model's parts point at each other."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
