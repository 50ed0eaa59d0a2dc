"""From a config to everything a run needs: policy, data, objective, engine, judge, trackers."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from prefopt.config.schema import TrainConfig
from prefopt.data.dataset import Dataset, check_use, make_dataset
from prefopt.data.sources import Split, load_data
from prefopt.errors import UserError
from prefopt.objectives.base import Objective
from prefopt.policies.load import load_policy
from prefopt.policies.reference import make_reference
from prefopt.rewards.true_reward import make_reward
from prefopt.tracking.tracker import JsonlTracker
from prefopt.tracking.wandb_tracker import make_wandb
from prefopt.training.engine import Engine
from prefopt.training.judge import Judge
from prefopt.training.rundir import manifest, plain_config, write_atomic
from prefopt.training.source import OfflineSource


@dataclass
class Run:
    """A run that is ready to start or to be continued."""

    cfg: TrainConfig
    folder: Path
    engine: Engine
    source: OfflineSource
    judge: Judge
    held_out: Dataset
    total_steps: int
    reference_is_initial: bool
    about: dict[str, Any]

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.engine.accelerator.is_main_process


def make_objective(settings: dict[str, Any]) -> Objective:
    """The objective that `_target_` names, with the other settings as its fields."""
    module, _, name = settings["_target_"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    try:
        return kind(**{k: v for k, v in settings.items() if k not in ("_target_", "name")})
    except ValueError as error:
        raise UserError(f"algo: {error}") from error


def make_accelerator(cfg: TrainConfig) -> Accelerator:
    """Processes and device (precision is the policy's own affair). Sets the thread count, which decides the bits of a CPU run."""
    if cfg.hardware.threads:
        torch.set_num_threads(cfg.hardware.threads)
    torch.set_flush_denormal(True)  # denormals slow CPU steps threefold and carry nothing
    if cfg.hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"hardware={cfg.hardware.name} asks for a GPU and torch sees none; use hardware=cpu, or install a CUDA build "
                        "of torch")
    cpu = cfg.hardware.device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=cpu)


def set_up(cfg: TrainConfig, accelerator: Accelerator) -> Run:
    """Loads model and data and checks them against the objective. Raises `UserError` before any step."""
    torch.manual_seed(cfg.seed)
    folder, objective = Path(cfg.run_dir), make_objective(cfg.algo)
    train_split, held_out_split = load_data(cfg.data)
    for example in (*train_split.examples, *held_out_split.examples):
        check_use(example, cfg.data, objective.view, objective.columns)  # before the model is loaded, which may take minutes
    with accelerator.main_process_first():
        policy = load_policy(cfg.model, cfg.data, cfg.trust, accelerator.device, cfg.hardware.precision, cfg.seed)
    train = dataset(train_split, cfg, policy, objective)
    held_out = dataset(held_out_split, cfg, policy, objective)
    if accelerator.is_main_process:
        say_rejected(train_split, held_out_split, train, held_out)
    if len(train.rows) < objective.min_batch:
        raise UserError(f"{len(train.rows)} usable training rows; {type(objective).__name__} needs at least {objective.min_batch}")

    reference, how = (None, "none")
    if "reference" in objective.quantities or cfg.evaluation.kl:
        reference, how = make_reference(policy, cfg.reference.policy)
    is_initial = cfg.reference.policy == "initial" or not cfg.model.lora.adapter
    start = None
    if cfg.evaluation.kl:  # KL is to the policy the run started from, whatever the objective's reference is
        start = reference if is_initial else make_reference(policy, "initial")[0]
    engine = Engine(policy, objective, reference, cfg.optim, accelerator)
    make = dict(view=objective.view, budget=cfg.train.micro_batch_tokens, pad=policy.pad, soft_labels="label" in objective.columns,
                seed=cfg.seed, rank=accelerator.process_index, world=accelerator.num_processes)
    source = OfflineSource(train.rows, batch_size=cfg.train.batch_size, **make)
    held_out_source = OfflineSource(held_out.rows, batch_size=max(len(held_out.rows), 1), **make) if held_out.rows else None
    judge = Judge(engine, held_out_source, unique_prompts(held_out, cfg.evaluation.prompts), cfg.sampler, cfg.seed,
                  make_reward(cfg.reward, cfg.data), start)
    about = {
        "device": str(accelerator.device), "processes": accelerator.num_processes, "threads": torch.get_num_threads(),
        "precision": cfg.hardware.precision, "reference": how, "model": policy.source,
        "trainable_parameters": sum(p.numel() for p in policy.trainable().values()),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "tokenizer_sha256": policy.tokeniser.digest() if hasattr(policy, "tokeniser") else None,
        "data": {s.name: {"sha256": s.digest(), "revision": s.revision, **d.stats} for s, d in
                 ((train_split, train), (held_out_split, held_out))},
    }
    return Run(cfg, folder, engine, source, judge, held_out, cfg.train.steps or source.steps(cfg.train.epochs), is_initial, about)


def dataset(split: Split, cfg: TrainConfig, policy: Any, objective: Objective) -> Dataset:
    """Tokenised rows of a split for this objective."""
    return make_dataset(split, cfg.data, policy.tokenise, objective.view, objective.columns, objective.mismatched, cfg.seed)


def say_rejected(*parts: Split | Dataset) -> None:
    """Nothing is left out or cut without a word."""
    for split, data in zip(parts[:2], parts[2:], strict=True):
        if split.rejected:
            shown = "; ".join(f"{r.origin}: {r.reason}" for r in split.rejected[:3]) + ("; ..." if len(split.rejected) > 3 else "")
            print(f"data: {len(split.rejected)} {split.name} rows left out ({shown})", file=sys.stderr)
        for what in ("truncated_prompts", "truncated_completions", "undesirable_left_out"):
            if data.stats.get(what):
                print(f"data: {data.stats[what]} {split.name} {what.replace('_', ' ')}", file=sys.stderr)


def unique_prompts(data: Dataset, count: int) -> list:
    """The first `count` examples with different prompts, in their order."""
    found: dict[str, Any] = {}
    for example in data.examples:
        if len(found) >= count:
            break
        found.setdefault(example.prompt_text, example)
    return list(found.values())


def make_trackers(run: Run) -> tuple[JsonlTracker, JsonlTracker, Any]:
    """(metrics, samples, W&B or None) of the main process."""
    cfg = run.cfg
    config = plain_config(cfg, cfg.algo["name"])
    if not (run.folder / "manifest.json").exists():
        write_atomic(run.folder / "manifest.json", json.dumps(manifest(cfg, run.about), indent=2, default=str))
    sweep = run.folder.parent.name if (run.folder.parent / "sweep.json").exists() else None
    wandb = make_wandb(cfg.tracker, run.folder, config, cfg.tracker.group or sweep, run.folder.name)
    return JsonlTracker(run.folder / "metrics.jsonl"), JsonlTracker(run.folder / "samples.jsonl"), wandb
