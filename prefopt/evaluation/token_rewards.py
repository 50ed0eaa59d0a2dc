"""Which tokens of a reply its implicit reward comes from (From r to Q*, arXiv 2404.12358), as JSON and as a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.data.batch import Row
from prefopt.errors import UserError
from prefopt.evaluation.data_check import names
from prefopt.policies.reference import Reloaded
from prefopt.report.page import render, write_page
from prefopt.training.judge import COMPARABLE
from prefopt.training.rundir import write_atomic
from prefopt.training.setup import Run

SHOWN = 50  # rows on the page; the JSON has all


def token_rewards(logp: Tensor, reference: Tensor, beta: float) -> Tensor:
    """[N] beta (log pi(a_t | s_t) - log ref(a_t | s_t)), in the units of the objective's reward.

    In the token-level decision process in which pi is optimal for a reward r, this is r(s_t, a_t) + V(s_t+1) - V(s_t), V the optimal soft
    value. The tokens of a reply sum to its implicit reward beta (log pi(y | x) - log ref(y | x)).
    """
    return beta * (logp - reference)


def export(run: Run, count: int, output: Path) -> dict[str, Any]:
    """Writes `token_rewards.json` and `.html` beside `output`, for the first `count` held-out rows under the policy as it stands; returns
    what the JSON holds. Raises `UserError` where tokens have no rewards. beta is the objective's; 1 (nats) where it reads no reference."""
    engine, judge = run.engine, run.judge
    if engine.policy.quantity == "reward":
        raise UserError(f"tokens=true: {run.folder} holds a reward model, which gives a reply one number and its tokens none; leave it out")
    if judge.held_out is None or not judge.held_out.rows:
        raise UserError(f"tokens=true: {run.folder} has no held-out replies; name some with data.eval, or leave it out")
    reference = engine.reference if engine.reference is not None and not engine.moving_reference else judge.initial
    beta = getattr(engine.objective, "beta", 1.0) if "reference" in engine.objective.quantities else 1.0
    rows = [replace(row, mismatched=None, extra=[], stored={}) for row in judge.held_out.rows[:count]]
    replies = []
    for number, (row, scored) in enumerate(zip(rows, _score(run, rows, reference), strict=True)):
        example = run.held_out.examples[number]
        x = row.tokens.prompt
        for name, completion, branch, (logp, start) in zip(names(example), example.completions, row.tokens.branches, scored, strict=False):
            ids = [i for i, trained in zip(branch.ids, branch.mask, strict=True) if trained]
            values = token_rewards(logp, start, beta)
            replies.append({
                "row": number, "name": name, "prompt": example.prompt_text, "text": completion.text, "reward": float(values.sum()),
                "logp": float(logp.sum()), "ids": ids, "tokens": texts(getattr(run.engine.policy, "tokenizer", None), x, ids),
                "rewards": values.tolist(),
            })
    made = {"run": str(run.folder), "algo": run.cfg.algo["name"], "beta": beta, "reference": reference.how, "replies": replies}
    write_atomic(output.with_name("token_rewards.json"), json.dumps(made, indent=2))
    shown = [reply for reply in replies if reply["row"] < SHOWN]
    sizes = sorted(abs(value) for reply in shown for value in reply["rewards"])
    largest = sizes[int(0.98 * (len(sizes) - 1))] or 1.0
    marked = [{**reply, "marked": [(text, value, _colour(value / largest)) for text, value in
                                   zip(reply["tokens"], reply["rewards"], strict=True)]} for reply in shown]
    write_page(output.with_name("token_rewards.html"), render("token_rewards.html.j2", **{**made, "replies": marked}, rows=len(rows),
                                                              shown=min(len(rows), SHOWN), largest=largest))
    return made


@torch.no_grad()
def _score(run: Run, rows: Sequence[Row], reference: Callable) -> list[list[tuple[Tensor, Tensor]]]:
    """Of each reply of each row the log-probs of its trained tokens under the policy and under the reference, float64."""
    engine, view = run.engine, run.judge.held_out.view
    if view not in ("pairs", "unary", "ranking") and any(row.kind in COMPARABLE for row in rows):
        view = "pairs"
    out: list[list[tuple[Tensor, Tensor]]] = [[] for _ in rows]
    was_training = engine.policy.training
    engine.policy.eval()
    try:
        for micro in replace(run.judge.held_out, rows=list(rows), view=view, batch_size=len(rows)).everything(view):
            micro = micro.to(engine.accelerator.device)
            lengths = micro.layout.lengths.tolist()
            ours, theirs = (f(micro).double().cpu().split(lengths) for f in (engine.policy, reference))
            of = [number for number in micro.rows for _ in rows[number].branches(view)]
            for number, pair in zip(of, zip(ours, theirs, strict=True), strict=True):
                out[number].append(pair)
    finally:
        engine.policy.train(was_training)
        if isinstance(reference, Reloaded):
            reference.release()
    return out


def texts(tokenizer: Any, prompt: list[int], ids: list[int]) -> list[str]:
    """What each token adds to the text of its reply; a character of several tokens counts for the last of them. One token alone would
    not show the blank before it where the tokenizer has none in its words."""
    if tokenizer is None:  # a table of the bandit world
        return [f"{prompt[0]}:{token}" for token in ids]
    so_far = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False).rstrip("\ufffd") for n in range(len(ids) + 1)]
    return [after.removeprefix(before) for before, after in pairwise(so_far)]


def _colour(share: float) -> str:
    """Blue for rewards above 0, orange for those below, the stronger the larger: colours that most eyes tell apart."""
    strength = min(abs(share), 1.0)
    return f"rgb({'31 119 180' if share > 0 else '225 110 20'} / {0.75 * strength:.2f})"
