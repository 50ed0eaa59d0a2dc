"""Runs that another run needs first (`stages`): what a config says of them. Imports no torch.

`stages` maps a name to settings, nested as in any config: `sft: {algo: sft, optim: {lr: 1e-5}}` is the run that the same command line
makes with `algo=sft optim.lr=1e-5`. Elsewhere `${stage:sft}` is that run's folder. How stages are composed and run: `launch/stages.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prefopt.errors import UserError, nearest

FOLDER = "stages"  # in the folder of the main run
REFERENCE = re.compile(r"\$\{\s*stage\s*:\s*(\w+)\s*\}")
PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE)  # text that Hydra's grammar reads as itself


def stage_folder(run_dir: str | Path, name: str) -> str:
    return f"{run_dir}/{FOLDER}/{name}"


OmegaConf.register_new_resolver("stage", lambda name, *, _root_: stage_folder(_root_.run_dir, name), replace=True)


def as_references(config: Any, run_dir: str | Path) -> Any:
    """Plain data in which folders of stages of the run in `run_dir` are `${stage:name}` again: it holds wherever the run is moved to."""
    if isinstance(config, dict):
        return {key: as_references(value, run_dir) for key, value in config.items()}
    if isinstance(config, list):
        return [as_references(value, run_dir) for value in config]
    if isinstance(config, str) and (match := re.fullmatch(re.escape(stage_folder(run_dir, "")) + r"(\w+)", config)):
        return f"${{stage:{match[1]}}}"
    return config


def without_stages(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose references are not resolved, without its stages, without the keys that hold the folder of one, and without blocks
    that held nothing else."""
    kept = {key: _without(value) for key, value in config.items() if key != "stages"}
    return {key: value for key, value in kept.items() if value or not config[key]}


def _without(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without(value) for key, value in config.items() if not (isinstance(value, str) and REFERENCE.search(value))}
    return [_without(value) for value in config] if isinstance(config, list) else config


def check_stages(given: dict[str, Any]) -> None:
    """Raises `UserError` for stages that are no settings, for one that nobody has the use of, and for references to others than there are.
    `given` is the config before its references are resolved."""
    stages = given.get("stages") or {}
    if not isinstance(stages, dict):
        raise UserError(f"stages={stages}: it maps names to settings, such as stages.sft.algo=sft; prefopt list stages has some to choose")
    used: set[str] = set()
    known: list[str] = []
    for name, settings in stages.items():
        if not re.fullmatch(r"\w+", str(name)):
            raise UserError(f"stages.{name}: the name of a stage has letters, digits and underscores only")
        if not isinstance(settings, dict) or not settings:
            raise UserError(f"stages.{name}={settings}: a stage has settings of its own, such as stages.{name}.algo=sft")
        if "stages" in settings:
            raise UserError(f"stages.{name}.stages={settings['stages']}: a stage has none of its own; run what it needs first")
        used |= _references(settings, known, f"stages.{name}.", "stages before it")
        known.append(name)
    used |= _references({key: value for key, value in given.items() if key != "stages"}, known, "", "stages")
    if unused := [name for name in stages if name not in used]:
        raise UserError(f"stages.{unused[0]} would be trained for nothing: no key holds ${{stage:{unused[0]}}}, its run; add stages=none")


def _references(config: Any, known: list[str], prefix: str, what: str) -> set[str]:
    found = set()
    for key, text in _leaves(config, prefix):
        for name in REFERENCE.findall(text) if isinstance(text, str) else ():
            if name not in known:
                there = nearest(name, known) if known else "; there are none"
                raise UserError(f"{key}={text}: there is no such stage among the {what}{there} (prefopt list stages)")
            found.add(name)
    return found


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping; entries of a list count as the list."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            for entry in value:
                yield from _leaves(entry, f"{prefix}{key}.") if isinstance(entry, dict) else [(f"{prefix}{key}", entry)]
        else:
            yield f"{prefix}{key}", value


def words(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings of a stage as one would type them; keys with ++, since not every config has each of them."""
    out = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        out += words(value, f"{name}.") if isinstance(value, dict) and value else [f"{'++' if '.' in name else ''}{name}={_value(value)}"]
    return out


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_value(entry)}' for key, entry in value.items())}}}"
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else quote(value) if isinstance(value, str) else str(value)


def quote(text: str) -> str:
    """Text as a quoted value of Hydra's grammar, in which backslashes count only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"
