"""Learning from one's own samples on the exact tabular world: the optima it leads to, and what it gains over given pairs."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from prefopt.config.catalogue import load_yaml
from prefopt.config.schema import ColumnsConfig, DataConfig, OptimConfig, RewardConfig, SamplerConfig, SourceConfig
from prefopt.data import bandit
from prefopt.data.batch import Row
from prefopt.data.dataset import make_prompts
from prefopt.data.sources import load_data
from prefopt.data.tokenise import Branch, Tokens
from prefopt.policies.reference import make_reference
from prefopt.policies.tabular import Tabular
from prefopt.rewards.true_reward import make_rewards
from prefopt.training.engine import Engine, learning_rate
from prefopt.training.online import OnlineSource
from prefopt.training.setup import make_objective
from prefopt.training.source import OfflineSource
from tests.toy_runs import fresh_accelerator

DATA = DataConfig(name="bandit", source="bandit", columns=ColumnsConfig(), eval_limit=None)
REWARD = torch.tensor(bandit.reward_table(), dtype=torch.float64)
REFERENCE = torch.tensor(bandit.reference_table(), dtype=torch.float64).exp()


def mean_reward(probabilities: torch.Tensor) -> float:
    return float((probabilities * REWARD).sum(-1).mean())


def trained(slug: str, source: SourceConfig, folder: Path, steps: int, lr: float, seed: int = 0, schedule: str = "cosine",
            moving: bool = False, **settings) -> torch.Tensor:
    """[PROMPTS, REPLIES] probabilities after `steps` updates; one update per round and `source.epochs`."""
    objective = make_objective({**load_yaml("algo", slug), **settings})
    optim = OptimConfig(lr=lr, warmup=0.0, max_grad_norm=1e9, schedule=schedule)
    with fresh_accelerator() as accelerator:
        policy = Tabular(torch.device("cpu"))
        engine = Engine(policy, objective, make_reference(policy, "initial", moving), optim, accelerator, moving)
        batches = OfflineSource([], objective.view, 10**6, 10**6, 0, "label" in objective.columns, seed)
        if source.kind == "offline":
            batches.rows, batches.batch_size, made = given_pairs(source.prompts * steps, seed), source.prompts, batches
        else:
            prompts = make_prompts(load_data(DATA)[0], DATA, policy.prompt_ids)
            reward = make_rewards(RewardConfig(), DATA)["true_reward"]
            folder.mkdir(exist_ok=True)
            made = OnlineSource(engine, prompts, reward, source, SamplerConfig(batch_size=512), "best_worst", folder, batches)
        for step in range(steps):
            engine.step(made.step(step), learning_rate(step, steps, optim))
        return policy.logits.detach().double().softmax(-1)


def given_pairs(count: int, seed: int) -> list[Row]:
    """Pairs of replies that the reference wrote, labelled by draws from Bradley-Terry on the true reward."""
    rng, rows = random.Random(f"pairs {seed}"), []
    for _ in range(count):
        x = rng.randrange(bandit.PROMPTS)
        a, b = rng.choices(range(bandit.REPLIES), REFERENCE[x].tolist(), k=2)
        if rng.random() > bandit.preference(x, a, b):
            a, b = b, a
        rows.append(Row(Tokens([x], [Branch([y], [True], True) for y in (a, b)]), "pair", weight=float(a != b)))
    return rows


def test_online_dpo_with_sampled_labels_reaches_the_tilted_reference(tmp_path):
    """Bradley-Terry labels are consistent whoever wrote the pairs, so the optimum is that of offline DPO."""
    source = SourceConfig("rounds", prompts=160, samples=2, labels="sampled")
    got = trained("online_dpo", source, tmp_path, 160, 0.1, beta=1.0)
    want = torch.tensor(bandit.optimal_policy(1.0), dtype=torch.float64)
    assert (got - want).abs().sum(-1).max() / 2 < 0.08
    assert (REFERENCE - want).abs().sum(-1).max() / 2 > 0.2


def grpo_optimum(beta: float, samples: int) -> torch.Tensor:
    """Where the expected gradient of GRPO without scaling is 0.

    The KL estimate's gradient under the policy's samples is that of KL(ref || pi), so pi (c R - V) + beta (ref - pi) = 0 with
    c = (n-1)/n because a reply is part of its own baseline: pi = beta ref / (beta + V - c R), V such that it sums to 1.
    """
    out = []
    for reward, reference in zip(REWARD * (samples - 1) / samples, REFERENCE, strict=True):
        low, high = float(reward.max()) - beta, float(reward.max()) + 100
        for _ in range(200):
            middle = (low + high) / 2
            total = float((beta * reference / (beta + middle - reward)).sum())
            low, high = (middle, high) if total > 1 else (low, middle)
        out.append(beta * reference / (beta + middle - reward))
    return torch.stack(out)


def test_grpo_reaches_its_regularised_optimum(tmp_path):
    source = SourceConfig("rollout", prompts=30, samples=16)
    got = trained("grpo", source, tmp_path, 120, 0.05, beta=1.0, scale_rewards=False)
    want = grpo_optimum(1.0, 16)
    assert torch.allclose(want.sum(-1), torch.ones(bandit.PROMPTS, dtype=torch.float64))
    assert (got - want).abs().sum(-1).max() / 2 < 0.05
    assert (got - torch.tensor(bandit.optimal_policy(1.0))).abs().sum(-1).max() / 2 > 0.05  # not the reverse-KL optimum


def test_grpo_with_the_unbiased_penalty_reaches_the_tilted_reference(tmp_path):
    source = SourceConfig("rollout", prompts=30, samples=16)
    got = trained("grpo", source, tmp_path, 120, 0.05, beta=1.0, scale_rewards=False, unbiased_kl=True)
    want = torch.tensor(bandit.optimal_policy(16 / 15), dtype=torch.float64)  # a reply is 1/16 of its own baseline
    assert (got - want).abs().sum(-1).max() / 2 < 0.05
    assert (got - grpo_optimum(1.0, 16)).abs().sum(-1).max() / 2 > 0.05


SEEDS = 8


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> list[float]:
    """What offline DPO reaches with 96 pairs per update, drawn from the reference: the true reward for each seed."""
    folder = tmp_path_factory.mktemp("offline")
    return [mean_reward(trained("dpo", SourceConfig(prompts=96), folder, 32, 0.1, seed)) for seed in range(SEEDS)]


@pytest.mark.parametrize("slug", ["online_dpo", "grpo"])
def test_beats_offline_dpo_on_the_same_number_of_samples(slug, offline, tmp_path):
    """32 updates of 192 judged replies each: with 64 the spread between seeds is as large as what is gained."""
    sources = {"online_dpo": SourceConfig("rounds", prompts=96, samples=2, labels="sampled"),
               "grpo": SourceConfig("rollout", prompts=24, samples=8)}
    gains = [mean_reward(trained(slug, sources[slug], tmp_path / f"{seed}", 32, 0.1, seed)) - offline[seed] for seed in range(SEEDS)]
    half = 2.365 * stdev(gains) / len(gains) ** 0.5  # Student's t with seven degrees of freedom
    assert fmean(gains) - half > 0, gains
