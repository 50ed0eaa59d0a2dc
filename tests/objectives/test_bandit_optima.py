"""On the exact tabular world: objectives reach the optima that theory gives in closed form, and all of them raise the true reward."""

from __future__ import annotations

import pytest
import torch

from prefopt.config.catalogue import algo_info, groups, load_yaml, modalities
from prefopt.config.schema import ColumnsConfig, DataConfig, OptimConfig
from prefopt.data import bandit
from prefopt.data.dataset import make_dataset
from prefopt.data.sources import load_data
from prefopt.policies.reference import make_reference
from prefopt.policies.reward_model import RewardTable
from prefopt.policies.tabular import Tabular
from prefopt.training.engine import Engine, learning_rate
from prefopt.training.moving import moving_averages
from prefopt.training.setup import make_objective
from prefopt.training.source import OfflineSource
from tests.toy_runs import fresh_accelerator


def trained(slug: str, steps: int, lr: float, noise: float = 0.0, **settings) -> torch.Tensor:
    """[PROMPTS, REPLIES] probabilities after full-batch training on every pair with its exact label probability."""
    return trained_table(slug, steps, lr, noise, **settings).softmax(-1)


def trained_table(slug: str, steps: int, lr: float, noise: float = 0.0, start: float = 0.0, **settings) -> torch.Tensor:
    """The table itself, whose entries begin higher by `start`."""
    data = DataConfig(name="bandit", source="bandit", columns=ColumnsConfig(), eval_limit=None, label_noise=noise)
    objective = make_objective({**load_yaml("algo", slug), **settings})
    split, _ = load_data(data)
    optim = OptimConfig(lr=lr, warmup=0.0, max_grad_norm=1e9)
    with fresh_accelerator() as accelerator:
        policy = RewardTable(torch.device("cpu")) if "reward" in objective.quantities["policy"] else Tabular(torch.device("cpu"))
        policy.logits.data += start
        rows = make_dataset(split, data, policy.tokenise, objective.view, objective.columns, objective.mismatched, 0).rows
        reference = make_reference(policy, "initial")
        source = OfflineSource(rows, objective.view, len(rows), 10**6, 0, "label" in objective.columns, 0)
        averages = moving_averages(objective, policy)
        engine = Engine(policy, objective, reference, optim, accelerator)
        engine.beside |= averages
        whole = source.step(0)  # every row, so every step is this one
        for step in range(steps):
            engine.step(whole, learning_rate(step, steps, optim))
        return policy.logits.detach().double()


def total_variation(a: torch.Tensor, b: list[list[float]]) -> float:
    """Largest over prompts of half the L1 distance."""
    return float((a - torch.tensor(b, dtype=torch.float64)).abs().sum(-1).max() / 2)


def mean_reward(probabilities: torch.Tensor) -> float:
    return float((probabilities * torch.tensor(bandit.reward_table(), dtype=torch.float64)).sum(-1).mean())


REFERENCE = [[2.718281828459045**v for v in row] for row in bandit.reference_table()]


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_dpo_reaches_the_tilted_reference(beta):
    assert total_variation(trained("dpo", 400, 0.1, beta=beta), bandit.optimal_policy(beta)) < 1e-3
    assert total_variation(torch.tensor(REFERENCE), bandit.optimal_policy(beta)) > 0.1  # it had some way to go


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_ipo_reaches_its_own_optimum(tau):
    assert total_variation(trained("ipo", 400, 0.1, tau=tau), bandit.ipo_optimal_policy(tau)) < 1e-3
    assert total_variation(torch.tensor(bandit.optimal_policy(tau)), bandit.ipo_optimal_policy(tau)) > 0.01


@pytest.mark.parametrize("centring", [0.0, 0.003])
def test_bradley_terry_finds_the_true_reward(centring):
    """All pairs with their exact probabilities: the true reward up to a constant per prompt. Pairs leave that constant where it is;
    with centring it is 0 at the optimum, and differences shrink a little."""
    truth = torch.tensor(bandit.reward_table(), dtype=torch.float64)
    found = trained_table("reward_bt", 600, 0.1, centring=centring, start=1.0)
    means = found.mean(-1)
    gap = (found - means[:, None] - truth + truth.mean(-1, keepdim=True)).abs().max()
    if centring:
        assert float(means.abs().max()) < 1e-3 and 0.05 < float(gap) < 0.15
    else:
        assert float(means.min()) > 0.5 and float(gap) < 1e-3


def test_label_noise_makes_dpo_less_sure():
    """With a share e of labels flipped the fitted margins are log-odds of (1-2e)p + e: a flatter policy, a lower reward."""
    clean, noisy = (mean_reward(trained("dpo", 400, 0.1, noise=e, beta=1.0)) for e in (0.0, 0.3))
    assert noisy < clean - 0.1


# What a method brings along beside noise and captions of pictures makes other rows than these.
GIVEN_ROWS = [slug for slug in groups()["algo"] if "defaults" not in load_yaml("algo", slug)
              or modalities(algo_info(slug)) == ("diffusion",)]  # fmt: skip
GIVEN_ROWS = [slug for slug in GIVEN_ROWS if make_objective(load_yaml("algo", slug)).first_step != "astray"]
# A table knows the prompts of its world alone, and not those of extra sequences.
GIVEN_ROWS = [slug for slug in GIVEN_ROWS if not make_objective(load_yaml("algo", slug)).extra]
GIVEN_ROWS = [slug for slug in GIVEN_ROWS if not algo_info(slug).stepwise]  # steps of a sampler: test_trajectories


@pytest.mark.parametrize("slug", GIVEN_ROWS)
def test_every_objective_raises_the_true_reward(slug):
    assert mean_reward(trained(slug, 60, 0.05)) > mean_reward(torch.tensor(REFERENCE)) + 0.05
