"""One optimiser step: what it computes never depends on how it is split."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from prefopt.config.catalogue import algo_info, groups
from prefopt.config.schema import OptimConfig
from prefopt.data.batch import Row
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import About
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.unary import KTO, SFT
from prefopt.policies.asked import answer
from prefopt.policies.logprob import Head
from prefopt.policies.owned import consult
from prefopt.policies.teacher import Teacher
from prefopt.training.engine import Engine, learning_rate
from prefopt.training.metrics import Averages, pair_metrics
from prefopt.training.setup import make_objective
from prefopt.training.source import OfflineSource
from tests.extra_samples import row_with_extra
from tests.toy_runs import fresh_accelerator, gradients

VOCABULARY = 13

OF_SEQUENCES = [slug for slug in groups()["algo"] if not algo_info(slug).stepwise]  # transitions: test_trajectories


class TinyPolicy(nn.Module):
    """A bigram model with context averaging: enough to have every edge's score depend on shared weights."""

    quantity = "token_logp"
    about = About(6, 1)

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(VOCABULARY, 6, generator=generator, dtype=dtype))
        self.head = nn.Parameter(torch.randn(6, VOCABULARY, generator=generator, dtype=dtype))
        self.pad = 0

    def forward(self, micro, asked=None):
        hidden = self.embed[micro.input_ids] * micro.attention[..., None]
        hidden = (hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[None, :, None]).tanh()
        logp = (hidden @ self.head).log_softmax(-1)[:, :-1]
        targets = logp.gather(-1, micro.input_ids[:, 1:, None]).squeeze(-1)
        trained = micro.trained[:, 1:]
        if asked is None:
            return targets[trained]
        states = hidden[:, :-1][trained]
        said = answer(asked, targets[trained], states, Head(self.head.t()), states[:, None])
        return said | consult(self, micro, states, asked.given) if asked.module else said

    def trainable(self):
        return dict(self.named_parameters())


class TinyReward(TinyPolicy):
    """The same as a reward model: one number, read off the last token."""

    quantity = "reward"

    def forward(self, micro):
        hidden = self.embed[micro.input_ids] * micro.attention[..., None]
        last = micro.attention.sum(1)
        return ((hidden.sum(1) / last[:, None]).tanh() @ self.head)[:, 0]


def make_rows(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(VOCABULARY) for _ in range(n)]

    def branch():
        n = rng.randint(1, 7)
        return Branch(ids(n), [rng.random() < 0.8 for _ in range(n - 1)] + [True], True)

    return [
        Row(Tokens(ids(rng.randint(1, 5)), [branch(), branch()]), "pair", label=rng.choice([1.0, 0.7]), weight=rng.choice([1.0, 0.5]),
            mismatched=[branch(), branch()])
        for _ in range(count)
    ]


def engine_of(objective, accelerator, seed: int = 0) -> Engine:
    reference = TinyPolicy(seed + 1).requires_grad_(False)
    policy = TinyReward(seed) if "reward" in objective.quantities["policy"] else TinyPolicy(seed)
    teacher = Teacher(objective, TinyPolicy(seed + 3), TinyPolicy(seed + 4)) if "teacher" in objective.quantities else None
    optim = OptimConfig(lr=1e-2, max_grad_norm=1e9)
    engine = Engine(policy, objective, lambda *asked: reference(*asked), optim, accelerator, teacher=teacher)
    engine.beside |= {name: TinyPolicy(seed + 2).requires_grad_(False) for name in objective.averages()}
    return engine


def rows_for(objective, count: int) -> list[Row]:
    rows = make_rows(count)
    rng = random.Random("judged")
    for row in rows:
        if not objective.mismatched:
            row.mismatched = None
        if objective.view == "groups":
            row.kind, row.scores = "group", [rng.random() for _ in row.tokens.branches]
            row.stored = {"previous": [[-3 * rng.random() for _ in range(b.trained)] for b in row.tokens.branches]}
    return [row_with_extra(objective, row, rng, VOCABULARY) for row in rows]


def source_of(objective, rows, budget, world=1, rank=0, batch=8) -> OfflineSource:
    return OfflineSource(rows, objective.view, batch, budget, 0, "label" in objective.columns, 0, rank, world)


def objective_named(slug: str):
    from prefopt.config.catalogue import load_yaml

    return make_objective({**load_yaml("algo", slug)})


@pytest.mark.parametrize("slug", OF_SEQUENCES)
def test_gradient_is_the_same_for_1x8_and_8x1(slug):
    objective = objective_named(slug)
    rows = rows_for(objective, 8)
    found = []
    for budget in (10**6, 1):
        with fresh_accelerator() as accelerator:
            micros = source_of(objective, rows, budget).step(0)
            assert len(micros) == (1 if budget > 1 else 8)
            found.append(gradients(engine_of(objective, accelerator), micros))
    (whole, loss), (split, loss_split) = found
    assert loss == pytest.approx(loss_split, rel=1e-10)
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-9, atol=1e-12)
        assert whole[name].abs().max() > 0


@pytest.mark.parametrize("slug", OF_SEQUENCES)
def test_step_gradient_equals_autograd_of_the_whole_loss(slug):
    """The engine (two-pass replay included) against one plain backward over everything at once."""
    from prefopt.objectives.base import reduce_terms, total_weights

    objective = objective_named(slug)
    rows = rows_for(objective, 8)
    with fresh_accelerator() as accelerator:
        engine = engine_of(objective, accelerator)
        micro = source_of(objective, rows, 10**6).step(0)[0]
        batch = engine.score(micro)
        loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, batch))
        expected = torch.autograd.grad(loss, list(engine.policy.trainable().values()))
        got, _ = gradients(engine, source_of(objective, rows, 40).step(0))
    for grad, want in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)


def test_filler_changes_nothing():
    objective = DPO()
    rows = rows_for(objective, 3)
    source = source_of(objective, rows, 10**6, batch=3)
    with fresh_accelerator() as accelerator:
        plain, _ = gradients(engine_of(objective, accelerator), source.step(0))
    with fresh_accelerator() as accelerator:
        from prefopt.data.batch import build

        filled, _ = gradients(engine_of(objective, accelerator), [*source.step(0), build(rows, [], "pairs", 0)])
    for name in plain:
        torch.testing.assert_close(plain[name], filled[name], rtol=1e-12, atol=0)


def test_trap_17_metrics_are_means_over_units_and_ties_count_half():
    rows = rows_for(DPO(), 5)
    for row in rows:
        row.label = row.weight = 1.0
    with fresh_accelerator() as accelerator:
        whole = engine_of(DPO(), accelerator).step(source_of(DPO(), rows, 10**6, batch=5).step(0), 0.0)
    with fresh_accelerator() as accelerator:
        split = engine_of(DPO(), accelerator).step(source_of(DPO(), rows, 30, batch=5).step(0), 0.0)
    assert split.metrics == pytest.approx(whole.metrics)
    with fresh_accelerator() as accelerator:
        engine = engine_of(DPO(), accelerator)
        engine.reference = lambda m: engine.policy(m).detach()
        tied = engine.step(source_of(DPO(), rows, 10**6, batch=5).step(0), 0.0)
    assert tied.metrics["accuracy"] == 0.5 and tied.metrics["reward/margin"] == 0.0


def test_trap_17_rounding_is_a_tie():
    """Margins before the first step, where stored scores of the reference differ from the policy's by rounding."""
    objective = DPO(beta=0.1)
    (micro,) = source_of(objective, rows_for(objective, 6), 10**6, batch=6).step(0)
    policy = -torch.rand(len(micro.layout.lengths), dtype=torch.float64) * 300
    for noise, expected in ((1e-5, 0.5), (-1e-5, 0.5), (1.0, 1.0), (-1.0, 0.0)):
        reference = policy.clone()
        reference[micro.layout.pairs.rejected] += noise
        scores = {"policy": {"logp": policy}, "reference": {"logp": reference}}
        batch, averages = replace(micro.layout, scores=scores), Averages()
        pair_metrics(objective, batch, averages)
        assert averages.reduce(lambda t: t)["accuracy"] == expected


def test_trap_18_mismatched_edges_carry_no_gradient():
    objective = KTO()
    rows = rows_for(objective, 4)
    with fresh_accelerator() as accelerator:
        engine = engine_of(objective, accelerator)
        calls = []
        forward = engine.policy.forward
        engine.policy.forward = lambda m: (calls.append((len(m.input_ids), torch.is_grad_enabled())), forward(m))[1]
        engine.step(source_of(objective, rows, 10**6, batch=4).step(0), 0.0)
    assert calls == [(16, False), (8, True)]


def test_a_step_that_is_not_finite_is_skipped_and_leaves_the_weights_alone():
    with fresh_accelerator() as accelerator:
        engine = engine_of(DPO(), accelerator)
        before = {n: p.detach().clone() for n, p in engine.policy.trainable().items()}
        engine.reference = lambda m: torch.full((int(m.trained[:, 1:].sum()),), float("nan"), dtype=torch.float64)
        result = engine.step(source_of(DPO(), rows_for(DPO(), 4), 10**6, batch=4).step(0), 1e-2)
    assert result.skipped
    for name, parameter in engine.policy.trainable().items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_clipping_uses_the_global_norm():
    with fresh_accelerator() as accelerator:
        engine = engine_of(SFT(), accelerator)
        engine.cfg = OptimConfig(max_grad_norm=1e-3)
        seen, _ = gradients(engine, source_of(SFT(), rows_for(SFT(), 8), 40).step(0))
    assert torch.cat([g.flatten() for g in seen.values()]).norm() == pytest.approx(1e-3, rel=1e-4)


def test_learning_rate_schedules():
    cosine = OptimConfig(lr=1.0, schedule="cosine", warmup=0.1)
    assert [learning_rate(s, 20, cosine) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(11, 20, cosine) == pytest.approx(0.5)
    assert learning_rate(19, 20, cosine) < 0.02
    linear = OptimConfig(lr=1.0, schedule="linear", warmup=0.0)
    assert learning_rate(5, 10, linear) == pytest.approx(0.5)
    constant = OptimConfig(lr=0.3, schedule="constant", warmup=0.0)
    assert learning_rate(9, 10, constant) == 0.3
