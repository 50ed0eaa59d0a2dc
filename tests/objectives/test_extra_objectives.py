"""SRPO, preference learning with rationales and T-REG: what their papers claim, in numbers."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from samples import YAML, default, floats, layout_of, one_unit, random_layout, random_tokens, scored, settings_of

from prefopt.data.extra import EXTRA
from prefopt.objectives.base import Pairs, reduce_terms, total_weights
from prefopt.objectives.mixture import Mixture
from prefopt.objectives.pairwise import DPO, IPO
from prefopt.objectives.rationale import RationaleDPO, RationaleORPO
from prefopt.objectives.reference_free import ORPO, SimPO
from prefopt.objectives.self_improving import SRPO
from prefopt.objectives.token_regularised import TREG

WITH_EXTRA = [slug for slug in YAML if settings_of(slug)[0].extra]


def loss(objective, batch):
    return reduce_terms(batch, objective(batch), total_weights(objective, batch))[0]


@pytest.mark.parametrize("slug", WITH_EXTRA)
def test_declared_sequences_exist_and_their_pairs_are_not_turned_round(slug):
    cls = settings_of(slug)[0]
    assert set(cls.extra) <= EXTRA.keys() and len(set(cls.extra)) == len(cls.extra)
    assert cls.view == "pairs" and "label" in cls.columns
    assert set(cls.extra_scorers) <= {"policy", "reference"} and cls.extra_scorers


# ---- SRPO ----------------------------------------------------------------------------------------------


def game(answers: int, beta: float, seed: int):
    """Preferences P[b, a] of a finite set of answers, and the log-ratios u[b, a], v[b] at the solution of the game between a generator and
    an improver: pi'(b|a) = ref'(b|a) exp(P(b > a) / beta) / Z(a), pi(a) proportional to ref(a) / Z(a). By plain sums."""
    rng = random.Random(seed)
    P = [[0.5] * answers for _ in range(answers)]
    for b in range(answers):
        for a in range(b):
            P[b][a] = rng.random()
            P[a][b] = 1 - P[b][a]
    improver = [[rng.random() for _ in range(answers)] for _ in range(answers)]  # ref'[a][b]
    improver = [[x / math.fsum(row) for x in row] for row in improver]
    generator = [rng.random() for _ in range(answers)]
    Z = [math.fsum(improver[a][b] * math.exp(P[b][a] / beta) for b in range(answers)) for a in range(answers)]
    norm = math.fsum(g / z for g, z in zip(generator, Z, strict=True)) / math.fsum(generator)
    u = [[P[b][a] / beta - math.log(Z[a]) for a in range(answers)] for b in range(answers)]
    return P, u, [-math.log(z) - math.log(norm) for z in Z]


@pytest.mark.parametrize("beta", [0.1, 0.7, 3.0])
def test_both_errors_vanish_at_the_solution_of_the_game(beta):
    """For arbitrary preferences with P(a, b) + P(b, a) = 1, and only there."""
    P, u, v = game(6, beta, seed=1)
    for b in range(6):
        for a in range(6):
            if a == b:
                continue
            shown = [(u[b][a], 0, 1), (u[a][a], 0, 1), (u[a][b], 0, 1), (u[b][b], 0, 1)]
            names = {"w": v[b], "l": v[a], "p": P[b][a], "XS": shown}
            for alpha in (0.0, 0.3, 1.0):
                assert abs(float(loss(SRPO(beta, alpha), one_unit(SRPO(beta, alpha), names)))) < 1e-12
            moved = names | {"w": v[b] + 1, "XS": [(u[b][a] + 1, 0, 1), *shown[1:]]}
            assert float(loss(SRPO(beta, 0.5), one_unit(SRPO(beta, 0.5), moved))) > 1e-4


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_a_hard_label_costs_a_quarter_at_the_start(alpha):
    objective, rng = SRPO(alpha=alpha), random.Random(0)
    layout = random_layout(objective, rng, 5)
    same = random_tokens(objective, layout, rng)["policy"]
    for label, start in ((1.0, 0.25), (0.0, 0.25), (0.5, 0.0)):
        layout.pairs.label.fill_(label)
        assert float(loss(objective, scored(objective, layout, {"policy": same, "reference": same}))) == pytest.approx(start)


def test_without_an_effect_of_what_is_shown_it_is_ipo():
    """u(b|a) = v(b): with tau = beta, IPO's loss times beta^2, whatever alpha."""
    for seed in range(20):
        rng = random.Random(seed)
        w, lose, rw, rl = (-rng.uniform(0, 30) for _ in range(4))
        names = {"w": w, "l": lose, "rw": rw, "rl": rl, "XS": [(w, rw, 1), (lose, rl, 1), (lose, rl, 1), (w, rw, 1)]}
        objective = SRPO(beta=rng.uniform(0.05, 1), alpha=rng.random())
        ipo = IPO(tau=objective.beta)
        assert float(loss(objective, one_unit(objective, names))) == pytest.approx(
            objective.beta**2 * float(loss(ipo, one_unit(ipo, {k: names[k] for k in ("w", "l", "rw", "rl")}))))


# ---- rationales ----------------------------------------------------------------------------------------


def same_batch(objective, other, seed):
    """One random batch as both objectives read it; `other` knows no extra sequences."""
    rng = random.Random(seed)
    layout = random_layout(objective, rng, 6)
    tokens = {"reference": floats(-rng.uniform(0.05, 3) for _ in layout.token_edge)} | random_tokens(objective, layout, rng)
    return scored(objective, layout, tokens), scored(other, replace(layout, pairs=replace(layout.pairs, extra=None)), tokens)


@pytest.mark.parametrize("seed", range(4))
def test_weight_zero_is_the_base_bit_for_bit(seed):
    """The logsigmoid link adds ln 2, which has no gradient."""
    for link in ("linear", "logsigmoid"):
        mine, base = same_batch(RationaleDPO(gamma=0.0, rationale_link=link), DPO(), seed)
        found, wanted = loss(RationaleDPO(gamma=0.0, rationale_link=link), mine), loss(DPO(), base)
        assert found == wanted if link == "linear" else float(found) == pytest.approx(float(wanted) + math.log(2))
    mine, base = same_batch(RationaleORPO(gamma=0.0), ORPO(), seed)
    mine.pairs.label.fill_(1)
    assert loss(RationaleORPO(gamma=0.0), mine) == loss(ORPO(), base)
    for name, other in (("dpo", DPO()), ("simpo", SimPO(beta=0.1, gamma=0.7))):
        objective = TREG(beta=0.1, alpha=0.0, base=name, gamma=0.7)
        mine, base = same_batch(objective, other, seed)
        assert loss(objective, mine) == loss(other, base)


def test_the_logsigmoid_link_is_half_as_steep_near_zero_and_saturates_to_gamma():
    gamma = 0.001
    objective = RationaleDPO(gamma=gamma, rationale_link="logsigmoid")
    for logp, slope in ((-1e-3, gamma / 2), (-1e5, gamma)):
        batch = one_unit(objective, {"XS": [(logp, 0, 1)]})
        leaf = batch.scores["policy"]["logp"].requires_grad_()
        (grad,) = torch.autograd.grad(loss(objective, batch), leaf)
        assert -float(grad[2]) == pytest.approx(slope, rel=1e-3)
    linear = RationaleDPO(gamma=gamma)
    batch = one_unit(linear, {"XS": [(-1e5, 0, 1)]})
    leaf = batch.scores["policy"]["logp"].requires_grad_()
    assert -float(torch.autograd.grad(loss(linear, batch), leaf)[0][2]) == pytest.approx(gamma)


# ---- T-REG ---------------------------------------------------------------------------------------------


def two_replies(better: list[float], worse: list[float], seed: int = 0):
    """A pair whose chosen reply has these log-probs under both requests; the rejected one, of two tokens, has equal ones."""
    rng = random.Random(seed)
    sides = [[(-rng.uniform(0.1, 3), -rng.uniform(0.1, 3)) for _ in range(n)] for n in (len(better), 2)]
    extra = [[(0, s) for s in better], [(0, s) for s in worse], [(0, -1.0), (0, -2.0)], [(0, -1.0), (0, -2.0)]]
    return {"W": sides[0], "L": sides[1], "X": extra}


def test_the_gradient_of_the_regulariser_is_minus_beta_rhat_times_the_pairs_weight():
    objective = TREG(beta=0.3, alpha=0.5)
    better, worse = [-1.0, -0.5, -2.0], [-2.0, -0.5, -1.0]
    batch = one_unit(objective, two_replies(better, worse))
    ratio = batch.log_ratio()
    weight = float(torch.sigmoid(-0.3 * (ratio[0] - ratio[1])))
    leaf = batch.scores["policy"]["token_logp"].requires_grad_()
    regulariser = objective(batch).terms[1]
    (grad,) = torch.autograd.grad((regulariser.weight * regulariser.values).sum(), leaf)
    assert grad[:3].tolist() == pytest.approx([-0.5 * weight * 0.3 * r for r in (0.231059, 0.0, -0.231059)], abs=1e-6)
    assert not grad[3:].any(), "no difference between the requests, no reward"


def test_the_weight_is_held_constant():
    """Nothing of the regulariser reaches the policy by way of the pair's weight, which reads sums and not tokens."""
    objective = TREG()
    batch = one_unit(objective, two_replies([-1.0, -0.5], [-2.0, -0.7]))
    leaf = batch.scores["policy"]["logp"].requires_grad_()
    preference, regulariser = objective(batch).terms
    assert preference.values.requires_grad and not regulariser.values.requires_grad and leaf.requires_grad


def test_a_reward_of_one_half_everywhere_is_weighted_fine_tuning():
    objective = TREG(beta=0.4, alpha=0.25)
    batch = one_unit(objective, two_replies([-1.0] * 3, [-1e6] * 3))
    ratio = batch.log_ratio()
    weight = float(torch.sigmoid(-0.4 * (ratio[0] - ratio[1])))
    regulariser = objective(batch).terms[1]
    assert float(regulariser.weight * regulariser.values) == pytest.approx(-0.25 * weight * 0.4 * 0.5 * float(batch.logp()[0]))


def test_a_soft_label_mixes_the_pair_and_its_opposite():
    """p at (yw, yl) is p times the loss of a hard pair and 1 - p times that of the pair turned round, sequences and all."""
    rng = random.Random(3)
    for objective in (default("t_reg"), TREG(beta=1.0, alpha=0.7), RationaleORPO(gamma=0.0), SRPO(alpha=0.0), SRPO(alpha=1.0)):
        names = [EXTRA[name] for name in objective.extra]
        lengths = [3, 2, *([3, 3, 2, 2] if all(e.aligned is not None for e in names) else [rng.randint(1, 4) for _ in names])]
        edges = torch.arange(2, len(lengths))
        # The first half is about one side (T-REG) or one order (SRPO), the second about the other; a rationale stays.
        other = edges.view(2, -1).flip(0).flatten() if len(edges) == 4 else edges
        one = floats([1])

        def batch(label, turned):
            sides = torch.tensor([[1], [0]] if turned else [[0], [1]])
            views = Pairs(sides[0], sides[1], floats([label]), one, 0 * one, (other if turned else edges)[None])
            return scored(objective, layout_of(lengths, pairs=views), tokens)  # noqa: B023

        layout = layout_of(lengths, pairs=Pairs(torch.tensor([0]), torch.tensor([1]), one, one, 0 * one, edges[None]))
        tokens = random_tokens(objective, layout, rng)
        hard, turned, soft = (float(loss(objective, batch(*which))) for which in ((1.0, False), (1.0, True), (0.3, False)))
        squared = isinstance(objective, SRPO)  # a square of the mean is not the mean of squares: it lacks the label's variance
        assert soft == pytest.approx(0.3 * hard + 0.7 * turned - (0.3 * 0.7 if squared else 0.0))


def test_a_rationale_can_be_added_to_any_loss():
    """SimPO and the rationale's likelihood as parts of a mixture: their sum, and each token's own slope."""
    mixed = Mixture(parts=[
        {"_target_": "prefopt.objectives.reference_free.SimPO", "weight": 1.0},
        {"_target_": "prefopt.objectives.rationale.RationaleNLL", "weight": 0.01, "length_normalize": True},
    ])
    assert mixed.extra == ("rationale",) and mixed.extra_scorers == ("policy",)
    mine, base = same_batch(mixed, SimPO(), 0)
    found = loss(mixed, mine)
    edges, weight = mine.pairs.extra[:, 0], mine.pairs.weight
    said = (mine.avg_logp()[edges] * weight).sum() / weight.sum()
    assert float(found) == pytest.approx(float(loss(SimPO(), base)) - 0.01 * float(said))
