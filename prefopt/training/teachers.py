"""The frozen models that an objective learns from (config group `teacher`): loaded and checked, or what they say kept instead."""

from __future__ import annotations

import gc
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from prefopt.config.schema import ModelConfig, TrainConfig
from prefopt.data.batch import Row
from prefopt.errors import UserError
from prefopt.objectives.base import Objective
from prefopt.policies.split import whole_shape
from prefopt.policies.start import model_settings, policy_folder, started
from prefopt.policies.teacher import Teacher, live_teachers
from prefopt.training.loading import load
from prefopt.training.reference import store_or_not
from prefopt.training.source import OfflineSource


def make_teacher(cfg: TrainConfig, policy: nn.Module, objective: Objective, source: OfflineSource, held_out: Sequence[Row], steps: int,
                 accelerator: Accelerator) -> tuple[Teacher | None, dict[str, Any]]:
    """(the objective's teacher on this process's device, None where it has none or is stored; what the manifest says).

    Log-probs, or soft values, are kept in the reference store, under the teacher's own identity: the rows that `steps` of `source` visit
    and those `held_out` get them, and the model leaves memory. `reference.store` decides. Distributions are computed on the way.
    """
    if objective.states_of:
        check_distributions([policy], objective)
    if "teacher" not in objective.quantities or cfg.teacher.path is None:  # to sample from a run, no teacher is needed
        return None, {}
    models = load_teachers(cfg, policy, accelerator)
    about: dict[str, Any] = {"teacher": [model.source for model in models]}
    live = live_teachers(objective, stored=True)
    if live or "value" in objective.quantities["teacher"]:
        check_distributions([policy, *models], objective)
    if not live and cfg.reference.store != "off" and cfg.model.kind != "tabular" and cfg.source.kind == "offline":
        # The policy at the path is one as loaded, whatever the run's own reference is.
        as_loaded = replace(cfg, model=models[0].cfg, reference=replace(cfg.reference, policy="initial"))
        stored, kept = store_or_not(as_loaded, models[0], objective, source, held_out, steps, accelerator, "teacher")
        if stored:
            models.clear()
            gc.collect()  # a model's parts point at each other
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            return None, {**about, **kept}
    return Teacher(objective, *models), about


def load_teachers(cfg: TrainConfig, policy: nn.Module, accelerator: Accelerator) -> list[nn.Module]:
    """The models that `cfg.teacher` names, as `Teacher` takes them. Everything that is no weight is as in `cfg.model`.

    Raises `UserError` for what is no policy, or reads text differently from the policy.
    """
    devices, models = [accelerator.device] if accelerator.device.type == "cuda" else [], []
    for key, path in (("path", cfg.teacher.path), ("reverse", cfg.teacher.reverse)):
        if path is None:
            continue
        model = teacher_config(cfg.model, path, f"teacher.{key}")
        with torch.random.fork_rng(devices=devices), redirect_stderr(io.StringIO()):
            try:
                models.append(load(cfg, model, accelerator))
            except UserError as error:
                raise UserError(f"teacher.{key}={path}: {error}") from error
        if differs := _vocabulary(policy, models[-1]):
            raise UserError(f"teacher.{key}={path} {differs}; a teacher scores the policy's own tokens, so give a model with the same "
                            "tokenizer")
    return models


def teacher_config(model: ModelConfig, path: str, key: str) -> ModelConfig:
    """How to load the policy at `path` (a run, the model that it saved, any model's folder or hub id) with the settings of `model`."""
    plain = replace(model, start=None, gradient_checkpointing=False, dropout=0.0, lora=replace(model.lora, enabled=False, adapter=None))
    if not Path(path).expanduser().exists() and not path.startswith((".", "/", "~")) and model.kind != "tabular":
        return replace(plain, path=path, revision=None, gguf_file=None, wheel=None)  # of the hub
    folder = policy_folder(path, key)
    if (folder / "adapter_config.json").is_file():
        known = model_settings(folder)  # where the weights are that the adapter's run had put it on
        base = {name: known[name] for name in ("name", "path", "revision", "gguf_file", "wheel", "quantize") if name in known}
        plain = replace(plain, **base, lora=replace(plain.lora, enabled=True))
    return started(replace(plain, start=str(folder)), key)


def _vocabulary(policy: nn.Module, teacher: nn.Module) -> str:
    """In what the models' tokens differ; empty if they do not."""
    if not hasattr(policy, "tokenizer"):
        return ""  # tables of one world
    ours, theirs = (model.tokenizer.get_vocab() for model in (policy, teacher))
    if ours == theirs:
        return ""
    word = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[::-1])[0]
    return f"has another vocabulary than the policy ({len(theirs):,} tokens against {len(ours):,}; {word!r} is one that differs)"


def check_distributions(models: Sequence[nn.Module], objective: Objective) -> None:
    """`UserError` for language models, the policy first, whose next-token distributions cannot be compared as the objective does."""
    name, words = type(objective).__name__, set()
    for model in models:
        if not hasattr(model, "inner"):
            return  # tables
        if not model.fuse:
            raise UserError(f"{name} compares whole next-token distributions, which takes logits made in chunks, and model.fused_head is "
                            f"off for {model.source['where']} (by its setting, or because its head is no plain matrix); use another model")
        words.add(whole_shape(model.inner.get_output_embeddings().weight)[0])
        capped = getattr(model.inner.config.get_text_config(), "final_logit_softcapping", None)
        if capped and "distance" in objective.quantities.get("teacher", ()) and model is not models[0]:
            raise UserError(f"{name} extrapolates its teachers' logits, and {model.source['where']} caps them (final_logit_softcapping "
                            f"{capped:g}), so that they do not add up; use teachers without a cap")
    if len(words) > 1:
        sizes = " and ".join(f"{n:,}" for n in sorted(words))
        raise UserError(f"{name} compares next-token distributions, and its models give logits for {sizes} "
                        "words (one may be padded); use models with heads of one size")
