"""Data transforms: what is done to the training rows after they are read and before they are tokenised, one small step after another.

`data.transforms` maps a name to settings; `kind` among them says which transform it is, and may be left out where the name does.
They run in the order in which they stand, on the training rows; a few kinds change held-out rows as well. `transform_kinds` has the kinds.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from prefopt.config.schema import DataConfig
from prefopt.data import picture_transforms  # noqa: F401  it registers its kinds
from prefopt.data.records import Example
from prefopt.data.sources import Split
from prefopt.data.transform_kinds import KINDS, Job, Kind, Tools
from prefopt.errors import UserError, nearest

__all__ = ["Tools", "apply_transforms", "check_transforms", "transform_lines"]


LEFT_OUT = "not applied, nor are those after it: it needs a model, which this command does not load"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(v is None or _is_number(v) for v in value):
        return False
    return None in value or value[0] <= value[1]


# Annotations of settings: what a value must be, and the test.
TYPES = {
    "float": ("a finite number", _is_number),
    "int": ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "str": ("text", lambda v: isinstance(v, str)),
    "Range": ("two numbers [low, high], either of them null where it is open", _is_range),
}


def check_transforms(cfg: DataConfig, with_models: bool = True) -> None:
    """Raises `UserError` for kinds and settings that do not exist, and for values that they cannot have. Reads no data.

    Without models (`prefopt data check`, `plan`) those that need one may lack settings: a run of its own would fill them in.
    """
    for name, settings in cfg.transforms.items():
        key, given = f"data.transforms.{name}", dict(settings or {})
        kind = given.pop("kind", name)
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(f"{key}: there is no data transform of the kind {kind}{nearest(str(kind), KINDS)}")
        known = _settings(KINDS[kind])
        for setting, value in given.items():
            if setting not in known:
                raise UserError(f"{key}.{setting} is no setting of the transform {kind}{nearest(setting, known, f'{key}.')}")
            kinds = str(known[setting].annotation).split(" | ")
            what, fits = TYPES[kinds[0]]
            if not (value is None and "None" in kinds) and not (value is not None and fits(value)):
                missing = value is None and known[setting].default is inspect.Parameter.empty
                raise UserError(f"{key}.{setting} has no value; give it one: {key}.{setting}=..." if missing else
                                f"{key}.{setting}={value}: it must be {what}{', or null' if 'None' in kinds else ''}")
        if not with_models and KINDS[kind].needs_model(given):
            continue
        values = {setting: given.get(setting, p.default) for setting, p in known.items()}
        if lacking := [setting for setting, value in values.items() if value is inspect.Parameter.empty]:
            raise UserError(f"{key}.{lacking[0]} has no value; give it one: +{key}.{lacking[0]}=...")
        for rule in KINDS[kind].rules:
            if not eval(rule, {"__builtins__": {}}, values):  # rules are constants of this package
                shown = ", ".join(f"{s}={v}" for s, v in values.items() if s in rule.replace("(", " ").split())
                raise UserError(f"{key}: {shown}: the transform {kind} needs {rule}")


def _settings(kind: Kind) -> dict[str, inspect.Parameter]:
    return {n: p for n, p in inspect.signature(kind.run).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _steps(cfg: DataConfig, with_models: bool) -> Iterator[tuple[str, str, Kind, dict[str, Any]]]:
    """(name, kind's name, kind, settings) in order."""
    check_transforms(cfg, with_models)
    for name, settings in cfg.transforms.items():
        given = dict(settings or {})
        kind = given.pop("kind", name)
        yield name, kind, KINDS[kind], given


def apply_transforms(splits: Sequence[Split], cfg: DataConfig, seed: int, tools: Tools | None = None) -> None:
    """Replaces the examples of each split by what `cfg.transforms` make of them, and notes in `split.transforms` what each has done.

    Where a transform needs a model and there are no `tools`, it and those after it are left out, and the note says so. Raises `UserError`
    for rows that a transform cannot read, and where it leaves no training row.
    """
    for split in splits:
        held_out = split.name == "eval"
        for name, kind_name, kind, settings in _steps(cfg, tools is not None):
            if (held_out and not kind.held_out) or not split.examples:
                continue
            note = {"name": name, "kind": kind_name, "rows_in": len(split.examples)}
            if kind.needs_model(settings) and tools is None:
                split.transforms.append({**note, "left_out": LEFT_OUT})
                break
            job = Job(name, cfg, random.Random(f"transform {name} {seed}"), tools or Tools(), held_out)
            split.examples = _run(kind, split.examples, job, settings)
            changed = {what: count for what, count in job.counts.items() if count}
            split.transforms.append({**note, "rows_out": len(split.examples), "changed": changed})
            if not split.examples:
                said = "; ".join(f"{count} {what}" for what, count in changed.items())
                raise UserError(f"data.transforms.{name} leaves none of {note['rows_in']} training rows" + (f" ({said})" if said else ""))


def _run(kind: Kind, examples: list[Example], job: Job, settings: dict[str, Any]) -> list[Example]:
    """Held-out rows that a transform does not read stay as they are: it gives one row for each of the others."""
    fits = [not kind.reads or e.kind in kind.reads for e in examples]
    if not job.held_out:
        if not all(fits):
            other = examples[fits.index(False)]
            hint = "; put the transform `pairs` before it" if other.kind == "ranking" else ""
            raise job.refuse(other, f"reads {' and '.join(f'{k}s' for k in kind.reads)}, and this is a {other.kind} row{hint}")
        return kind.run(examples, job, **settings)
    if not any(fits):
        return examples
    made = iter(kind.run([e for e, fit in zip(examples, fits, strict=True) if fit], job, **settings))
    return [next(made) if fit else e for e, fit in zip(examples, fits, strict=True)]


def transform_lines(split: Split) -> list[tuple[str, str]]:
    """(name, what it did) of each transform of a split, for people."""
    lines = []
    for note in split.transforms:
        if "left_out" in note:
            lines.append((note["name"], note["left_out"]))
            continue
        changed = ", ".join(f"{count} {what}" for what, count in note["changed"].items())
        lines.append((note["name"], f"{note['rows_in']} rows -> {note['rows_out']}" + (f"; {changed}" if changed else "")))
    return lines
