"""From a composed Hydra config to a typed one, or to a sentence that says what is wrong and what to do. Imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, MissingMandatoryValue, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prefopt.config.catalogue import VIEWS, groups, modalities
from prefopt.config.completion import primary_groups
from prefopt.config.doctor import require_bitsandbytes
from prefopt.config.drawing import check_negative, check_noise
from prefopt.config.filled import filled
from prefopt.config.hardware import check_hardware
from prefopt.config.mixtures import described, expanded, is_mixture
from prefopt.config.noise import BY_A_MODEL
from prefopt.config.objective_source import ObjectiveInfo, read_objective
from prefopt.config.rounds import JUDGES, check_picture_rewards, check_refresh, check_rounds
from prefopt.config.schema import BOUNDS, CHOICES, COMMANDS, PICTURE_REWARDS, REQUIRED, all_keys, nested
from prefopt.config.stages import check_stages, without_stages
from prefopt.config.strength import for_model, with_number
from prefopt.config.trajectories import check_trajectories
from prefopt.config.users import check_users
from prefopt.errors import UserError, nearest


def typed(cfg: DictConfig, command: str, algo_name: str | None = None) -> Any:
    """The dataclass of `command` filled from `cfg`. Raises `UserError` for unknown keys, wrong values, combinations that cannot work."""
    given, schema = OmegaConf.to_container(cfg, resolve=False), COMMANDS[command]
    given.pop("hydra", None)
    if not any(f.name == "stages" for f in fields(schema)):
        given = without_stages(given)
    _check_keys(given, schema, dotted(given))
    check_stages(given)
    try:
        merged = filled(schema, given)
        OmegaConf.resolve(merged)
        out = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = error.full_key or str(error)
        raise UserError(f"{key} has no value; give it one: {key}=...") from error
    except OmegaConfBaseException as error:
        raise UserError(_wrong_value(error, given, OmegaConf.create(given))) from error
    _ranges(out)
    if hasattr(out, "reward"):
        check_picture_rewards(out)
        _check_reward(out)
    if hasattr(out, "sampler") and out.sampler.beams > 1 and (out.sampler.temperature, out.sampler.top_p) != (0, 1):
        raise UserError(f"sampler.beams={out.sampler.beams} is a search for the most likely reply, and sampler.temperature="
                        f"{out.sampler.temperature:g} draws one; set sampler.temperature=0 sampler.top_p=1 (sampler=r_to_q does)")
    if hasattr(out, "data"):
        _check_data(out.data, command)
    if hasattr(out, "algo"):
        out.algo = for_model(out.algo, out.model)
        checked = with_number(out.algo)
        info = check_algo(checked, out.trust.packages, algo_name)
        if checked is not out.algo:
            _check_auto(out, info)
        out.algo = {"name": algo_name or info.name, **out.algo}
        check_together(out, info)
    return out


def _check_data(data: Any, command: str) -> None:
    """What can be said of the data without reading it. The kinds of transforms and their settings: prefopt.data.transforms."""
    if data.source not in ("tiny_feedback", "tiny_pictures") and data.completions:
        raise UserError(f"data.completions={data.completions} works on data=tiny-feedback and data=tiny-pictures only; remove it for "
                        f"data={data.name}")
    for name, settings in data.transforms.items():
        if not isinstance(settings, dict) and settings is not None:
            raise UserError(f"data.transforms.{name}={_shown(settings)}: a transform has settings, as in data.transforms.{name}.kind=swap")
    if data.transforms and command == "label":
        raise UserError(f"prefopt label writes rows as they were read, without data.transforms ({', '.join(data.transforms)}); leave them "
                        "out, and put them on the command that trains on the labelled file")


def _check_reward(cfg: Any) -> None:
    """Whether the model that judges is named where one is needed, and only there."""
    kind, path = cfg.reward.kind, cfg.reward.path
    if path and kind not in ("model", "followup", *PICTURE_REWARDS) or path and kind == "brisque":
        raise UserError(f"reward.path={path} is read with reward=model only (or reward=flr, or one that judges pictures by a model); "
                        "add reward=model, or leave it out")
    if kind in PICTURE_REWARDS and not path and kind != "brisque":
        raise UserError(f"reward.path has no value, and reward={kind} needs one: the folder or hub id of the model "
                        "(docs/image-rewards.md tells how a folder is made)")
    if (kind in PICTURE_REWARDS) > cfg.data.pictures or cfg.data.pictures and kind in ("model", "followup"):
        judged, held = ("pictures", "texts") if kind in PICTURE_REWARDS else ("texts", "pictures")
        raise UserError(f"reward={kind} judges {judged}, and data={cfg.data.name} holds {held}; use reward=auto, or another reward")
    if kind == "model" and not path:
        raise UserError("reward.path has no value, and reward=model needs one; give a run of algo=reward_bt, or a model: reward.path=...")
    if kind == "followup" and not path and not hasattr(cfg, "model"):
        raise UserError("reward.path has no value, and prefopt label reward=flr needs one: the language model that judges; give a run, a "
                        "folder or a hub id: reward.path=...")
    if kind == "followup" and cfg.data.source == "bandit":
        raise UserError("reward=flr reads texts, and data=bandit has none; use reward=auto, whose reward is the true one")


KINDS = {
    "float": ("a finite number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)),
    "int": ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("text", lambda v: isinstance(v, str)),
}


def check_algo(settings: dict[str, Any], packages: list[str], algo_name: str | None) -> ObjectiveInfo:
    """The objective's description; its settings are checked against the class's fields, types and rules, and a mixture's parts get all of
    theirs."""
    target = settings.get("_target_")
    if not isinstance(target, str):
        chosen = f"algo={algo_name}" if algo_name else "algo"
        raise UserError(f"{chosen} names no class; its YAML needs a line `_target_: package.module.Class`")
    info = read_objective(target, packages)
    for key, value in settings.items():
        if key in ("_target_", "name"):
            continue
        if key not in info.fields:
            raise UserError(f"algo.{key} is no setting of {info.name}{nearest(key, info.fields, 'algo.')}")
        kind, fits = KINDS.get(info.fields[key].type, ("", lambda v: True))
        if not fits(value):
            raise UserError(f"algo.{key}={_shown(value)}: it must be {kind}")
    values = {name: settings.get(name, field.default) for name, field in info.fields.items()}
    for rule in info.require:
        if not eval(rule, {"__builtins__": {}}, values):  # rules are constants of classes in allowed packages
            used = [n for n in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", rule)) if n in values]
            shown = ", ".join(f"algo.{n}={_shown(values[n])}" for n in used)
            default = info.fields[used[0]].default if len(used) == 1 else REQUIRED
            usual = f"; the default is {_shown(default)}" if default != REQUIRED else ""
            raise UserError(f"{shown}: {info.name} needs {rule}{usual}")
    if is_mixture(info):
        parts = settings["parts"] = expanded(settings.get("parts"))
        for number, part in enumerate(parts, 1):
            try:
                check_algo({key: value for key, value in part.items() if key not in ("algo", "weight")}, packages, part.get("algo"))
            except UserError as error:
                raise UserError(f"part {number} of algo.parts: {error}") from error
        return described(settings, packages)
    return info


def check_together(cfg: Any, info: ObjectiveInfo) -> None:
    """Combinations that each group would accept alone."""
    model, data = cfg.model, cfg.data
    if data.source in ("files", "hub", "picture_folders") and not data.path:
        what = {"files": "a file, a folder or a glob", "hub": "a hub id or a folder"}.get(data.source, "a folder of images")
        raise UserError(f"data.path has no value, and data={data.name} needs one; give {what}: data.path=...")
    if (model.kind == "tabular") != (data.source == "bandit"):
        raise UserError(f"model={model.name} and data={data.name} do not fit: the table of model=bandit only knows data=bandit, and the "
                        "other way round. Set both, or neither.")
    if data.source not in ("tiny_feedback", "tiny_pictures", "bandit") and data.label_noise:
        raise UserError(f"data.label_noise={data.label_noise} works on generated data only (tiny-feedback, tiny-pictures, bandit); "
                        f"remove it for data={data.name}")
    if data.source != "tiny_feedback" and data.length_bias:
        raise UserError(f"data.length_bias={data.length_bias} works on data=tiny-feedback only; remove it for data={data.name}")
    if model.start and model.lora.adapter:
        raise UserError(f"model.start={model.start} and model.lora.adapter={model.lora.adapter} both say where the run starts; set one")
    if model.start and model.kind == "tabular" and info.scores_rewards:
        raise UserError(f"model.start={model.start}: the table of a reward model starts at 0, not at a policy; set model.start=null")
    if model.lora.adapter and not model.lora.enabled:
        raise UserError("model.lora.adapter is set but model.lora.enabled is false; set model.lora.enabled=true")
    check_quantize(model)
    check_users(model, data)
    _check_pictures(cfg, info)
    if model.kind == "tabular" and model.lora.enabled:
        raise UserError("model=bandit is a table and takes no LoRA adapter; set model.lora.enabled=false")
    if info.extra:
        _check_extra(cfg, info)
    if not info.needs_reference and hasattr(cfg, "reference"):
        _check_no_reference(cfg.reference, info)
    _check_source(cfg, info)
    if not hasattr(cfg, "hardware"):
        return
    check_refresh(cfg)
    check_hardware(cfg, info)
    if cfg.reference.policy == "base" and not model.frozen:
        raise UserError("reference.policy=base is the model without its adapter, and there is none; use reference.policy=initial, "
                        "or a LoRA model")
    if cfg.reference.store == "on" and (why := _no_store(cfg, info)):
        raise UserError(f"reference.store=on: {why}; use reference.store=auto")
    _check_teacher(cfg, info)
    if cfg.train.batch_size < info.min_batch:
        raise UserError(f"train.batch_size={cfg.train.batch_size}: {info.name} needs at least {info.min_batch} rows per step")
    if model.quantize:
        require_bitsandbytes()
    if model.attention == "flash_attention_2" and (cfg.hardware.device == "cpu" or cfg.hardware.precision == "fp32"):
        raise UserError("model.attention=flash_attention_2 needs a GPU and hardware.precision=bf16; use model.attention=sdpa")
    if model.attention == "flex" and cfg.hardware.device == "cpu":
        raise UserError("model.attention=flex needs a GPU (FlexAttention has no backward pass elsewhere); use model.attention=auto")


def _check_extra(cfg: Any, info: ObjectiveInfo) -> None:
    """Whether the extra sequences of an objective can be made and scored."""
    if info.view != "pairs" or "label" not in info.columns:
        raise UserError(f"{info.name}: extra sequences ({', '.join(info.extra)}) are made for a pair as its row has it, so what reads "
                        "them, and all parts of a mixture, must read pairs and handle soft labels (`label` among the columns of its class)")
    if "policy" not in info.extra_scorers and info.compares_states:
        raise UserError(f"{info.name}: the policy does not score the extra sequences ({', '.join(info.extra)}), and what it is compared "
                        "with (a divergence, or hidden states) does; put `policy` among the `extra_scorers` of its class")
    if cfg.model.kind == "tabular":
        raise UserError(f"{info.name} also scores replies under other prompts ({', '.join(info.extra)}), and model={cfg.model.name} is a "
                        "table over the prompts of its data alone; use model=tiny-lm data=tiny-feedback")
    if cfg.source.kind != "offline":
        raise UserError(f"source={cfg.source.kind} writes the pairs while it trains, and {info.name} needs sequences that are made from "
                        f"the texts of pairs beforehand ({', '.join(info.extra)}); use source=offline")


def _check_pictures(cfg: Any, info: ObjectiveInfo) -> None:
    """Whether model, data and objective agree on what a completion is: a text or a picture."""
    model, data = cfg.model, cfg.data
    if (model.kind == "diffusion") != data.pictures:
        kinds = ("pictures", "texts") if data.pictures else ("texts", "pictures")
        fix = "model=tiny-diffusion, or another diffusion model" if data.pictures else "data=tiny-pictures, or other data of pictures"
        raise UserError(f"data={data.name} holds {kinds[0]}, and model={model.name} makes {kinds[1]}; choose {fix}")
    if model.kind != "diffusion":
        if model.recompute != "all":
            raise UserError(f"model.recompute={model.recompute} keeps the convolutions of diffusion models, and model={model.name} has "
                            "none; leave it out")
        if "llm" not in modalities(info):
            raise UserError(f"{info.name} is about the denoising errors of pictures, and model={model.name} makes none; choose "
                            "model=tiny-diffusion data=tiny-pictures, or an algorithm for texts (prefopt list algo --modality llm)")
        return
    if "diffusion" not in modalities(info):
        raise UserError(f"{info.name} reads more of a completion than its log-prob, or needs the exact one, and a diffusion model gives an "
                        "estimate of each picture's; prefopt list algo --modality diffusion lists those that it can be trained with")
    if hasattr(cfg, "noise"):
        check_noise(cfg.noise, info)


def _check_auto(cfg: Any, info: ObjectiveInfo) -> None:
    """Whether a beta can be found from how far a step moves pairs: the loss must be a function of beta times that, and of nothing else."""
    value = cfg.algo["beta"]
    if len(info.formula) != 1 or "beta*h" not in next(iter(info.formula.values())).replace(" ", ""):
        raise UserError(f"algo.beta={value} is for a loss of beta h alone, h the difference of a pair's two log-ratios, and {info.name} is "
                        "none; give a number, or choose algo=dpo, algo=diffusion_dpo or one like them")
    if cfg.source.kind != "offline":
        raise UserError(f"algo.beta={value} is found on the first rows of the data, and source={cfg.source.kind} has none before it "
                        "trains; give a number")


def _check_no_reference(reference: Any, info: ObjectiveInfo) -> None:
    """Refuses settings of a reference that the objective does not read."""
    what = "trains a reward model, which has no reference" if info.scores_rewards else "compares the policy with no reference"
    for key, usual in (("policy", "initial"), ("refresh", "never"), ("store", "auto")):
        value = getattr(reference, key)
        if value not in (usual, "off"):
            raise UserError(f"reference.{key}={value}: {info.name} {what}; use reference.{key}={usual}, or an "
                            "algorithm that has one (prefopt list algo --needs reference)")


def _check_teacher(cfg: Any, info: ObjectiveInfo) -> None:
    """Whether the frozen models that an objective learns from are named, and no others. They are looked for when the run starts."""
    wanted = info.quantities.get("teacher", ())
    keys = {"path": (bool(wanted), "dpo"), "reverse": ("distance" in wanted, "dpo_and_reverse")}
    for key, (needed, stages) in keys.items():
        value = getattr(cfg.teacher, key)
        if needed and not value:
            raise UserError(f"teacher.{key} has no value, and {info.name} learns from that model; give a finished run (teacher.{key}=RUN), "
                            f"or let one be trained first (stages={stages})")
        if value and not needed:
            raise UserError(f"teacher.{key}={value}: {info.name} learns from no such model; leave it out, or choose an algorithm that does "
                            "(prefopt list algo --needs teacher)")


def _no_store(cfg: Any, info: ObjectiveInfo) -> str:
    """Why the reference's log-probs cannot be computed once and kept; empty if they can."""
    if cfg.reference.refresh != "never":
        return f"the reference moves (reference.refresh={cfg.reference.refresh})"
    if cfg.source.kind != "offline":
        return f"source={cfg.source.kind} trains on replies that are not written yet"
    if cfg.model.kind == "diffusion" and cfg.noise.plan in BY_A_MODEL:
        return f"noise.plan={cfg.noise.plan} finds where pictures are scored while it trains"
    if cfg.model.kind == "diffusion" and not cfg.noise.pool:
        return "every visit of a row has new draws of noise, which nobody will meet again; choose noise=pool"
    if cfg.model.kind == "tabular":
        return f"model={cfg.model.name} is a table, whose log-probs cost nothing"
    if info.needs_live_reference:
        return f"{info.name} reads whole next-token distributions or hidden states of its reference, and a store keeps log-probs"
    return ""


def check_quantize(model: Any) -> None:
    """Refuses a quantised model that could not be trained."""
    if not model.quantize:
        return
    if model.kind == "tabular":
        raise UserError(f"model={model.name} is a table and has no weights to quantise; set model.quantize=null")
    if not model.lora.enabled:
        raise UserError("model.quantize=4bit freezes the weights, so there is nothing left to train; add adapter=qlora, "
                        "or set model.lora.enabled=true")
    if model.gguf_file:
        raise UserError("model.quantize=4bit is for safetensors; a GGUF file has a quantisation of its own. Set model.quantize=null")


def _check_source(cfg: Any, info: ObjectiveInfo) -> None:
    """Whether rows are given or sampled, and whether what is sampled can be judged and used."""
    check_trajectories(cfg, info)
    check_negative(cfg)
    source = cfg.source
    if (source.kind == "rollout") != (info.view == "groups" and not info.stepwise):
        wants = "rollout" if info.view == "groups" else "offline or source=rounds"
        raise UserError(f"source={source.kind} does not fit: {info.name} reads {VIEWS[info.view]}; use source={wants}")
    check_rounds(cfg, info)
    if not hasattr(cfg, "reward"):
        return
    if info.scores_rewards:
        if source.kind != "offline":
            raise UserError(f"source={source.kind} lets the model write replies, and a reward model writes none; use source=offline")
        if cfg.reward.kind in ("model", "followup"):
            raise UserError(f"{info.name} trains a reward model, and reward={cfg.reward.kind} is for judging a policy's replies; "
                            "use reward=auto")
    if source.kind == "offline":
        return
    asked = source.labels != "given" and source.judge == "reward"
    known = cfg.reward.kind != "auto" or cfg.data.source in ("tiny_feedback", "bandit", "tiny_pictures")
    if asked and (cfg.reward.kind == "none" or not known):
        raise UserError(f"source={source.kind} needs a reward for what the policy writes: reward={cfg.reward.kind} gives none for "
                        f"data={cfg.data.name}. {JUDGES[cfg.data.pictures]}")
    if cfg.sampler.beams > 1:
        raise UserError(f"source={source.kind} draws several replies to a prompt, and sampler.beams={cfg.sampler.beams} finds one; use "
                        "sampler=default, and search when the run is done: prefopt eval run=RUN sampler=r_to_q")
    if source.kind == "rollout" and (cfg.sampler.temperature, cfg.sampler.top_p) != (1, 1):
        raise UserError("source=rollout scores replies under the distribution they come from; set sampler.temperature=1 sampler.top_p=1")
    if info.mismatched and source.prompts < 2:
        raise UserError(f"source.prompts={source.prompts}: {info.name} needs at least two prompts per round, for mismatched replies")


def rephrase(error: Exception, words: Sequence[str], command: str) -> str:
    """One sentence for an error of Hydra's own composition of the override `words`."""
    text, cause = str(error), error.__cause__
    if match := re.search(r"Could not (?:find|load) '([\w./-]+)/([\w.-]+)'", text):
        group, name = match.groups()
        if group == "model" and (adapter := re.match(r"(.+)-(q?lora)$", name)) and adapter[1] in groups()["model"]:
            return f"there is no model={name}; write model={adapter[1]} adapter={adapter[2]}"
        options = [line.strip() for line in text.partition("Available options in")[2].partition("Config search path")[0].splitlines()[1:]]
        return f"there is no {group}={name}{nearest(name, [o for o in options if o and o[0] != '_'], f'{group}=')}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _not_in_config(match[1], getattr(cause, "parent_node", None), command)
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{match[1]} exists already; write {match[1]}=... without the +"
    if match := re.search(r"Multiple values for ([\w/]+)\.", text):
        return f"{match[1]} is chosen already; write {match[1]}=... without the +"
    if match := re.search(r"Ambiguous value for argument '(([^=']+)=[^']*)'", text):
        return f"{match[1]} has several values; add -m to run a job for each, or write {match[2]}=[...] if it is meant as one list"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, _first_line(error))
    if isinstance(error, ValueError) and "Config group override" in text:
        word = next((w for w in words if w.partition("=")[0] in ("", *groups())), "")
        group = word.partition("=")[0] or "algo"
        return f"{word}: a group is chosen by name, such as {group}={groups()[group][0]} (prefopt list {group})"
    lines = [line.strip() for line in f"{text}\n{cause or ''}".splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key", "object_type", "See https", "Config search path", "provider="))]
    return " ".join(dict.fromkeys(lines[:4]))


def _unreadable(word: str, reason: str) -> str:
    """For a word that Hydra's grammar does not take."""
    if "=" in word:
        return f"cannot read '{word}' ({reason}); quote a value with blanks or special characters, as in \"key='a, b'\""
    meant = [f"{group}={word}" for group, names in groups().items() if word in names]
    return f"'{word}' is no override; " + (f"did you mean '{meant[0]}'?" if meant else f"write key=value, such as {word or 'seed'}=...")


def _not_in_config(key: str, parent: Any, command: str) -> str:
    """For an override of something that the composed config does not hold. `parent` is the part of it that Hydra looked in."""
    group = key.partition("@")[0]
    if group in groups() and ("@" in key or "." not in key):
        return f"the group {group} is not part of this command" if key == group else f"{key}: prefopt has no packages; write {group}=..."
    root = OmegaConf.to_container(parent._get_root(), resolve=False) if isinstance(parent, Node) else {}
    known = dotted(root)
    settings = root.get("algo")
    fields_of = _fields(settings.get("_target_")) if isinstance(settings, dict) and key.startswith("algo.") else []
    if fields_of and key[5:] not in fields_of:
        return f"{key} is no setting of {settings['_target_'].rpartition('.')[2]}{nearest(key[5:], fields_of, 'algo.')}"
    if key.startswith("stages."):
        return f"{key} is not among the settings of the chosen stages (prefopt list stages); add it with a plus sign: +{key}=..."
    if key.startswith("data.transforms."):
        return f"data.transforms.{key.split('.')[2]} is not among the transforms of the chosen config; add it with a plus sign: +{key}=..."
    if fields_of or key in all_keys(COMMANDS[command]):
        return f"{key} is left to its default by the chosen config; add it with a plus sign: +{key}=..."
    if not key.startswith("hydra"):
        known = [k for k in known if not k.startswith("hydra")]
        known += [group for group in primary_groups(command) if group not in known]
    return unknown_key(key, known)


def _fields(target: Any) -> Sequence[str]:
    try:
        return list(read_objective(target, [str(target).partition(".")[0]]).fields)  # its source is read, nothing is run
    except UserError:
        return []


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The sentence for an unknown key, with the nearest full name: a sibling, the same name elsewhere, or one that looks alike."""
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    names = {k.rpartition(".")[2]: k for k in siblings}
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    like = [names[n] for n in get_close_matches(leaf, names, n=1, cutoff=0.6)]
    best = like or (same if len(same) <= 3 else []) or ([] if parent and siblings else get_close_matches(key, known, n=1, cutoff=0.7))
    if best:
        return f"unknown key '{key}'; did you mean {' or '.join(repr(k) for k in best)}?"
    shown = siblings or [k for k in known if "." not in k]
    return f"unknown key '{key}'; there {'is' if len(shown) == 1 else 'are'} {', '.join(shown)}"


def dotted(tree: Any, prefix: str = "") -> list[str]:
    """Full names of all keys of nested dicts."""
    return [name for key, value in tree.items() for name in (prefix + str(key), *dotted(value, f"{prefix}{key}."))] \
        if isinstance(tree, dict) else []


def _check_keys(given: dict[str, Any], schema: type, present: list[str], prefix: str = "") -> None:
    """Refuses keys that the schema does not have, and single values where it has a block of keys."""
    known, kinds = {f.name: nested(f) for f in fields(schema)}, {f.name: f.type for f in fields(schema)}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise UserError(unknown_key(name, [*all_keys(schema, prefix), *(k for k in present if k.startswith("algo."))]))
        if kinds[key] == "bool" and type(value) in (int, float):
            raise UserError(f"{name}={value}: it must be true or false")
        if (block := known[key]) and not (isinstance(value, str) and value.startswith("${")):
            if not isinstance(value, dict):
                first = f"{name}.{fields(block)[0].name}"
                raise UserError(f"{name}={_shown(value)}: {name} is a block of keys; set one of them, such as {first}=...")
            _check_keys(value, block, present, f"{name}.")


EXPECTED = (
    ("to Float", "a number, such as 1e-4"), ("to Integer", "a whole number"), ("valid bool", "true or false"),
    ("is not a ListConfig", "a list, such as KEY=[...]"), ("ListConfig", "text"), ("DictConfig", "text"),
    ("'None'", "something else than null"),
)


def _wrong_value(error: OmegaConfBaseException, given: dict[str, Any], cfg: DictConfig) -> str:
    key, reason = error.full_key or next((k for k in dotted(given) if not _resolves(cfg, k)), "config"), _first_line(error)
    value: Any = given
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    if value is not _ABSENT:
        for words, what in EXPECTED:
            if words in reason:
                return f"{key}={_shown(value)}: it must be {what.replace('KEY', key)}"
    return f"{key}: {reason}"


def _resolves(cfg: DictConfig, key: str) -> bool:
    try:
        OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return False
    return True


def _shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    return (value or "''") if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _ranges(cfg: Any) -> None:
    for key, allowed in CHOICES.items():
        if (value := _dig(cfg, key)) not in (_ABSENT, None, *allowed):
            close = get_close_matches(str(value), allowed, n=1, cutoff=0.5)
            hint = f"; did you mean '{key}={close[0]}'?" if close else ""
            raise UserError(f"{key}={_shown(value)} is none of {', '.join(allowed)}{hint}")
    for key, test, what in BOUNDS:
        value = _dig(cfg, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={_shown(value)}: it must be a finite number")
        if value is not _ABSENT and not eval(test, {"__builtins__": {}, "len": len, "all": all}, {"x": value}):
            raise UserError(f"{key}={_shown(value)}: it must be {what}")

_ABSENT = object()


def _dig(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = getattr(cfg, part, _ABSENT)
    return cfg


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
