"""`prefopt eval` and `prefopt sample`: a finished (or stopped) run, from its folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt.config.schema import EvalConfig, SampleConfig, TeacherConfig, TrainConfig
from prefopt.data.dataset import make_dataset
from prefopt.data.records import Example, parse_row
from prefopt.data.sources import Split, load_data
from prefopt.data.transforms import apply_transforms
from prefopt.errors import UserError
from prefopt.evaluation import judging, pictures
from prefopt.evaluation.revise import self_revise
from prefopt.evaluation.reward_calibration import judge_rewards
from prefopt.evaluation.token_rewards import export
from prefopt.policies.negative import negative_of
from prefopt.training import checkpoint
from prefopt.training.judge import Judge, Judgement
from prefopt.training.rundir import load_run_config, write_atomic
from prefopt.training.setup import Run, make_accelerator, set_up


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Judges a run before and after training on the same prompts and seed, or two runs beside each other. Prints a table, writes JSON."""
    run = _open_to_judge(cfg.run, cfg)
    before, rankings = run.judge.measure(0), _whole_rankings(run)
    run.judge.start_drawn = run.judge.drawn
    if rankings:
        before.pairs |= _taus(rankings)
    state = _load(run)
    after = run.judge.measure(state["step"])
    if rankings:
        after.pairs |= _taus(rankings)
    rows = len(run.judge.held_out.rows) if run.judge.held_out else 0
    figures: dict[str, Any] = {
        "run": cfg.run, "step": state["step"], "prompts": len(after.samples), "rows": rows, "before": before.row(), "after": after.row(),
        "difference": judging.differences(after.measures, before.measures),
        "not_measured": judging.not_measured(run.judge, run.cfg, after),
    }  # fmt: skip
    output, main = Path(cfg.output) if cfg.output else run.folder / "eval.json", run.main
    lines = [judging.table(before, after, figures["difference"])]
    if run.engine.policy.layout == "draws" and len(after.samples) > 1:
        text, figures["frechet"] = pictures.moved(before.samples, after.samples)
        lines.append(text)
    lines += ["", "[95 % interval over prompts]   * the difference, paired by prompt, excludes 0 (not corrected for the number of lines)"]
    lines += [f"not measured: {what}: {why}" for what, why in figures["not_measured"].items()]
    if run.engine.policy.quantity == "reward" and rows:
        text, figures["calibration"] = judge_rewards(run)
        lines += ["", *text]
    if cfg.against is not None:
        text, figures["against"] = _against(cfg, run, after)
        lines += ["", text]
    if cfg.tokens:
        count = len(export(run, cfg.prompts or rows, output)["replies"])
        lines += [f"token rewards of {count} held-out replies: {output.with_name('token_rewards.html')}, and as JSON beside it"]
    if main:
        write_atomic(output, json.dumps(figures, indent=2))
        print("\n".join(lines))
        print(f"{len(after.samples)} held-out prompts sampled, {rows} held-out rows; written to {output}")
    return figures


def _open_to_judge(folder: str, cfg: EvalConfig) -> Run:
    if cfg.tokens and load_run_config(Path(folder)).model.kind == "diffusion":
        raise UserError(f"tokens=true: {folder} makes pictures, which have no tokens; set tokens=false")
    kl = {"kl": True} if cfg.tokens else {}  # token rewards are against the initial policy, where there is no other reference
    run = _open(folder, lambda c: replace(c, sampler=negative_of(cfg.sampler, c.sampler),
                                         evaluation=replace(c.evaluation, prompts=cfg.prompts, **kl)))
    run.judge.seed = cfg.seed
    return run


def _whole_rankings(run: Run) -> Judge | None:
    """A judge of the held-out rankings as they are, where the run itself was trained on the best and worst of each. None where its
    objective scores extra sequences, which were made for those two only."""
    whole = run.cfg.data.pairs == "all" or run.engine.objective.view == "ranking"
    if whole or run.engine.objective.extra or not run.judge.held_out or not any(e.kind == "ranking" for e in run.held_out.examples):
        return None
    policy, data = run.engine.policy, replace(run.cfg.data, pairs="all", on_bad_row="skip")
    split = load_data(data, run.cfg.trust)[1]
    apply_transforms([split], data, run.cfg.seed)
    tokenise = getattr(policy, "tokenise_eval", policy.tokenise)
    made = make_dataset(split, data, tokenise, "pairs", run.engine.objective.columns, False, run.cfg.seed)
    rows = [row for row in made.rows if row.kind == "ranking_all"]
    if not rows:
        return None
    source = replace(run.judge.held_out, rows=rows, view="pairs", batch_size=len(rows))
    return replace(run.judge, held_out=source, prompts=[], reference_judged=True)


def _taus(rankings: Judge) -> dict[str, Any]:
    return {name: values for name, values in rankings.measure(0).pairs.items() if name.endswith("kendall_tau")}


def _against(cfg: EvalConfig, run: Run, ours: Judgement) -> tuple[str, dict[str, Any]]:
    """(table, figures) of the run beside another one, on the same prompts and by the first one's rewards."""
    other = _open_to_judge(cfg.against, cfg)
    if [e.prompt_text for e in other.judge.prompts] != [e.prompt_text for e in run.judge.prompts]:
        raise UserError(
            f"{cfg.run} and {cfg.against} have different held-out prompts, so their replies cannot be paired; give runs over the same data "
            "(data.path, data.eval, data.eval_limit, data.eval_fraction and, where rows are held out by chance, seed)"
        )
    other.judge.rewards = run.judge.rewards
    other.judge.baseline = {}  # no win rates of its own: only the two runs are compared
    state = _load(other)
    theirs = other.judge.measure(state["step"])
    same_rows = _texts(run) == _texts(other)
    measures = {k: v for k, v in ours.measures.items() if k in judging.COMMON and (same_rows or k in ours.replies)}
    changes = judging.differences(measures, theirs.measures)
    direct = judging.head_to_head(ours.samples, theirs.samples)
    shown = [Judgement(replies={k: v for k, v in m.items() if k in changes}) for m in (theirs.measures, ours.measures)]
    lines = [judging.table(*shown, changes, (cfg.against, cfg.run, "second - first"))]
    for key, name in (("win_rate", "win rate"), ("lc_win_rate", "length-controlled win rate")):
        if key in direct:
            text = judging.span(direct[key], direct.get(f"{key}_low", math.nan), direct.get(f"{key}_high", math.nan), 100, 1)
            lines.append(f"{name} of {cfg.run} against {cfg.against}: {text} %")
    if not same_rows:
        lines.append("not compared: everything on held-out rows: the two runs hold out different rows")
    figures = {"run": cfg.against, "step": state["step"], "theirs": theirs.row(), "difference": changes, **direct}
    return "\n".join(lines), figures


def _texts(run: Run) -> list[tuple[str, ...]]:
    return [(e.prompt_text, *(f"{c.text} {c.picture or ''}" for c in e.completions)) for e in run.held_out.examples]


def sample(cfg: SampleConfig) -> list[str]:
    """Prints replies of the trained policy: several to one prompt, or one each to held-out prompts. Pictures are written to files, beside
    those of the initial policy; then their paths are printed."""
    run = _open(cfg.run, lambda c: replace(c, sampler=negative_of(cfg.sampler, c.sampler), teacher=TeacherConfig(),
                                           evaluation=replace(c.evaluation, prompts=0, kl=False)))
    policy = run.engine.policy
    if policy.quantity == "reward":
        raise UserError(f"{cfg.run} holds a reward model, which writes no replies; let it judge texts: prefopt label reward.path={cfg.run}")
    drawn = policy.layout == "draws"
    if not drawn:
        _load(run)
    if cfg.user is not None and getattr(policy, "users", None) is None:
        raise UserError(f"user={cfg.user}: the model of {cfg.run} is told no users (adapter=user); leave it out")
    if cfg.prompt is not None:
        asked = Split("eval", [parse_row({"prompt": cfg.prompt}, {"prompt": "prompt"})] * cfg.count)
        apply_transforms([asked], run.cfg.data, run.cfg.seed)
        examples: list[Example] = asked.examples
    else:
        examples = run.held_out.examples[: cfg.count]
        if not examples:
            raise UserError(f"{cfg.run} has no held-out prompts; ask something with prompt=...")
    if cfg.user is not None:
        examples = [example.told(cfg.user) for example in examples]
    if cfg.revise and run.cfg.model.kind == "tabular":
        raise UserError(f"revise={cfg.revise}: the replies of model={run.cfg.model.name} are no texts to revise; set revise=0")
    if drawn:
        return pictures.sample(run, examples, cfg, lambda: _load(run)["step"])
    written = self_revise(policy, examples, cfg.sampler, cfg.seed, cfg.revise)
    for example, (first, *revisions) in zip(examples, written, strict=True):
        print(f"> {example.prompt_text}\n{first}\n")
        for number, text in enumerate(revisions, 1):
            print(f"revision {number}: {text}\n")
    return [texts[-1] for texts in written]


def _open(folder: str, change: Any) -> Run:
    cfg: TrainConfig = load_run_config(Path(folder))
    # Nothing is judged twice here, so there is nothing to store.
    alone = replace(cfg.hardware, processes=1, nodes=1, zero=0, offload="none", deepspeed=None)
    cfg = change(replace(cfg, hardware=alone, reference=replace(cfg.reference, store="off")))
    if not checkpoint.steps(Path(folder) / "checkpoints"):
        raise UserError(f"{folder} has no checkpoint yet; train it first (the command is in its manifest.json)")
    return set_up(cfg, make_accelerator(cfg))


def _load(run: Run) -> dict[str, Any]:
    state = checkpoint.load(run.folder / "checkpoints", run.engine)
    if "ema" in run.engine.beside:
        run.engine.beside["ema"].take()
    return state
