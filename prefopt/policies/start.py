"""Starting from the policy of another run: full weights, a LoRA adapter, or the bandit's table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from prefopt.config.schema import ModelConfig
from prefopt.config.stages import REFERENCE, stage_folder
from prefopt.errors import UserError


def started(cfg: ModelConfig, key: str = "model.start") -> ModelConfig:
    """`cfg` with the weights or the adapter of the policy that `cfg.start` names: a finished run, or the model that it saved.

    Full weights take the place of `model.path`; an adapter is that of `model.lora.adapter`, over the weights that its own run started from;
    a table is read from `model.path`. Raises `UserError`, in which `key` is what the user has set.
    """
    if cfg.start is None:
        return cfg
    folder = policy_folder(cfg.start, key)
    if (cfg.kind == "diffusion") != (pictures := any((folder / name).exists() for name in PICTURES)):
        kinds = ("makes pictures", "does not") if pictures else ("makes no pictures", "does")
        raise UserError(f"{key}={cfg.start} holds a model that {kinds[0]}, and model={cfg.name} {kinds[1]}; give a run of the same model")
    if pictures:
        return _started_pictures(cfg, folder, key)
    language, adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if (cfg.kind == "tabular") == (language or adapter):
        kinds = ("a language model", "a table") if language or adapter else ("a table of the bandit world", "a language model")
        raise UserError(f"{key}={cfg.start} holds {kinds[0]}, and model={cfg.name} is {kinds[1]}; give a run of the same model")
    if not adapter:
        return replace(cfg, path=str(folder), revision=None, gguf_file=None, wheel=None)
    if not cfg.lora.enabled:
        raise UserError(f"{key}={cfg.start} holds a LoRA adapter, and model={cfg.name} has none to put it into; add adapter=lora")
    run = model_settings(folder)
    if run.get("path") and cfg.path and _place(run["path"]) != _place(cfg.path):
        raise UserError(f"{key}={cfg.start} holds an adapter for {run['path']}, and model={cfg.name} is {cfg.path}; over other weights it "
                        f"means nothing: give model={run.get('name', '...')}, or a run of this model")
    start = run.get("start")
    base = started(replace(cfg, start=start and REFERENCE.sub(lambda stage: stage_folder(folder.parent, stage[1]), start)), key)
    return replace(base, start=cfg.start, lora=replace(base.lora, adapter=str(folder)))


USERS = "user_branch.safetensors"
PICTURES = ("unet", "transformer", USERS, "pytorch_lora_weights.safetensors")  # what a diffusion policy saves, one of them


def _started_pictures(cfg: ModelConfig, folder: Path, key: str) -> ModelConfig:
    """The same for a diffusion model: `policies/pipeline.py` puts whole weights, or an attention to users, in when it loads it; an adapter
    is that of its LoRA."""
    if (folder / USERS).is_file() and cfg.user_width is None:
        raise UserError(f"{key}={cfg.start} holds an attention to users, and model={cfg.name} is told none; add adapter=user")
    if not (folder / PICTURES[-1]).is_file():
        return replace(cfg, start=str(folder))
    if not cfg.lora.enabled:
        raise UserError(f"{key}={cfg.start} holds a LoRA adapter, and model={cfg.name} has none to put it into; add adapter=lora")
    return replace(cfg, start=None, lora=replace(cfg.lora, adapter=str(folder)))


def policy_folder(path: str, key: str) -> Path:
    """The folder of the policy that the run in the folder `path` has saved, or `path` itself if it holds one."""
    given = Path(path).expanduser()
    if not given.is_dir():
        raise UserError(f"{key}={path}: there is no such folder (looked from {Path.cwd()}); give the folder of a finished run")
    folder = given / "model" if (given / "config.yaml").is_file() else given
    if not folder.is_dir():
        raise UserError(f"{key}={path} holds a run that is not finished: its model is written at the end; let it finish, or choose another")
    if (folder / "prefopt_reward.json").is_file():
        raise UserError(f"{key}={path} holds a reward model, which writes nothing; give a run that trained a policy")
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json", "model.safetensors", *PICTURES)):
        raise UserError(f"{key}={path} holds neither a run nor a saved model; give the folder of a finished run")
    return folder


def model_settings(folder: Path) -> dict[str, Any]:
    """The model settings of the run that saved the model in `folder`; nothing where that is not known."""
    try:
        return dict(yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))["model"])
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError):
        return {}


def _place(path: str) -> str:
    """A local folder in full; anything else as it is."""
    return str(given.resolve()) if (given := Path(path).expanduser()).exists() else path
