"""For every objective: shared prompts and chunked logits give the loss and all gradients of the plain path, computed in float64.

Plain means: each prompt again for each of its completions, right-padded rows, all logits at once.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from samples import YAML, floats, random_rows, several

from prefopt.config.catalogue import algo_info
from prefopt.config.schema import TrustConfig
from prefopt.data.batch import Row, build
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import Objective, reduce_terms, total_weights
from prefopt.policies import logprob
from prefopt.policies.causal_lm import CausalLM
from prefopt.policies.owned import give_module
from prefopt.policies.reward_model import RewardModel
from prefopt.policies.teacher import Teacher
from prefopt.training.engine import Engine
from tests.extra_samples import row_with_extra
from tests.toy import data_config, model_config, save_model

CLOSE = {"rtol": 1e-4, "atol": 3e-6}  # float64, but for the norms, which transformers computes in float32 whatever comes in


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks in each batch, the last one not full."""
    monkeypatch.setitem(logprob.CHUNK, "cpu", 400 * 7)


def load(folder, objective: Objective, layout: str, seed: int = 0):
    return loaded(folder, RewardModel if "reward" in objective.quantities["policy"] else CausalLM, layout, seed)


@cache
def loaded(folder, kind: type, layout: str, seed: int):
    """One model for all objectives: they only ever ask for its scores and their gradients."""
    fast = layout != "rows"
    settings = model_config(folder, share_prompts=fast, fused_head=fast, attention="varlen" if layout == "packed" else "sdpa")
    policy = kind(settings, data_config(), TrustConfig(), torch.device("cpu"), "fp32", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    policy.to(torch.float64)
    assert policy.layout == layout
    if kind is RewardModel:
        policy.inner.score.float()  # the one number per completion is computed in float32, on both paths
    return policy


def empty_prompt(row: Row) -> Row:
    """The same without a prompt: nothing predicts a completion's first token, so it is not trained."""
    def behead(branches):
        return [Branch([5, *b.ids], [False, *b.mask], True) for b in branches]
    return replace(row, tokens=Tokens([], behead(row.tokens.branches)), mismatched=row.mismatched and behead(row.mismatched))


def one_token(row: Row) -> Row:
    def cut(branches):
        return [Branch(b.ids[-1:], [True], True) for b in branches]
    return replace(row, tokens=Tokens(row.tokens.prompt, cut(row.tokens.branches)), mismatched=row.mismatched and cut(row.mismatched))


def many(objective: Objective, rng: random.Random) -> list[Row]:
    """K = 5 where the view takes rankings or groups of any size."""
    (row,) = random_rows(objective, rng, 1)
    replies = [Branch([rng.randint(4, 99) for _ in range(n)], [True] * n, True) for n in (1, 9, 4, 2, 6)]
    tokens, scores = Tokens(row.tokens.prompt, replies), sorted((rng.random() for _ in replies), reverse=True)
    if objective.view in ("pairs", "ranking"):
        return [replace(row, tokens=tokens, scores=scores, kind="ranking_all", label=1.0)]
    return [replace(row, tokens=tokens, scores=scores)] if objective.view == "groups" else []


def one(objective: Objective, rows: list[Row]) -> list[Row]:
    """K = 1 where the view takes it."""
    if objective.view in ("pairs", "ranking", "groups"):
        return []
    alone = [replace(r, tokens=Tokens(r.tokens.prompt, r.tokens.branches[:1])) for r in rows]
    if objective.view == "unary":
        kept = [r.mismatched[:1] if r.mismatched else None for r in alone]
        alone = [replace(r, kind="unary", desirable=[i % 2 == 0], mismatched=m) for i, (r, m) in enumerate(zip(alone, kept, strict=True))]
    return alone


def shapes(objective: Objective) -> dict[str, list[Row]]:
    rng = random.Random(f"shapes {type(objective).__name__}")
    rows = random_rows(objective, rng, 6)
    long = random_rows(objective, rng, 3)
    for row in long:
        row.tokens.prompt = [rng.randint(4, 99) for _ in range(rng.randint(20, 60))]
    found = {
        "random lengths": rows, "long prompts": long, "K = 1": one(objective, rows), "K = 5": rows[:1] + many(objective, rng),
        "one token": [one_token(r) for r in rows], "no prompt": [empty_prompt(rows[0]), *rows[1:3], empty_prompt(rows[3])],
        "one prompt": [replace(r, tokens=Tokens(rows[0].tokens.prompt, r.tokens.branches)) for r in rows],
        "a single row": rows[:1],
    }
    return {name: [row_with_extra(objective, row, rng) for row in rows] for name, rows in found.items() if rows}


def loss_and_gradients(policy, scorers, objective: Objective, micro):
    """As the engine scores a micro-batch, without its optimiser."""
    engine = object.__new__(Engine)
    vars(engine).update({"policy": policy, "model": policy, "objective": objective, "beside": {}, **scorers})
    give_module(policy, objective, seed=0)
    if hasattr(policy, "owned"):
        policy.owned.double().eval()  # without dropout
    batch = engine.score(micro)
    loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, micro.layout))
    policy.zero_grad()
    loss.backward()
    gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in policy.trainable().items()}
    if hasattr(policy, "owned"):
        del policy.owned
    return loss.item(), gradients


def frozen(folder, objective: Objective, layout: str) -> dict[str, Any]:
    """The other scorers, as the engine names them."""
    made = {}
    if "reference" in objective.quantities:
        made["reference"] = torch.no_grad()(load(folder, objective, layout, seed=1))
    if "teacher" in objective.quantities:
        made["teacher"] = Teacher(objective, *(load(folder, objective, layout, seed=seed) for seed in (2, 3)))
    made["beside"] = {name: torch.no_grad()(load(folder, objective, layout, seed=2)) for name in objective.averages()}
    return made


@pytest.mark.parametrize("slug", [slug for slug in YAML if not algo_info(slug).stepwise])
def test_trap_21_fast_equals_plain_in_float64(folder, slug):
    """Both fast layouts, with the YAML's settings in every shape of batch, and with every combination of its switches."""
    objective, *variants = several(slug, draws=1)
    moved, all_shapes = 0.0, shapes(objective)
    cases = [(objective, name) for name in all_shapes] + [(variant, "random lengths") for variant in variants]
    for objective, name in cases:
        rows = all_shapes[name]
        if len(rows) < objective.min_batch:
            continue
        micro = build(rows, range(len(rows)), objective.view, 0, soft_labels="label" in objective.columns)
        noise = floats(random.Random(name).gauss(-3, 0.3) for _ in micro.layout.token_edge)
        if "previous" in objective.quantities:
            micro.stored["previous"] = {"token_logp": noise}

        def on(layout, objective=objective, micro=micro):
            return loss_and_gradients(load(folder, objective, layout), frozen(folder, objective, layout), objective, micro)

        plain_loss, plain_gradients = on("rows")
        # CLOSE suits gradients of up to hundreds, as IPO's. Beyond that rounding grows with them (SPPO, Cal-DPO); WPO's are so small that
        # CLOSE would pass anything.
        largest = max(float(g.abs().max()) for g in plain_gradients.values())
        unit = largest if 0 < largest < 0.01 else largest / 10 if largest > 500 else 1.0
        for layout in ("trees", "packed"):
            loss, gradients = on(layout)
            assert loss == pytest.approx(plain_loss, rel=1e-6, abs=1e-9), (layout, name)
            for weight, gradient in plain_gradients.items():
                where = f"{layout}, {name}, {weight}"
                torch.testing.assert_close(gradients[weight] / unit, gradient / unit, **CLOSE, msg=lambda m, where=where: f"{where}: {m}")
        moved += sum(float(g.abs().sum()) for g in plain_gradients.values()) / unit
    assert moved > 1e-3
