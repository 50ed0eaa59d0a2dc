"""`prefopt eval` and `prefopt sample`: a finished (or stopped) run, from its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt.config.schema import EvalConfig, SampleConfig, TrainConfig
from prefopt.data.records import Example, parse_row
from prefopt.errors import UserError
from prefopt.training import checkpoint
from prefopt.training.rundir import load_run_config, write_atomic
from prefopt.training.setup import Run, make_accelerator, set_up


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Judges a run before and after training on the same prompts and seed; prints a table and writes it as JSON."""
    run = _open(cfg.run, lambda c: replace(c, sampler=cfg.sampler, evaluation=replace(c.evaluation, prompts=cfg.prompts)))
    run.judge.seed = cfg.seed
    before, _ = run.judge(0)
    state = _load(run)
    after, samples = run.judge(state["step"])
    figures = {"run": cfg.run, "step": state["step"], "prompts": len(samples), "before": before, "after": after}
    output = Path(cfg.output) if cfg.output else run.folder / "eval.json"
    if run.main:
        write_atomic(output, json.dumps(figures, indent=2))
        print(_table(before, after))
        rows = len(run.judge.held_out.rows) if run.judge.held_out else 0
        print(f"{len(samples)} held-out prompts, {rows} held-out rows; written to {output}")
    return figures


def sample(cfg: SampleConfig) -> list[str]:
    """Prints replies of the trained policy: several to one prompt, or one each to held-out prompts."""
    run = _open(cfg.run, lambda c: replace(c, evaluation=replace(c.evaluation, prompts=0, kl=False)))
    _load(run)
    policy = run.engine.policy
    if cfg.prompt is not None:
        examples: list[Example] = [parse_row({"prompt": cfg.prompt}, {"prompt": "prompt"})] * cfg.count
    else:
        examples = run.held_out.examples[: cfg.count]
        if not examples:
            raise UserError(f"{cfg.run} has no held-out prompts; ask something with prompt=...")
    replies = policy.generate([policy.prompt_ids(e.prompt, e.chat) for e in examples], cfg.sampler, cfg.seed)
    for example, reply in zip(examples, replies, strict=True):
        print(f"> {example.prompt_text}\n{reply.text}\n")
    return [r.text for r in replies]


def _open(folder: str, change: Any) -> Run:
    cfg: TrainConfig = load_run_config(Path(folder))
    cfg = change(replace(cfg, hardware=replace(cfg.hardware, processes=1)))
    if not checkpoint.steps(Path(folder) / "checkpoints"):
        raise UserError(f"{folder} has no checkpoint yet; train it first (the command is in its manifest.json)")
    return set_up(cfg, make_accelerator(cfg))


def _load(run: Run) -> dict[str, Any]:
    return checkpoint.load(run.folder / "checkpoints", run.engine)


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    lines = [f"{'':<18} {'before':>12} {'after':>12}   95 % interval"]
    for key in after:
        if key.endswith(("_low", "_high")):
            continue
        low, high = after.get(f"{key}_low"), after.get(f"{key}_high")
        span = f"   [{low:.4g}, {high:.4g}]" if low is not None else ""
        lines.append(f"{key:<18} {before[key]:>12.4g} {after[key]:>12.4g}{span}")
    return "\n".join(lines)
