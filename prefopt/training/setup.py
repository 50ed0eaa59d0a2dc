"""From a config to everything a run needs: policy, data, objective, engine, judge, trackers."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from prefopt.config.mixtures import expanded
from prefopt.config.schema import TrainConfig
from prefopt.config.strength import SD15, factor, in_nats, with_number
from prefopt.data.dataset import Dataset, make_dataset, make_prompts, prompts_of, reduce_ranking
from prefopt.data.extra import captions_of
from prefopt.data.fits import VIEW_OF_KIND, check_use
from prefopt.data.sources import Split, load_data
from prefopt.data.steps import mark_steps
from prefopt.data.transforms import Tools, apply_transforms, transform_lines
from prefopt.errors import UserError
from prefopt.objectives.base import Objective
from prefopt.policies.locate import adapter_fingerprint
from prefopt.policies.negative import make_sides
from prefopt.policies.split import whole_shape
from prefopt.policies.start import started
from prefopt.rewards import pictures
from prefopt.rewards.true_reward import held_out_rewards, make_rewards
from prefopt.tracking.tracker import read_jsonl
from prefopt.tracking.trackers import Guarded
from prefopt.tracking.wandb_tracker import make_wandb, wandb_labels
from prefopt.training.auto_beta import find_beta
from prefopt.training.deepspeed_json import deepspeed_json
from prefopt.training.engine import Engine
from prefopt.training.judge import Judge
from prefopt.training.loading import load
from prefopt.training.moving import Moving, moving_averages
from prefopt.training.online import OnlineSource
from prefopt.training.picture_rounds import PictureRounds, asks_for_given
from prefopt.training.reference import make_references
from prefopt.training.rundir import plain_config, read_manifest
from prefopt.training.scorers import make_scorer
from prefopt.training.source import OfflineSource
from prefopt.training.teachers import make_teacher
from prefopt.training.throughput import find_peak, machine, unit
from prefopt.training.trajectories import TrajectorySource


@dataclass
class Run:
    """A run that is ready to start or to be continued."""

    cfg: TrainConfig
    folder: Path
    engine: Engine
    source: OfflineSource | OnlineSource | TrajectorySource
    moving: Moving
    judge: Judge
    held_out: Dataset
    total_steps: int
    reference_is_initial: bool
    unit: str  # what a row of the data is: pairs, completions, prompts or rows
    peak: float | None  # FLOP/s of one device; None where the model's FLOPs are unknown
    about: dict[str, Any]

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.engine.accelerator.is_main_process


def make_objective(settings: dict[str, Any]) -> Objective:
    """The objective that `_target_` names, with the other settings as its fields; beta is 1 where it is left to the run."""
    module, _, name = settings["_target_"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if "parts" in settings:  # of a mixture
        settings = {**settings, "parts": expanded(settings["parts"])}
    try:
        return kind(**{k: v for k, v in in_nats(with_number(settings), SD15).items() if k not in ("_target_", "name", "defaults")})
    except ValueError as error:
        raise UserError(f"algo: {error}") from error


class Late:
    """A model that is loaded when it is first asked; `source` tells it apart from others before that."""

    def __init__(self, source: dict[str, Any], load: Callable[[], Any]):
        self.source, self.load, self.model = source, load, None

    def __call__(self, asked: Sequence[Any]) -> Any:
        if self.model is None:
            self.model = self.load()
        return self.model(asked)

    @property
    def cut(self) -> int:
        """Texts that were too long for it, of those that it was asked about."""
        return getattr(self.model, "cut", 0)


def transform_tools(cfg: TrainConfig, device: torch.device) -> Tools:
    """The models that data transforms may ask for: what they have said is on disk, they are loaded for what is not, and kept as long as
    these tools are."""

    @cache
    def reward(path: str) -> Late:
        from prefopt.rewards import learned

        precision = cfg.hardware.precision
        return Late(learned.identity_of(path, precision), lambda: learned.LearnedReward(path, cfg.data, cfg.trust, device, precision))

    @cache
    def similarity(encoder: str) -> Late:
        from prefopt.policies import text_encoder

        return Late(text_encoder.identity_of(encoder), lambda: text_encoder.TextSimilarity(encoder, cfg.trust, device))

    @cache
    def vectors(encoder: str) -> Late:
        from prefopt.policies import text_encoder

        return Late(text_encoder.identity_of(encoder), lambda: text_encoder.TextSimilarity(encoder, cfg.trust, device).vectors)

    return Tools(reward, similarity, vectors)


def make_accelerator(cfg: TrainConfig) -> Accelerator:
    """Processes and device (precision is the policy's own affair). Sets the thread count, which decides the bits of a CPU run."""
    if cfg.hardware.threads:
        torch.set_num_threads(cfg.hardware.threads)
    torch.set_flush_denormal(True)  # denormals slow CPU steps threefold and carry nothing
    if cfg.hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"hardware={cfg.hardware.name} asks for a GPU and torch sees none; use hardware=cpu, or install a CUDA build "
                        "of torch")
    if cfg.hardware.device == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"hardware={cfg.hardware.name} asks for an Apple GPU and torch sees none; use hardware=cpu")
    cpu = cfg.hardware.device == "cpu" or not (torch.cuda.is_available() or cfg.hardware.device == "mps")
    if cpu:
        _keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed, where it is installed, warns that it found no GPU
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=cfg.hardware.timeout))])


def _keep_freed_memory() -> None:
    """Tells glibc not to hand freed memory back to the system: every micro-batch needs the same again, and fetching it page by page took a
    tenth of a step (docs/performance.md). Where the C library is another one, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for setting, value in ((-1, 2**31 - 1), (-2, 1 << 26), (-4, 0)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of malloc.h
            mallopt(setting, value)


def set_up(cfg: TrainConfig, accelerator: Accelerator) -> Run:
    """Loads model and data and checks them against the objective. Raises `UserError` before any step."""
    torch.manual_seed(cfg.seed)
    cfg = replace(cfg, model=started(cfg.model))
    folder, objective = Path(cfg.run_dir), make_objective(cfg.algo)
    quantity = "reward" if "reward" in objective.quantities["policy"] else "token_logp"
    if quantity == "reward" and cfg.model.start and cfg.model.lora.adapter:
        raise UserError(f"model.start={cfg.model.start} holds a policy's LoRA adapter, and a reward model can start from whole weights "
                        "only; set model.start=null")
    splits = train_split, held_out_split = load_data(cfg.data, cfg.trust)
    read = {split.name: split.digest() for split in splits}  # transforms belong to the method, and runs over the same rows can be compared
    apply_transforms(splits, cfg.data, cfg.seed, transform_tools(cfg, accelerator.device))
    online, stepwise = cfg.source.kind != "offline", cfg.source.kind == "trajectories"
    teaches = stepwise and bool(cfg.trajectory.candidates) and cfg.trajectory.scorer == "step_aware"  # the data's pairs, a scorer
    view = "pairs" if objective.view == "groups" else objective.view  # what held-out rows are judged as: they were not sampled
    if not online:
        for example in (*train_split.examples, *held_out_split.examples):
            check_use(example, cfg.data, view, objective.columns)  # before the model is loaded, which may take minutes
    if objective.steps:
        mark_steps((*train_split.examples, *held_out_split.examples))
    with accelerator.main_process_first():
        rewards = make_rewards(cfg.reward, cfg.data, cfg.trust, accelerator.device, cfg.hardware.precision, cfg.model)
        beside = held_out_rewards(cfg.evaluation, accelerator.device)
    policy = load(cfg, cfg.model, accelerator, quantity)
    if cfg.model.kind == "diffusion":
        if stepwise and not teaches:  # their pictures will not be looked at
            train_split.examples = [replace(e, completions=[]) for e in train_split.examples]
        trained = [reduce_ranking(e, "all" if view == "ranking" else cfg.data.pairs) for e in train_split.examples]
        if online and not stepwise and not asks_for_given(cfg.source):
            trained = [replace(e, completions=[]) for e in trained]
        examples = [*trained, *held_out_split.examples]  # held-out rankings whole: prefopt eval judges them as they are
        policy.encode([*examples, *captions_of(examples, objective.extra)], cfg.data, accelerator)
    as_prompts = {"train": online, "eval": online and not all(view in VIEW_OF_KIND[e.kind] for e in held_out_split.examples)}
    train, held_out = (
        make_prompts(s, cfg.data, policy.prompt_ids) if as_prompts[s.name] else
        make_dataset(s, cfg.data, getattr(policy, f"tokenise_{s.name}", policy.tokenise), view, objective.columns, objective.mismatched,
                     cfg.seed, extra=objective.extra)
        for s in (train_split, held_out_split)
    )
    given = None
    if online and asks_for_given(cfg.source):
        given = make_dataset(train_split, cfg.data, policy.tokenise, "pairs" if cfg.source.mix < 1 else "demonstrations", objective.columns,
                             False, cfg.seed)
        train = prompts_of(given)
    reward, scorer = rewards.get("reward") or rewards.get("true_reward"), None
    if stepwise and cfg.trajectory.candidates:
        pairs = make_dataset(train_split, cfg.data, policy.tokenise, "pairs", ("label",), False, cfg.seed).rows if teaches else []
        scorer = make_scorer(cfg, policy, reward, pairs, [] if as_prompts["eval"] else held_out.rows, accelerator)
    if accelerator.is_main_process:
        say_rejected(train_split, held_out_split, train, held_out)
    if len(train.rows) < objective.min_batch:
        raise UserError(f"{len(train.rows)} usable training rows; {type(objective).__name__} needs at least {objective.min_batch}")

    is_initial = cfg.reference.policy == "initial" or not cfg.model.adapter
    make = dict(view=objective.view, budget=cfg.train.micro_batch_tokens, pad=policy.pad, soft_labels="label" in objective.columns,
                seed=cfg.seed, rank=accelerator.process_index, world=accelerator.num_processes, layout=policy.layout,
                share=policy.share, draws=getattr(policy, "draws", None))
    source = OfflineSource([] if online else train.rows, batch_size=cfg.train.batch_size, **make)
    steps = 0 if online else cfg.train.steps or source.steps(cfg.train.epochs)
    source.total = steps or None
    judged = [] if as_prompts["eval"] else held_out.rows
    teacher, taught = make_teacher(cfg, policy, objective, source, judged, steps, accelerator)
    references = make_references(cfg, policy, objective, source, judged, steps, accelerator)
    averages = moving_averages(objective, policy)
    if cfg.sampler.negative:
        policy.sides = make_sides(cfg, policy, references.initial, accelerator.device)
    engine = Engine(policy, objective, references.reference, cfg.optim, accelerator, cfg.reference.refresh != "never", teacher, cfg.seed,
                    deepspeed_json(cfg))
    if stepwise:
        source = TrajectorySource(engine, train, reward, cfg, source, scorer)
    elif online:
        parts = (engine, train, reward, cfg.source, cfg.sampler, cfg.data.pairs, folder, source)
        pictured = cfg.model.kind == "diffusion"
        source = PictureRounds(*parts, given=given, start=references.initial) if pictured else OnlineSource(*parts)
    moving = Moving(engine, source, cfg, averages)
    total = cfg.train.steps or source.steps(cfg.train.epochs)
    beta = _set_beta(cfg, engine, source, total)
    if accelerator.is_main_process and (idle := moving.stands_still(total)):
        print(idle, file=sys.stderr)
    held_out_source = None
    if held_out.rows and not as_prompts["eval"]:
        held_out_source = OfflineSource(held_out.rows, batch_size=len(held_out.rows), **{**make, "view": view})
    judge = Judge(engine, held_out_source, unique_prompts(held_out, cfg.evaluation.prompts), cfg.sampler, cfg.seed,
                  rewards | beside, references.initial, parts=pictures.parts(cfg.data.source))
    peak, peak_from = find_peak(cfg.hardware, accelerator.device) if engine.kind.shape else (None, None)
    about = {
        "device": str(accelerator.device), "machine": machine(accelerator.device),
        "peak": peak and {"tflops": float(f"{peak / 1e12:.4g}"), "from": peak_from},
        "processes": accelerator.num_processes, "threads": torch.get_num_threads(),
        "precision": cfg.hardware.precision,
        "model": {**policy.source, "adapter": adapter_fingerprint(cfg.model.adapter)}, **references.about, **taught,
        "scoring": getattr(policy, "scoring", None), **beta,
        "rewards": {name: getattr(reward, "source", "known of the world") for name, reward in (rewards | beside).items()},
        "trainable_parameters": sum(whole_shape(p).numel() for p in policy.trainable().values()),
        "parameters": sum(whole_shape(p).numel() for p in policy.parameters()),
        "tokenizer_sha256": policy.tokeniser.digest() if hasattr(policy, "tokeniser") else None,
        "data": {s.name: {"sha256": read[s.name], "revision": s.revision, **d.stats} for s, d in
                 ((train_split, train), (held_out_split, held_out))}
        | ({"captions": told} if (told := getattr(policy, "captions", None)) else {}),
    }
    return Run(cfg, folder, engine, source, moving, judge, held_out, total, is_initial,
               unit(objective.view, {row.kind for row in train.rows}, online), peak, about)


def _set_beta(cfg: TrainConfig, engine: Engine, source: OfflineSource | OnlineSource, steps: int) -> dict[str, float]:
    """Gives an objective with `beta: auto` its number, for the manifest: the one that the run began with, or one found now."""
    wanted = factor(cfg.algo)
    if wanted is None:
        return {}
    known = read_manifest(Path(cfg.run_dir)).get("beta")
    if known is None:
        known, spread = find_beta(engine, source.step(0), source.step(min(1, steps - 1)), wanted)
        if engine.accelerator.is_main_process:
            print(f"algo.beta=auto: {known:.4g}; a step at optim.lr={cfg.optim.lr:g} moves other pairs by {spread:.4g} nats (root "
                  f"mean square), where the gradient factor is then {wanted:g}", file=sys.stderr)
    engine.objective.beta = known
    return {"beta": known}


def say_rejected(*parts: Split | Dataset) -> None:
    """Nothing is left out or cut without a word."""
    for split, data in zip(parts[:2], parts[2:], strict=True):
        for note in split.notes:
            print(f"data: {note}", file=sys.stderr)
        for name, done in transform_lines(split):
            print(f"data: {split.name} rows, transform {name}: {done}", file=sys.stderr)
        if split.rejected:
            shown = "; ".join(f"{r.origin}: {r.reason}" for r in split.rejected[:3]) + ("; ..." if len(split.rejected) > 3 else "")
            print(f"data: {len(split.rejected)} {split.name} rows left out ({shown})", file=sys.stderr)
        if split.no_preference:
            shown = "; ".join(f"{count} {reason}" for reason, count in split.no_preference.most_common())
            print(f"data: {split.no_preference.total()} {split.name} rows prefer nothing and are left out ({shown})", file=sys.stderr)
        for what in ("truncated_prompts", "truncated_completions", "truncated_extra_sequences", "undesirable_left_out",
                     "rows_without_mismatched_reply"):
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


def make_trackers(run: Run, step: int) -> list[Guarded]:
    """The trackers of the main process, of a run that goes on after `step`. metrics.jsonl still holds what an earlier start has logged."""
    cfg, trackers = run.cfg, []
    config = plain_config(cfg, cfg.algo["name"])
    folder = run.folder.resolve()
    sweep = next((p.name for p in folder.parents if (p / "sweep.json").exists()), None)
    rows = read_jsonl(folder / "metrics.jsonl")
    if wandb := make_wandb(cfg.tracker, folder, config, cfg.tracker.group or sweep, folder.name, wandb_labels(config), rows):
        trackers.append(Guarded(wandb))
    if cfg.tracker.tensorboard:
        from prefopt.tracking.tensorboard_tracker import TensorboardTracker

        trackers.append(Guarded(TensorboardTracker(folder, config, step)))
    return trackers
