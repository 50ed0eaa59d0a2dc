"""Shell completion. The shells call `prefopt __complete`, which reads COMP_LINE and COMP_POINT. Imports neither torch nor Hydra."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

from prefopt.config import catalogue
from prefopt.config.schema import CHOICES, COMMANDS, all_keys, config_of, nested
from prefopt.errors import UserError, nearest

TOP = ("train", "plan", "launch", "eval", "sample", "label", "compare", "runs", "sweep", "store", "merge", "export", "list", "show",
       "data", "doctor", "completion", "--help", "--version")
OPTIONS = ("--multirun", "-m", "--cfg", "--resolve", "--info", "--help", "--config-dir", "-cd", "--config-name", "-cn", "--package",
           "--hydra-help", "--version", "--run")
AFTER = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all")}
HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.launcher.jobs", "hydra.searchpath")
RUN_KEYS = ("run", "against", "reward.path", "model.start", "hydra.run.dir", "hydra.sweep.dir")
PATH_KEYS = ("data.path", "data.users", "model.path", "model.lora.adapter", "output")

SCRIPTS = {
    "bash": r"""# prefopt completion for bash. For this shell:   eval "$(prefopt completion bash)"
# For every shell: put that line into ~/.bashrc, or write the script into ~/.local/share/bash-completion/completions/prefopt.
_prefopt() {
  local word="${COMP_LINE:0:COMP_POINT}" IFS=$'\n'
  word="${word##*[[:space:]]}"
  COMPREPLY=($(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" prefopt __complete 2>/dev/null))
  # bash itself breaks words at = and : and replaces only what comes after.
  local before="$word"
  while [[ -n "$before" && ! ( "${before: -1}" == [=:] && "$COMP_WORDBREAKS" == *"${before: -1}"* ) ]]; do before="${before%?}"; done
  COMPREPLY=("${COMPREPLY[@]#"$before"}")
  [[ "${COMPREPLY[0]}" == *[=./] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -F _prefopt prefopt""",
    "zsh": r"""#compdef prefopt
# prefopt completion for zsh. For this shell (after compinit):   eval "$(prefopt completion zsh)"
# For every shell: put that line into ~/.zshrc, or write the script as _prefopt into a folder of $fpath.
_prefopt() {
  local -a found
  local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
  found=("${(@f)$(COMP_LINE="$line" COMP_POINT="" prefopt __complete 2>/dev/null)}")
  compadd -S '' -- ${(M)found:#*[=./]}
  compadd -- ${found:#*[=./]}
}
if [ "$funcstack[1]" = "_prefopt" ]; then _prefopt "$@"; else compdef _prefopt prefopt; fi""",
    "fish": r"""# prefopt completion for fish. For this shell:   prefopt completion fish | source
# For every shell:   prefopt completion fish > ~/.config/fish/completions/prefopt.fish
complete -c prefopt -f -a '(COMP_LINE=(commandline -cp) COMP_POINT="" prefopt __complete 2>/dev/null)'""",
}


def script(shell: str) -> str:
    """The completion script of a shell."""
    if shell not in SCRIPTS:
        raise UserError(f"prefopt completion takes bash, zsh or fish{nearest(shell, SCRIPTS) if shell else ': prefopt completion bash'}")
    return SCRIPTS[shell]


def answer(env: Mapping[str, str] = os.environ) -> list[str]:
    """What the word at the cursor can become, each candidate being the whole word."""
    line = env.get("COMP_LINE", "")
    if env.get("COMP_POINT", "").isdigit():
        line = line.encode()[: int(env["COMP_POINT"])].decode(errors="ignore")
    words = re.split(r"\s+", line.lstrip())
    start = next((i for i, word in enumerate(words) if Path(word).name == "prefopt"), None)
    if start is None:
        return []
    *before, current = words[start + 1 :] or [""]
    found = _candidates(before, current)
    return sorted({c for c in found if c.startswith(current) and not re.search(r"\s", c)})


def _candidates(before: Sequence[str], current: str) -> Iterable[str]:
    if not before:
        return TOP
    command, last = before[0], before[-1]
    if command == "list":
        return {"--view": catalogue.VIEWS, "--needs": [n for w in catalogue.NEEDS for n in (w, f"no-{w}")],
                "--modality": catalogue.MODALITIES}.get(last, [*catalogue.GROUPS, *(f"--{o}" for o in catalogue.LIST_OPTIONS)])
    if command == "show":
        known = catalogue.groups()
        return [n for names in known.values() for n in names] if len(before) == 1 else [f"model={name}" for name in known["model"]]
    if command == "completion":
        return SCRIPTS if len(before) == 1 else []
    if command == "compare":
        return [*_paths(current, folders=True), "--output", "--different-data"]
    if command == "merge":
        return [*_paths(current, folders=True), "weights=", "output="]
    if command == "export":
        key, equals, value = current.partition("=")
        if key == "output" and equals:
            return [f"output={path}" for path in _paths(value)]
        return [*_paths(current, folders=True), *(f"style={style}" for style in ("model", "diffusers", "kohya", "comfyui")), "output=",
                *(f"checkpoint={name}" for name in ("last", "best")), "dtype=bf16", "dtype=fp32", "push=", "private=false"]
    if command == "runs":
        actions = ["ls", "show", "verify", "rm"]
        return actions if len(before) == 1 else [*_paths(current, folders=True), *(["--checkpoints"] if before[1:2] == ["rm"] else [])]
    if command == "sweep":
        actions = ["status", "resume"]
        more = ["--only-unfinished"] if before[1:2] == ["resume"] else []
        return actions if len(before) == 1 else [*_paths(current, folders=True), *more]
    if command == "store":
        return ["ls", "verify", "gc"] if len(before) == 1 else ["--limit-gb", "--all"] if before[1:2] == ["gc"] else []
    if command == "data" and len(before) == 1:
        return ["check"]
    command = "data_check" if command == "data" else command
    if command not in COMMANDS:
        return []
    if last in AFTER:
        return AFTER[last]
    if last in ("--config-dir", "-cd"):
        return _paths(current, folders=True)
    if current.startswith("-"):
        return (*OPTIONS, *{"launch": ("--print",), "plan": ("--dry-run",)}.get(command, ()))
    return _override(command, before, current)


def _override(command: str, before: Sequence[str], current: str) -> Iterable[str]:
    sign = re.match(r"[+~]*", current)[0]
    key, equals, value = current[len(sign) :].partition("=")
    if equals:
        done, comma, _ = value.rpartition(",")
        return [f"{sign}{key}={done}{comma}{v}" for v in _values(command, before, key, value[len(done + comma) :])]
    known = _groups(command, before)
    keys = [*all_keys(COMMANDS[command]), *(_algo_keys(before) if "algo" in known else ()), *HYDRA]
    keys = [k for k in keys if not any(other.startswith(f"{k}.") for other in keys)]  # a block of keys has no value of its own
    names = [f"{name}=" for name in (*known, *keys)]
    # One level at a time, as with folders.
    depth = key.count(".") + 1
    return {sign + (n if n.count(".") < depth else ".".join(n.split(".")[:depth]) + ".") for n in names}


def _values(command: str, before: Sequence[str], key: str, value: str) -> Iterable[str]:
    known = _groups(command, before)
    if key in known:
        return known[key]
    if key in RUN_KEYS:
        return _runs(value)
    if key in PATH_KEYS:
        return _paths(value)
    if key in CHOICES:
        return CHOICES[key]
    return ("true", "false") if _type(command, key) == "bool" else ()


def _type(command: str, key: str) -> str:
    schema: type | None = COMMANDS[command]
    *parents, leaf = key.split(".")
    for part in parents:
        schema = next((nested(f) for f in fields(schema) if f.name == part), None) if schema else None
    return next((str(f.type) for f in fields(schema) if f.name == leaf), "") if schema else ""


@cache
def primary_groups(command: str) -> tuple[str, ...]:
    """The groups of a command, in the order of its defaults list."""
    entries = catalogue.load_yaml(".", config_of(command))["defaults"]
    return tuple(key for entry in entries if isinstance(entry, dict) for key in entry if not key.startswith("override "))


def _groups(command: str, before: Sequence[str]) -> dict[str, list[str]]:
    """Names in the groups of a command, those of the user's own --config-dir included."""
    extra = [Path(b).expanduser() for a, b in zip(before, before[1:], strict=False) if a in ("--config-dir", "-cd")]
    extra += [Path(w.partition("=")[2]).expanduser() for w in before if w.startswith("--config-dir=")]
    known = catalogue.groups()
    return {g: sorted({*known[g], *(f.stem for folder in extra for f in (folder / g).glob("*.yaml"))}) for g in primary_groups(command)}


def _algo_keys(before: Sequence[str]) -> list[str]:
    """Settings of the algorithm chosen on this command line."""
    chosen = next((w[5:].split(",")[0] for w in reversed(before) if w.startswith("algo=")), "dpo")
    try:
        return [f"algo.{key}" for key in catalogue.algo_settings(chosen)]
    except (OSError, UserError):
        return []


def _runs(value: str) -> list[str]:
    """Run folders, and folders that may hold some (a sweep's): from runs/ if nothing is typed yet."""
    return [p.rstrip("/") if Path(p, "config.yaml").is_file() else p for p in _paths(value or "runs/", folders=True)]


def _paths(value: str, folders: bool = False) -> list[str]:
    """Files and folders that begin with `value`; folders end in a slash."""
    head, slash, _ = value.rpartition("/")
    base = Path(head + slash).expanduser() if head + slash else Path()
    try:
        inside = sorted(p for p in base.iterdir() if not p.name.startswith("."))
    except OSError:
        return []
    return [f"{head}{slash}{p.name}{'/' if p.is_dir() else ''}" for p in inside if p.is_dir() or not folders]
