"""What other links of the log-ratio promise beyond their formulas: optima on the exact tabular world, identities, stationary points."""

from __future__ import annotations

import math
import random

import pytest
import torch
from samples import floats, layout_of, scored
from test_bandit_optima import REFERENCE, mean_reward, total_variation, trained

from prefopt.data import bandit
from prefopt.objectives.base import Objective, Pairs, reduce_terms, total_weights
from prefopt.objectives.links import EXO, IREPO, NCA, APODown, DiscoPOP, FDivergenceDPO, RobustDPO
from prefopt.objectives.pairwise import DPO

ROWS = [(1.5, -0.5), (-3.0, 2.0), (0.0, 7.0), (40.0, -60.0), (-1e4, 1e4)]  # log-ratios of two replies, nats


def loss_and_slopes(objective: Objective, ratios: list[tuple[float, float]], label: float = 1.0, order: tuple = (0, 1)) -> tuple:
    """Loss of pairs of one-token replies with these log-ratios, and its slope in each: [pairs, 2]. `order` (1, 0) flips the labels."""
    count, edges = len(ratios), torch.arange(2 * len(ratios)).view(-1, 2)
    policy = floats(r for pair in ratios for r in pair).requires_grad_()
    pairs = Pairs(edges[:, order[0]], edges[:, order[1]], floats([label] * count), floats([1] * count), floats([0] * count))
    batch = scored(objective, layout_of([1] * 2 * count, pairs=pairs), {"policy": policy, "reference": torch.zeros_like(policy)})
    loss, _ = reduce_terms(batch, objective(batch), total_weights(objective, batch))
    return loss.item(), torch.autograd.grad(loss, policy)[0].view(-1, 2)


# ---- robust and conservative DPO under flipped labels --------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3, 0.45])
def test_robust_loss_averaged_over_flips_is_the_clean_loss(eps):
    """The loss on the observed order with probability 1 - eps and on the swapped one with eps; the same for gradients."""
    objective = RobustDPO(beta=0.4, eps=eps)
    kept, flipped = (loss_and_slopes(objective, ROWS, order=order) for order in ((0, 1), (1, 0)))
    clean = loss_and_slopes(DPO(beta=0.4), ROWS)
    assert (1 - eps) * kept[0] + eps * flipped[0] == pytest.approx(clean[0], rel=1e-10)
    torch.testing.assert_close((1 - eps) * kept[1] + eps * flipped[1], clean[1], rtol=1e-9, atol=1e-12)


def test_robust_loss_may_be_negative_and_never_stops_pushing():
    loss, slopes = loss_and_slopes(RobustDPO(beta=1.0, eps=0.2), [(50.0, -50.0)])
    assert loss == pytest.approx(-0.2 / 0.6 * 100) and slopes[0, 0].item() == pytest.approx(-0.2 / 0.6)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_robust_dpo_reaches_the_clean_optimum_from_flipped_labels(share):
    """With eps equal to the share of flipped labels its optimum is that of DPO without noise; DPO and cDPO fall short of it."""
    best = bandit.optimal_policy(1.0)
    robust = trained("rdpo_robust", 400, 0.1, noise=share, beta=1.0, eps=share)
    plain = trained("dpo", 400, 0.1, noise=share, beta=1.0)
    smoothed = trained("cdpo", 400, 0.1, noise=share, beta=1.0, label_smoothing=share)
    assert total_variation(robust, best) < 1e-3
    assert total_variation(plain, best) > 0.03 and total_variation(smoothed, best) > 0.03
    assert mean_reward(robust) > mean_reward(plain) + 0.02 > mean_reward(smoothed) + 0.02


def drawn(count: int, seed: str) -> torch.Tensor:
    """[count, 2] by how much the better of two replies is ahead in each of two features. One feature tells a quarter of the pairs by far
    and the others hardly; the other one speaks for a quarter of them and against a half."""
    rng, kinds = random.Random(seed), [(20.0, 0.0), (1.0, 5.0), (1.0, -1.0), (1.0, -1.0)]
    return floats(v * rng.uniform(0.9, 1.1) for _ in range(count) for v in rng.choice(kinds)).view(count, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_robust_dpo_judges_clean_pairs_better_after_training_on_flipped_ones(seed):
    """A log-linear policy over two replies per prompt, 30 % of 2,000 labels flipped, accuracy on held-out pairs as they should be. Pairs
    that are told by far pull DPO away from the rest once some of them are flipped."""
    count, share, rng = 2000, 0.3, random.Random(f"flips {seed}")
    ahead, held_out = drawn(count, f"train {seed}"), drawn(500, f"held out {seed}")
    flipped, better = torch.tensor([rng.random() < share for _ in range(count)]), 2 * torch.arange(count)
    sides = [torch.where(flipped, better + 1 - i, better + i) for i in (0, 1)]
    pairs = Pairs(*sides, floats([1] * count), floats([1] * count), floats([0] * count))
    layout, even, accuracy = layout_of([1] * 2 * count, pairs=pairs), floats([math.log(0.5)] * 2 * count), []
    for objective in (DPO(beta=0.1), RobustDPO(beta=0.1, eps=share)):
        theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer, totals = torch.optim.Adam([theta], lr=0.2), total_weights(objective, layout)
        for _ in range(100):
            logits = torch.stack([ahead @ theta, torch.zeros_like(even[:count])], 1)
            batch = scored(objective, layout, {"policy": logits.log_softmax(-1).flatten(), "reference": even})
            optimizer.zero_grad()
            reduce_terms(batch, objective(batch), totals)[0].backward()
            optimizer.step()
        accuracy.append(float((held_out @ theta.detach() > 0).double().mean()))
    plain, robust = accuracy
    assert robust > 0.95 and plain < 0.6


def test_conservative_dpo_is_dpo_on_flipped_labels():
    smoothed = trained("cdpo", 400, 0.1, beta=1.0, label_smoothing=0.1)
    assert total_variation(smoothed, trained("dpo", 400, 0.1, noise=0.1, beta=1.0).tolist()) < 1e-3


# ---- calibrated links: least where sigmoid(beta h) is the label -----------------------------------


@pytest.mark.parametrize("label", [0.02, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("objective", [IREPO(beta=0.3, eps=0.01), EXO(beta=0.3, eps=1e-12)], ids=["irepo", "exo"])
def test_slope_vanishes_where_the_margin_is_the_log_odds_of_the_label(objective, label):
    h = math.log(label / (1 - label)) / 0.3
    below, at, above = (loss_and_slopes(objective, [(x + 5, 5.0)], label)[1][0, 0].item() for x in (h - 0.1, h, h + 0.1))
    assert below < -1e-5 and abs(at) < 1e-9 and above > 1e-5


def test_irepo_reaches_the_tilted_reference():
    """Labels are exact, so every margin can be the reward difference: DPO's optimum."""
    assert total_variation(trained("irepo", 400, 0.1, beta=1.0), bandit.optimal_policy(1.0)) < 1e-3
    assert total_variation(trained("irepo", 400, 0.1, beta=1.0, eps=0.2), bandit.optimal_policy(1.0)) > 0.03, "eps must bind"


def test_exo_reaches_the_tilted_reference():
    assert total_variation(trained("exo", 400, 0.1, beta=1.0, eps=1e-6), bandit.optimal_policy(1.0)) < 1e-3


def test_exo_leaves_a_hopeless_pair_alone_and_dpo_does_not():
    """A reverse KL has no gradient where the policy puts nothing on the mode."""
    pair = [(-30.0, 30.0)]
    assert abs(loss_and_slopes(EXO(beta=1.0), pair)[1]).max() < 1e-20 and abs(loss_and_slopes(DPO(beta=1.0), pair)[1]).min() > 0.99


# ---- f-divergences --------------------------------------------------------------------------------


def f_optimal_policy(beta: float, ratio) -> list[list[float]]:
    """pi = pi_ref ratio(r / beta + c), with c such that pi sums to 1 (arXiv 2309.16240, theorem 1); c by bisection.

    `ratio(s)` solves f'(u) = s for u; infinite where s is above the range of f'.
    """
    out = []
    for rewards, reference in zip(bandit.reward_table(), REFERENCE, strict=True):
        low, high = -50.0, 50.0
        for _ in range(200):
            c = (low + high) / 2
            total = sum(p * ratio(r / beta + c) for r, p in zip(rewards, reference, strict=True))
            low, high = (low, c) if total > 1 else (c, high)
        out.append([p * ratio(r / beta + low) for r, p in zip(rewards, reference, strict=True)])
    return out


INVERSES = {  # u where f'(u) - f'(1) = s
    "reverse_kl": math.exp,
    "forward_kl": lambda s: 1 / (1 - s) if s < 1 else math.inf,
    "js_divergence": lambda s: math.exp(s) / (2 - math.exp(s)) if s < math.log(2) else math.inf,
    "alpha_divergence": lambda s: (1 - 0.5 * s) ** -2 if s < 2 else math.inf,  # alpha = 1/2
}


@pytest.mark.parametrize("divergence", INVERSES)
def test_f_dpo_reaches_the_optimum_of_its_divergence(divergence):
    best = f_optimal_policy(1.0, INVERSES[divergence])
    found = trained("f_divergence_dpo", 600, 0.1, beta=1.0, divergence=divergence, alpha=0.5)
    assert total_variation(found, best) < 2e-3
    apart = total_variation(torch.tensor(best, dtype=torch.float64), bandit.optimal_policy(1.0))
    assert apart < 1e-9 if divergence == "reverse_kl" else apart > 0.02


@pytest.mark.parametrize("divergence", INVERSES)
def test_f_dpo_rewards_are_scores_of_the_divergence(divergence):
    """beta f'(u), 0 at u = 1: the inverse gives the ratio back."""
    objective = FDivergenceDPO(beta=0.5, divergence=divergence)
    ratios = floats([-4.0, -0.5, 0.0, 1.0, 3.0])
    batch = scored(objective, layout_of([1] * 5), {"policy": ratios, "reference": torch.zeros_like(ratios)})
    rewards = objective.rewards(batch).tolist()
    assert [math.log(INVERSES[divergence](r / 0.5)) for r in rewards] == pytest.approx(ratios.tolist(), abs=1e-9)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_f_dpo_keeps_pushing_where_the_power_is_cut(divergence):
    """Beyond the cut the score goes on along its tangent: continuous, and never without gradient."""
    objective, cut = FDivergenceDPO(beta=0.1, divergence=divergence), -30.0 if divergence == "forward_kl" else -60.0
    slopes = [loss_and_slopes(objective, [(x, 5.0)])[1][0, 0].item() for x in (cut + 1e-9, cut - 1e-9, cut - 100, -1e4)]
    assert slopes == pytest.approx([slopes[0]] * 4, rel=1e-6) and slopes[0] < -1e9


# ---- anchored, contrastive and discovered losses --------------------------------------------------


def test_nca_draws_the_chosen_reward_to_log_2_and_lowers_the_rejected_one_for_ever():
    chosen_rewards = (math.log(2) - 0.1, math.log(2), math.log(2) + 0.1)
    slopes = [loss_and_slopes(NCA(beta=0.5), [(2 * reward, -300.0)])[1][0] for reward in chosen_rewards]
    below, at, above = (s[0].item() for s in slopes)
    assert below < -1e-3 and abs(at) < 1e-12 and above > 1e-3
    assert all(s[1].item() > 0 for s in slopes)


def test_apo_down_first_lowers_the_rejected_reply_alone_then_both():
    start, later = (loss_and_slopes(APODown(beta=0.1), [pair])[1][0].tolist() for pair in ((0.0, 0.0), (-5.0, -20.0)))
    assert start == [0.0, pytest.approx(0.025)]
    assert later[0] > 0.001 and later[1] > 0.001


def test_discopop_has_the_local_minimum_that_the_paper_shows():
    """beta = tau = 0.05: the loss falls up to h = -2.37, rises up to 1.44, and falls for ever after."""
    def slope(h: float) -> float:
        return loss_and_slopes(DiscoPOP(), [(h + 1, 1.0)])[1][0, 0].item()

    assert all(slope(h) < 0 for h in (-50, -5, -2.38, 1.45, 5, 50))
    assert all(slope(h) > 0 for h in (-2.36, -1, 0, 1, 1.43))


@pytest.mark.parametrize(("tau", "right"), [(0.1, False), (0.105, True)])
def test_discopop_starts_in_the_right_direction_above_a_tau(tau, right):
    """The slope at h = 0 is beta ((1 - ln 2) / (4 tau) - 3/4)."""
    slope = loss_and_slopes(DiscoPOP(beta=0.3, tau=tau), [(0.0, 0.0)])[1][0, 0].item()
    assert slope == pytest.approx(0.3 * ((1 - math.log(2)) / (4 * tau) - 0.75), rel=1e-9) and (slope < 0) == right


def test_discopop_needs_a_wide_tau_on_full_batches():
    start = mean_reward(torch.tensor(REFERENCE))
    assert mean_reward(trained("discopop", 60, 0.05, tau=0.5)) > start + 0.05
    assert mean_reward(trained("discopop", 60, 0.05)) < start, "where the docstring says that it stays in its local minimum"
