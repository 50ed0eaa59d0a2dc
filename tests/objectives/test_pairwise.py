"""DPO and SimPO: identities that their papers state, beyond what registration checks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from samples import floats, layout_of, random_tokens, scored

from prefopt.objectives.base import Batch, Objective, Pairs, reduce_terms, total_weights
from prefopt.objectives.mixture import Mixture
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.reference_free import CPO, SimPO


def loss_of(objective: Objective, batch: Batch) -> torch.Tensor:
    return reduce_terms(batch, objective(batch), total_weights(objective, batch))[0]


def batch_of(objective: Objective, seed: str, count: int = 7) -> Batch:
    """Pairs of replies of which each stands in one pair, with random lengths and log-probs."""
    rng, edges, one = random.Random(seed), torch.arange(2 * count), floats([1] * count)
    layout = layout_of([rng.randint(1, 9) for _ in edges], pairs=Pairs(edges[:count], edges[count:], one, one, 0 * one))
    return scored(objective, layout, random_tokens(objective, layout, rng))


# ---- DPO ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_the_gradient_of_dpo_is_its_closed_form(beta):
    """dL/dlog pi(yw) = -beta sigmoid(-beta h) and dL/dlog pi(yl) = +beta sigmoid(-beta h) for each pair, divided by the number of pairs;
    nothing else has a gradient. Log-ratios from 0 to hundreds of nats."""
    rng, objective, count = random.Random("closed form"), DPO(beta=beta), 9
    one, edges = floats([1] * count), torch.arange(2 * count)
    policy, reference = (floats(rng.uniform(-400, -1) for _ in edges) for _ in range(2))
    policy[:2] = reference[:2]
    layout = layout_of([1] * 2 * count, pairs=Pairs(edges[:count] * 2, edges[:count] * 2 + 1, one, one, 0 * one))
    leaf = policy.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss_of(objective, scored(objective, layout, {"policy": leaf, "reference": reference})), leaf)
    ratio = policy - reference
    slope = beta * torch.sigmoid(-beta * (ratio[0::2] - ratio[1::2])) / count
    torch.testing.assert_close(found[0::2], -slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1::2], slope, rtol=1e-12, atol=0)
    assert found.dtype == torch.float64 and slope[0].item() == pytest.approx(beta / 2 / count)


# ---- SimPO -------------------------------------------------------------------------------------------------------------


def doubled(batch: Batch) -> tuple[Batch, Batch]:
    """Two batches of the same pairs: as they are, and with the tokens of every reply standing twice, equally likely each time."""
    twice = {s: {"logp": 2 * q["logp"]} for s, q in batch.scores.items()}
    return batch, replace(batch, lengths=2 * batch.lengths, token_edge=batch.token_edge.repeat_interleave(2), scores=twice)


@pytest.mark.parametrize("settings", [{}, {"beta": 10.0, "gamma": 3.0}, {"link": "hinge"}])
def test_simpo_does_not_see_that_a_reply_is_said_twice(settings):
    objective = SimPO(**settings)
    once, twice = doubled(batch_of(objective, "twice"))
    torch.testing.assert_close(objective.rewards(twice), objective.rewards(once), rtol=1e-12, atol=0)
    assert loss_of(objective, twice).item() == pytest.approx(loss_of(objective, once).item(), rel=1e-12)


@pytest.mark.parametrize("objective", [DPO(), CPO(alpha=0.0)], ids=["dpo", "cpo"])
def test_sums_of_log_probs_do(objective):
    once, twice = doubled(batch_of(objective, "twice"))
    torch.testing.assert_close(objective.rewards(twice), 2 * objective.rewards(once), rtol=1e-12, atol=0)
    assert loss_of(objective, twice).item() != pytest.approx(loss_of(objective, once).item(), rel=1e-3)


def test_simpo_on_single_tokens_without_a_margin_is_the_preference_term_of_cpo():
    objective, cpo = SimPO(beta=0.7, gamma=0.0), CPO(beta=0.7, alpha=0.0)
    layout = layout_of([1] * 6, pairs=Pairs(torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]), *floats([[1, 0.3, 1], [1] * 3, [0] * 3])))
    tokens = random_tokens(cpo, layout, random.Random(0))
    assert loss_of(objective, scored(objective, layout, tokens)).item() == pytest.approx(loss_of(cpo, scored(cpo, layout, tokens)).item())


def test_simpo_with_a_part_of_sft_is_the_official_code_s_sft_weight():
    """Which adds sft_weight times the cross-entropy of the chosen replies, a mean over all of their tokens in the batch."""
    where = "prefopt.objectives."
    mixture = Mixture(parts=[{"_target_": f"{where}reference_free.SimPO"}, {"_target_": f"{where}unary.SFT", "weight": 0.3}])
    batch, simpo = batch_of(mixture, "sft"), SimPO()
    chosen = batch.pairs.chosen
    nll = -batch.logp()[chosen].sum() / batch.lengths[chosen].sum()
    assert loss_of(mixture, batch).item() == pytest.approx((loss_of(simpo, batch) + 0.3 * nll).item(), rel=1e-12)
