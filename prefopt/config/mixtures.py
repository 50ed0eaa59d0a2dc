"""Objectives made of several (`prefopt.objectives.mixture`): what their parts are, and what they need together. Imports no torch."""

# What a mixture declares is said twice, here of descriptions and there of objects (`united`, `filled`, names): objectives import torch
# and nothing of prefopt, and composition imports no torch, so there is no module that both could import. A test compares the two.

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefopt.config.catalogue import VIEWS, groups, load_yaml
from prefopt.config.objective_source import ObjectiveInfo, read_objective
from prefopt.errors import UserError, nearest

EXAMPLE = "algo.parts=[{algo: dpo, weight: 0.8}, {algo: sft, weight: 0.2}]"
# The rows' view -> how else a part may read them.
ALSO = {"pairs": ("unary", "demonstrations"), "unary": ("demonstrations",)}
NOT_SETTINGS = ("_target_", "algo", "weight")


def described(algo: Mapping[str, Any], packages: Sequence[str] = ()) -> ObjectiveInfo:
    """The objective that the settings of a run's `algo` name; a mixture as its parts make it."""
    info = read_objective(str(algo.get("_target_")), packages)
    if not is_mixture(info):
        return info
    parts = expanded(algo.get("parts"))
    return united(info, parts, [read_objective(part["_target_"], packages) for part in parts])


def is_mixture(info: ObjectiveInfo) -> bool:
    return "parts" in info.fields


def expanded(parts: Any) -> list[dict[str, Any]]:
    """The parts with all that the files of their algorithms say: `{algo: dpo, weight: 0.8}` gets a `_target_` and every setting."""
    if not isinstance(parts, list) or not parts:
        raise UserError(f"algo.parts has no parts; it is a list of algorithms with weights, such as {EXAMPLE}")
    out = []
    for number, part in enumerate(parts, 1):
        where = f"part {number} of algo.parts"
        if not isinstance(part, dict):
            raise UserError(f"{where} is {part}; each part is an algorithm with its weight and settings, as in {EXAMPLE}")
        if "_target_" not in part:
            name = part.get("algo")
            if name not in groups()["algo"]:
                raise UserError(f"{where}: algo={name} does not exist{nearest(str(name).lower(), groups()['algo'])}")
            part = {**{key: value for key, value in load_yaml("algo", name).items() if key != "defaults"}, **part}
        part = {"weight": 1.0, **part}
        weight = part["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"{where}: weight={weight}: it must be a finite number")
        out.append(part)
    return out


def united(info: ObjectiveInfo, parts: Sequence[Mapping[str, Any]], infos: Sequence[ObjectiveInfo]) -> ObjectiveInfo:
    """The description of the mixture `info` of these parts, as `prefopt.objectives.mixture.united` makes it of the objects themselves.

    Raises `UserError` for parts that do not go together.
    """
    view = next(v for v in VIEWS if any(i.view == v for i in infos))
    own = [i for i in infos if i.view == view]
    quantities: dict[str, tuple[str, ...]] = {}
    for part, each in zip(parts, infos, strict=True):
        name = part.get("algo") or each.name
        if each.view != view and each.view not in ALSO.get(view, ()):
            raise UserError(f"algo.parts: {name} reads {VIEWS[each.view]}, and {own[0].name} {VIEWS[view]}: no rows are both")
        if why := _unfit(each, view):
            raise UserError(f"algo.parts: {name} {why}, which a mixture has not; train it by itself: algo={part.get('algo', '...')}")
        for scorer, wanted in each.quantities.items():
            quantities[scorer] = tuple(dict.fromkeys((*quantities.get(scorer, ()), *wanted)))
    further = [i for i in infos if i.extra] or infos[:1]
    if len(further) > 1:
        raise UserError(f"algo.parts: {further[0].name} and {further[1].name} both score extra sequences of each pair, and a mixture takes "
                        "those of one part")
    steps = {i.first_step for i in infos}
    formula = {f"{name}_{term}": f"{float(part['weight'])!r} * ({_filled(text, part, each)})"
               for name, part, each in zip(_names(parts), parts, infos, strict=True) for term, text in each.formula.items()}
    return replace(
        info, view=view, quantities=quantities, coupling="global" if any(i.coupling == "global" for i in infos) else "local",
        columns=tuple(c for c in own[0].columns if all(c in i.columns for i in own)), formula=formula,
        proper_likelihood=any(i.proper_likelihood for i in infos), mismatched=any(i.mismatched for i in infos),
        extra=further[0].extra, extra_scorers=further[0].extra_scorers,
        min_batch=max(i.min_batch for i in infos), starts_level=all(i.starts_level and i.needs_reference for i in infos),
        first_step=next(s for s in ("astray", "gap", "apart") if s in steps),
    )  # fmt: skip


def _unfit(info: ObjectiveInfo, view: str) -> str:
    """What an objective needs beyond log-probs of the rows' own replies under policy and reference; empty if nothing."""
    if is_mixture(info):
        return "is a mixture itself"
    if info.mismatched and info.view != view:
        return f"needs mismatched replies beside {VIEWS[view]}"
    if info.steps:
        return "needs more than the rows' own replies"
    known = {"policy": {"logp", "token_logp"}, "reference": {"logp", "token_logp"}}
    beyond = [f"{q} of the {s}" for s, wanted in info.quantities.items() for q in wanted if q not in known.get(s, ())]
    return f"reads {beyond[0]}" if beyond else ""


def _names(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the parts are called; a method that is there twice has a number the second time."""
    names = [part.get("algo") or part["_target_"].rpartition(".")[2].lower() for part in parts]
    bare = [name.rstrip("0123456789") for name in names]
    return [f"{name}{count + 1}" if (count := bare[:i].count(bare[i])) else name for i, name in enumerate(names)]


def _filled(formula: str, part: Mapping[str, Any], info: ObjectiveInfo) -> str:
    """A formula with the part's settings in the place of their names."""
    for name, field in info.fields.items():
        value = part.get(name, field.default)
        text = f"({value!r})" if isinstance(value, (int, float)) and value < 0 else repr(value)
        formula = re.sub(rf"\b{re.escape(name)}\b", lambda _, text=text: text, formula)
    return formula
