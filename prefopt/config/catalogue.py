"""What there is to choose from: configs read as text, objectives from source; `listing` shows it. Imports neither torch nor Hydra."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from prefopt.config.objective_source import FieldInfo, ObjectiveInfo, read_objective
from prefopt.config.strength import per_mean
from prefopt.errors import UserError, nearest

__all__ = [
    "FieldInfo", "KeyLine", "ObjectiveInfo", "algo_info", "algo_settings", "conf_dir", "find", "groups", "header", "key_lines", "load_yaml",
    "modalities", "objective_info", "resolved_keys",
]  # fmt: skip

GROUPS = (
    "algo", "model", "adapter", "data", "transforms", "source", "trajectory", "noise", "reference", "teacher", "hardware", "tracker",
    "reward",
    "sampler", "stages", "experiment", "sweep", "debug",
)  # fmt: skip
VIEWS = {
    "pairs": "pairs of a chosen and a rejected reply",
    "unary": "single replies, each labelled good or bad",
    "demonstrations": "replies to imitate",
    "ranking": "several replies per prompt, in order",
    "groups": "several sampled replies per prompt, each with a reward",
}
NEEDS: dict[str, Callable[[ObjectiveInfo], bool]] = {
    "reference": lambda info: info.needs_reference,
    "tokens": lambda info: info.token_level,
    "global": lambda info: info.coupling == "global",
    "likelihood": lambda info: info.proper_likelihood,
    "teacher": lambda info: bool(info.quantities.keys() & {"teacher", "reverse"}),
    "vocabulary": lambda info: bool(_quantities(info) & {"divergence", "value", "distance"}),
    "states": lambda info: bool(_quantities(info) & {"states", "hidden", "mask_reward", "mask_kl", "degree_logits"}),
    "extra": lambda info: bool(info.extra),
    "samples": lambda info: brings(info.slug).get("source", "offline") != "offline",
    "stages": lambda info: "stages" in brings(info.slug),
    "transforms": lambda info: "transforms" in brings(info.slug),
}
MODALITIES = ("llm", "diffusion")
OF_PICTURES = ("best_of", "self_play", "self_play_judged", "self_play_states", "self_rewarding")  # sources that draw
LIST_OPTIONS = {"view": "pairs", "needs": "reference", "modality": "diffusion"}  # with an example of each
# An objective with one of these needs is for language models only.
TEXT_ONLY = ("tokens", "likelihood", "vocabulary", "states", "extra")


@dataclass
class KeyLine:
    """A key as it stands in a YAML file: its value's own spelling, and the comment beside or above it."""

    value: str
    comment: str


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML as OmegaConf reads it: 5e-7 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@cache
def conf_dir() -> Path:
    """The folder of the package `prefopt.conf`: `conf/` of an editable install, package data of a wheel."""
    spec = importlib.util.find_spec("prefopt.conf")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the config files of prefopt are not installed; run pip install -e . in its source folder")
    return Path(next(iter(spec.submodule_search_locations)))


def groups() -> dict[str, list[str]]:
    """Names in each config group."""
    return {group: _stems(group) for group in GROUPS}


def _stems(group: str) -> list[str]:
    """Names to choose from; a file whose name begins with an underscore is only there to be inherited from."""
    return sorted(file.name.removesuffix(".yaml") for file in (conf_dir() / group).glob("[!_]*.yaml"))


def find(name: str) -> list[tuple[str, str]]:
    """All (group, name) that `name`, `group=name` or `group/name` stands for."""
    group, _, stem = name.replace("=", "/").rpartition("/")
    known = [(g, n) for g, names in groups().items() for n in names if group in ("", g)]
    if found := [item for item in known if item[1] in (stem, stem.lower())]:
        return found
    if (adapter := re.match(r"(.+)-(q?lora)$", stem.lower())) and adapter[1] in groups()["model"]:
        raise UserError(f"there is no config named {name}; see prefopt show {adapter[1]} and prefopt show {adapter[2]}: "
                        f"the two go together as model={adapter[1]} adapter={adapter[2]}")
    raise UserError(f"there is no config named {name}{nearest(stem.lower(), [n for _, n in known] or GROUPS)}")


def load_yaml(group: str, name: str) -> dict[str, Any]:
    return yaml.load((conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8"), _Loader) or {}


def objective_info(target: str, packages: Sequence[str] = ()) -> ObjectiveInfo:
    """The objective class `target`, read from source; `slug` is the algorithm whose YAML names it, if any.

    Only prefopt and the trusted `packages` may be named. Raises `UserError` for anything else, or that is not there.
    """
    info = read_objective(target, packages)
    return replace(info, slug=next((slug for slug in _stems("algo") if _target(slug) == target), None))


def algo_info(slug: str, packages: Sequence[str] = ()) -> ObjectiveInfo:
    """The objective of `algo=slug`."""
    if slug not in _stems("algo"):
        raise UserError(f"algo={slug} does not exist{nearest(slug.lower(), _stems('algo'))}")
    return _algo_info(slug, tuple(packages))


@cache
def _algo_info(slug: str, packages: tuple[str, ...]) -> ObjectiveInfo:
    info = read_objective(_target(slug), packages)
    if "parts" in info.fields:
        from prefopt.config.mixtures import described  # it reads the catalogue
        info = described(load_yaml("algo", slug), packages)
    return replace(info, slug=slug)


def _target(slug: str) -> str:
    return key_lines(conf_dir() / "algo" / f"{slug}.yaml").get("_target_", KeyLine("", "")).value


def algo_settings(slug: str) -> dict[str, Any]:
    """Hyper-parameters of `algo=slug` as its YAML sets them."""
    return {key: value for key, value in load_yaml("algo", slug).items() if key not in ("_target_", "defaults")}


def brings(slug: str | None) -> dict[str, str]:
    """What `algo=slug` chooses from other groups: `override /source@_global_.source: rounds` in its YAML is {"source": "rounds"}."""
    return {key.partition("@")[0]: name for key, name in chosen_groups("algo", slug).items()} if slug else {}


def chosen_groups(group: str, name: str) -> dict[str, Any]:
    """Choices that a config makes in other groups, as its `defaults` have them, without `override` and the leading slash."""
    entries = [entry for entry in load_yaml(group, name).get("defaults", []) if isinstance(entry, dict)]
    return {key.removeprefix("override ").lstrip("/"): value for entry in entries for key, value in entry.items()}


def experiments(slug: str) -> list[str]:
    """Experiments that train `algo=slug`."""
    return [name for name, algo in _algo_of_experiment().items() if algo == slug]


@cache
def _algo_of_experiment() -> dict[str, str | None]:
    return {name: chosen_groups("experiment", name).get("algo") for name in _stems("experiment")}


@cache
def _files_of_class() -> Counter[str]:
    return Counter(_target(slug) for slug in _stems("algo"))


def summary(slug: str) -> str:
    """What `algo=slug` is, in a line. Where several files share a class it is what follows the name in the file's own comment, if any."""
    info = algo_info(slug)
    first = re.split(r"\.\s", " ".join(header("algo", slug)))[0]
    own = re.sub(r",? \(?(arXiv )?\d{4}\.\d{5}\)?", "", first).rstrip(".")
    return own if _files_of_class()[info.target] > 1 and ": " in own else info.summary


def papers(slug: str) -> list[str]:
    """arXiv numbers: of the method, and of its class where that is another one's."""
    info = algo_info(slug)
    named = re.search(r"arXiv (\d{4}\.\d{5})", " ".join(header("algo", slug)))
    own = [named[1]] if named and _files_of_class()[info.target] > 1 else []
    return list(dict.fromkeys([*own, *([info.paper] if info.paper else [])]))


def header(group: str, name: str) -> list[str]:
    """The comment a YAML file opens with, line by line."""
    lines = (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line.lstrip("# ") for line in lines[: _header_length(lines)] if not line.startswith("# @package")]


def _header_length(lines: Sequence[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _split_comment(text: str) -> tuple[str, str]:
    quote = ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and (i == 0 or text[i - 1] in " [{,:"):
            quote = char
        elif char == "#" and (i == 0 or text[i - 1] == " "):
            return text[:i].strip(), text[i + 1 :].strip()
    return text.strip(), ""


def key_lines(path: Path) -> dict[str, KeyLine]:
    """Every key of a YAML file by its dotted name, in order; `defaults` and other block lists become [a, b]."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = _header_length(lines)
    found: dict[str, KeyLine] = {}
    above: list[tuple[int, str]] = []  # the blocks a line is in: indentation and dotted name
    for number in range(start, len(lines)):
        text, comment = _split_comment(lines[number])
        if text.startswith("- ") and above:
            items = found[above[-1][1]]
            items.value = f"{items.value[:-1]}, {text[2:]}]" if items.value else f"[{text[2:]}]"
        elif match := re.match(r"([\w.@/-]+):(?:\s+(.*))?$", text):
            indent = len(lines[number]) - len(lines[number].lstrip())
            above = [block for block in above if block[0] < indent]
            if not comment and number > start and lines[number - 1].lstrip().startswith("#"):
                comment = lines[number - 1].strip("# ")
            name = f"{above[-1][1]}.{match[1]}" if above else match[1]
            found[name] = KeyLine(match[2] or "", comment)
            above.append((indent, name))
    return found


def resolved_keys(group: str, name: str) -> dict[str, KeyLine]:
    """Keys of a config with those of its `defaults: [parent, _self_]`. Without a comment a key keeps its parent's."""
    keys: dict[str, KeyLine] = {}
    parents = [entry for entry in load_yaml(group, name).get("defaults", []) if isinstance(entry, str)]
    for parent in parents if "_self_" in parents else [*parents, "_self_"]:
        own = key_lines(conf_dir() / group / f"{name}.yaml") if parent == "_self_" else resolved_keys(group, parent)
        for key, line in own.items():
            keys[key] = KeyLine(line.value, line.comment or (keys[key].comment if key in keys else ""))
    keys.pop("defaults", None)
    return keys


def _quantities(info: ObjectiveInfo) -> set[str]:
    return {quantity for quantities in info.quantities.values() for quantity in quantities}


def modalities(info: ObjectiveInfo) -> tuple[str, ...]:
    """Kinds of models that an objective makes sense for: those that need the text's own likelihood are not for diffusion models, and those
    that are about pictures, or have a setting per latent dim, for nothing else."""
    per_dim = info.slug and any(per_mean(value) is not None for value in algo_settings(info.slug).values())
    if info.pictures or per_dim or brings(info.slug).get("source") in OF_PICTURES:
        return ("diffusion",)
    return ("llm",) if info.scores_rewards or any(NEEDS[word](info) for word in TEXT_ONLY) else MODALITIES
