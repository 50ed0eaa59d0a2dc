"""From a composed Hydra config to a typed one, or to a sentence that says what is wrong and what to do. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigKeyError, ConfigTypeError, InterpolationKeyError, OmegaConfBaseException, ValidationError

from prefopt.config.catalogue import groups
from prefopt.config.objective_source import ObjectiveInfo, read_objective
from prefopt.config.schema import BOUNDS, CHOICES, COMMANDS
from prefopt.errors import UserError, nearest


def typed(cfg: DictConfig, command: str, algo_name: str | None = None) -> Any:
    """The dataclass of `command` filled from `cfg`. Unknown keys, wrong types, values out of range and combinations that cannot work
    raise `UserError`."""
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for key in ("hydra",):
        plain.pop(key, None)
    schema = COMMANDS[command]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        OmegaConf.resolve(merged)
        out = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = error.full_key or str(error)
        raise UserError(f"{key} has no value; give it one: {key}=...") from error
    except InterpolationKeyError as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from error
    except (ConfigKeyError, ConfigTypeError) as error:
        raise UserError(_unknown_key(error, schema)) from error
    except (ValidationError, OmegaConfBaseException) as error:
        raise UserError(f"{error.full_key or 'config'}: {_first_line(error)}") from error
    _ranges(out)
    if hasattr(out, "algo"):
        info = check_algo(out.algo, out.trust.packages, algo_name)
        out.algo = {"name": algo_name or info.name, **out.algo}
        check_together(out, info)
    return out


def check_algo(settings: dict[str, Any], packages: list[str], algo_name: str | None) -> ObjectiveInfo:
    """The objective's description; its settings are checked against the class's fields, types and rules."""
    target = settings.get("_target_")
    if not isinstance(target, str):
        raise UserError(f"algo{f'={algo_name}' if algo_name else ''} names no class; its YAML needs a line `_target_: package.module.Class`")
    info = read_objective(target, packages)
    for key, value in settings.items():
        if key in ("_target_", "name"):
            continue
        if key not in info.fields:
            raise UserError(f"algo.{key} is no setting of {info.name}{nearest(key, info.fields)}")
        expected = info.fields[key].type
        fits = {"float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
                "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
                "bool": lambda v: isinstance(v, bool), "str": lambda v: isinstance(v, str)}.get(expected, lambda v: True)
        if not fits(value):
            raise UserError(f"algo.{key}={value!r}: {info.name}.{key} is a {expected}")
    values = {name: settings.get(name, field.default) for name, field in info.fields.items()}
    for rule in info.require:
        if not eval(rule, {"__builtins__": {}}, values):  # rules are constants of classes in allowed packages
            shown = ", ".join(f"algo.{n}={values[n]}" for n in re.findall(r"[A-Za-z_]\w*", rule) if n in values)
            raise UserError(f"{shown}: {info.name} needs {rule}")
    return info


def check_together(cfg: Any, info: ObjectiveInfo) -> None:
    """Combinations that each group would accept alone."""
    model, data = cfg.model, cfg.data
    if (model.kind == "tabular") != (data.source == "bandit"):
        raise UserError(f"model={model.name} and data={data.name} do not fit: the table of model=bandit only knows data=bandit, and the other "
                        "way round. Set both, or neither.")
    if data.source not in ("tiny_feedback", "bandit") and data.label_noise:
        raise UserError(f"data.label_noise={data.label_noise} works on generated data only (tiny-feedback, bandit); remove it for data={data.name}")
    if data.source != "tiny_feedback" and data.length_bias:
        raise UserError(f"data.length_bias={data.length_bias} works on data=tiny-feedback only; remove it for data={data.name}")
    if model.lora.adapter and not model.lora.enabled:
        raise UserError("model.lora.adapter is set but model.lora.enabled is false; set model.lora.enabled=true")
    if model.kind == "tabular" and model.lora.enabled:
        raise UserError("model=bandit is a table and takes no LoRA adapter; set model.lora.enabled=false")
    if not hasattr(cfg, "hardware"):
        return
    if cfg.reference.policy == "base" and not model.lora.enabled:
        raise UserError("reference.policy=base is the model without its adapter, and there is none; use reference.policy=initial, or a LoRA model")
    if cfg.train.batch_size < info.min_batch:
        raise UserError(f"train.batch_size={cfg.train.batch_size}: {info.name} needs at least {info.min_batch} rows per step")
    if model.attention == "flash_attention_2" and (cfg.hardware.device == "cpu" or cfg.hardware.precision == "fp32"):
        raise UserError("model.attention=flash_attention_2 needs a GPU and hardware.precision=bf16; use model.attention=sdpa")


def rephrase(error: Exception) -> str:
    """One sentence for an error of Hydra's own composition."""
    text, cause = str(error), str(error.__cause__ or "")
    if match := re.search(r"Could not (?:find|load) '?([\w-]+)/([\w./-]+)'?", text):
        group, name = match.groups()
        known = groups()
        if group in known:
            return f"there is no {group}={name}{nearest(name, known[group])}"
    if match := re.search(r"Could not override '(?:[^@']*@)?([^']+)'", text):
        key = match.group(1)
        if key in groups():
            return f"the group {key} is not part of this command"
        return f"unknown key or group '{key}'{nearest_key(key)}"
    if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text + "\n" + cause):
        key = match.group(2)
        return f"unknown key '{key}'{nearest_key(key)}"
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{match.group(1)} exists already; write {match.group(1)}=... without the +"
    lines = [line.strip() for line in (text + "\n" + cause).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key", "object_type", "See https"))]
    return " ".join(dict.fromkeys(lines[:4]))


def nearest_key(key: str) -> str:
    """A hint for a mistyped key of `prefopt train`, searched where the user was looking first."""
    known = all_keys(COMMANDS["train"])
    parent, _, leaf = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    if parent and siblings:
        hint = nearest(leaf, siblings)
        return hint.replace("'", f"'{parent}.", 1) if "did you mean" in hint else hint
    return nearest(key, [*known, *groups()])


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """Full names of all keys of a dataclass tree."""
    out = []
    for f in fields(schema):
        out.append(prefix + f.name)
        nested = f.default_factory if f.default_factory is not MISSING else None
        if isinstance(nested, type) and is_dataclass(nested):
            out += all_keys(nested, f"{prefix}{f.name}.")
    return out


def _unknown_key(error: OmegaConfBaseException, schema: type) -> str:
    key = error.full_key or str(error.key)
    parent, _, leaf = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in all_keys(schema) if k.rpartition(".")[0] == parent]
    if leaf in siblings:
        return f"{key}: {_first_line(error)}"
    hint = nearest(leaf, siblings)
    return f"unknown key '{key}'{hint.replace(chr(39), f'{chr(39)}{parent}.', 1) if parent and 'did you mean' in hint else hint}"


def _ranges(cfg: Any) -> None:
    for key, allowed in CHOICES.items():
        if (value := _dig(cfg, key)) is not _ABSENT and value not in allowed:
            raise UserError(f"{key}={value} is none of {', '.join(allowed)}{_close(str(value), allowed)}")
    for key, test, what in BOUNDS:
        value = _dig(cfg, key)
        if value is not _ABSENT and not eval(test, {"__builtins__": {}, "len": len, "all": all}, {"x": value}):
            raise UserError(f"{key}={value}: it must be {what}")


_ABSENT = object()


def _dig(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = getattr(cfg, part, _ABSENT)
    return cfg


def _close(value: str, allowed: tuple[str, ...]) -> str:
    hint = nearest(value, allowed)
    return hint if "did you mean" in hint else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
