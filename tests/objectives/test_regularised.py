"""Regularised and reweighted pair losses beyond what registration checks: their identities, their optima, and what they are for."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from samples import default, draw, floats, layout_of, one_unit, random_layout, random_names, random_tokens, scored
from test_bandit_optima import total_variation, trained
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.data import bandit
from prefopt.objectives.base import Pairs, reduce_terms, total_weights
from prefopt.objectives.pairwise import DPO, IPO
from prefopt.objectives.reference_free import SimPO
from prefopt.objectives.regularised import AlphaDPO, AlphaPO, ConstrainedPO, LengthRegularisedDPO, RegularizedPO
from prefopt.objectives.reweighted import ISDAA, WPO
from prefopt.training.metrics import Averages, pair_metrics


def loss_of(objective, batch):
    return reduce_terms(batch, objective(batch), total_weights(objective, batch))[0]


def by_reply(objective, names) -> list[float]:
    """Gradient of the loss of one pair with respect to log pi(yw) and log pi(yl)."""
    batch = one_unit(objective, names)
    leaf = batch.logp().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(objective, batch), leaf)
    return grad.tolist()


def pairs_of(names: list[dict]) -> tuple:
    """The layout of pairs of one token a side, and their token log-probs."""
    count = len(names)
    one = floats([1] * count)
    view = Pairs(torch.arange(count) * 2, torch.arange(count) * 2 + 1, one, one, 0 * one)
    sides = {"policy": ("w", "l"), "reference": ("rw", "rl")}
    return layout_of([1] * (2 * count), pairs=view), {s: floats(n[k] for n in names for k in keys) for s, keys in sides.items()}


# ---- identities ----


def test_imitation_adds_a_constant_slope_to_the_chosen_reply():
    rng = random.Random("rpo")
    for _ in range(20):
        objective = draw(RegularizedPO, rng, reduction="sum", times_beta=True)
        names = random_names(objective, rng)
        ours, dpo = by_reply(objective, names), by_reply(DPO(beta=objective.beta), names)
        assert ours[0] - dpo[0] == pytest.approx(-objective.beta * objective.eta, rel=1e-9)
        assert ours[1] == pytest.approx(dpo[1], rel=1e-12)


@pytest.mark.parametrize(("base", "link"), [("dpo", DPO), ("ipo", IPO)])
def test_importance_weight_scales_the_gradient_of_its_base(base, link):
    rng = random.Random(f"is_daa {base}")
    for eps in (0.25, 1.0):
        for _ in range(10):
            objective = ISDAA(base=base, beta=0.3, eps=eps)
            names = random_names(objective, rng)
            plain = by_reply(link(beta=0.3) if base == "dpo" else link(tau=0.3), names)
            weight = math.exp(min(names["w"] - names["rw"] + names["l"] - names["rl"], 2 * eps))
            assert by_reply(objective, names) == pytest.approx([weight * g for g in plain], rel=1e-6)
            names |= {"w": names["rw"], "l": names["rl"]}  # the start: weight 1
            same = by_reply(link(beta=0.3) if base == "dpo" else link(tau=0.3), names)
            assert by_reply(objective, names) == pytest.approx(same, rel=1e-12)


@pytest.mark.parametrize(("chosen", "rejected", "weight"), [(1.2, 0.5, 5.473947), (3.0, 1.0, 7.389056), (0.0, 0.0, 1.0), (-1e4, -1e4, 0.0)])
def test_importance_weight(chosen, rejected, weight):
    names = {"w": -2e4 + chosen, "l": -2e4 + rejected, "rw": -2e4, "rl": -2e4}
    objective = ISDAA(eps=1.0)
    assert objective(one_unit(objective, names)).metrics["importance_weight"].item() == pytest.approx(weight, abs=1e-6)


def test_wpo_weighs_a_pair_by_its_likelihood_per_token():
    rng = random.Random("wpo")
    for _ in range(10):
        objective = WPO(beta=0.3)
        names = random_names(objective, rng)
        weight = math.exp(names["w"] / names["nw"] + names["l"] / names["nl"])
        assert by_reply(objective, names) == pytest.approx([weight * g for g in by_reply(DPO(beta=0.3), names)], rel=1e-9)


def test_length_is_priced_at_the_optimum():
    """Where beta h is the log-odds of the label less alpha for each token that the chosen reply is longer, nothing pulls any more."""
    objective, p = LengthRegularisedDPO(beta=0.2, alpha=0.05), 0.8
    for nw, nl in ((7, 2), (2, 7), (3, 3)):
        h = (math.log(p / (1 - p)) - 0.05 * (nw - nl)) / 0.2
        names = {"w": -20 + h, "rw": -20, "l": -9, "rl": -9, "nw": nw, "nl": nl, "p": p}
        assert by_reply(objective, names) == pytest.approx([0, 0], abs=1e-12)


def test_alphapo_is_continuous_at_simpo():
    rng = random.Random("alphapo")
    names = random_names(AlphaPO(), rng)
    near = [by_reply(AlphaPO(alpha=a, gamma=0.4), names) for a in (-1e-6, 1e-6)]
    for slopes in near:
        assert slopes == pytest.approx(by_reply(SimPO(beta=2.5, gamma=0.4), names), rel=1e-4)


def test_adaptive_margins_of_two_pairs():
    """M = 0.3 and -0.1: mean 0.1, deviation 0.2, so the margins are gamma plus and minus alpha (but for the 1e-4)."""
    objective = AlphaDPO(beta=2.0, gamma=0.8, alpha=0.5)
    layout, tokens = pairs_of([{"w": -1.0, "l": -1.2, "rw": -1.3, "rl": -1.2}, {"w": -2.0, "l": -1.5, "rw": -2.0, "rl": -1.6}])
    terms = objective(scored(objective, layout, tokens))
    shift = 0.5 * 0.2 / 0.2001
    assert terms.metrics["target_margin"].tolist() == pytest.approx([0.8 + shift, 0.8 - shift], rel=1e-9)
    logits = [0.4 - 0.8 - shift, -1.0 - 0.8 + shift]
    assert terms.terms[0].values.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in logits], rel=1e-9)


@pytest.mark.parametrize("slug", ["rpo_regularized", "r_dpo", "cpo_constrained", "wpo"])
def test_rewards_start_at_zero(slug):
    rng, objective = random.Random(slug), default(slug)
    layout = random_layout(objective, rng, 5)
    policy = random_tokens(objective, layout, rng)["policy"]
    assert not objective.rewards(scored(objective, layout, dict.fromkeys(objective.quantities, policy))).any()


# ---- the constraint of CPO ----


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 20.0])
def test_dpo_is_a_soft_margin_ranking_loss(beta):
    """L / beta - max(0, d_ref - d) lies in [0, ln 2 / beta], whatever the pair."""
    rng, objective = random.Random(f"margin {beta}"), ConstrainedPO(beta=beta, gamma=0.0)
    for spread in [1e-3, 1.0, 50.0, 1e4] * 20:
        names = {k: -1e5 + rng.uniform(-spread, spread) for k in ("w", "l", "rw", "rl")}
        behind = (names["rw"] - names["rl"]) - (names["w"] - names["l"])
        gap = loss_of(objective, one_unit(objective, names)).item() / beta - max(0, behind)
        assert -1e-9 <= gap <= math.log(2) / beta + 1e-9


@pytest.mark.parametrize("margin", ["inverse_prob", "softplus", "inverse_logp"])
def test_pairs_that_the_reference_misranks_get_the_larger_margin(margin):
    """At the start the loss is softplus of the margin; d_ref falls from -0.1 to -4."""
    objective, seen = ConstrainedPO(beta=0.5, gamma=0.3, margin=margin), []
    for rw in (-1.1, -2.0, -5.0):
        names = {"w": rw, "rw": rw, "l": -1.0, "rl": -1.0}
        seen.append(loss_of(objective, one_unit(objective, names)).item())
    assert seen[0] + 0.01 < seen[1] < seen[2] - 0.01
    assert (seen[0] > math.log(2)) == (margin != "inverse_logp")  # log-probs are negative, and so is a margin made of them


def test_a_sharp_softplus_margin_asks_for_gamma_or_what_the_reference_has():
    rng, sharp = random.Random("sharp"), ConstrainedPO(beta=0.7, gamma=0.4, margin="softplus", tau=500.0)
    for _ in range(20):
        names = {k: rng.uniform(-4, -0.1) for k in ("w", "l", "rw", "rl")}
        wanted = max(0.4, names["rw"] - names["rl"])
        loss = loss_of(sharp, one_unit(sharp, names)).item()
        assert loss == pytest.approx(math.log1p(math.exp(-0.7 * (names["w"] - names["l"] - wanted))), abs=2e-3)


def test_margin_is_bounded():
    objective = ConstrainedPO(beta=1.0, gamma=0.1, max_inverse=10.0)
    names = {"w": -1e4, "rw": -1e4, "l": -1e4, "rl": -1e4}
    assert loss_of(objective, one_unit(objective, names)).item() == pytest.approx(math.log1p(math.exp(2.0)))


@pytest.mark.parametrize("objective", [ConstrainedPO(), DPO(), SimPO()], ids=lambda o: type(o).__name__)
def test_every_run_on_pairs_logs_the_shares_of_misranked_ones(objective):
    cases = [
        ({"w": -3.0, "l": -2.0, "rw": -4.0, "rl": -2.0}, (1, 1)),  # d_ref < d < 0: DPO has what it wants
        ({"w": -3.0, "l": -2.0, "rw": -2.0, "rl": -2.0}, (1, 0)),  # d < 0, and DPO is still at work
        ({"w": -3.0, "l": -2.0, "rw": -4.0, "rl": -3.0}, (1, 0)),  # where the policy starts: rounding is not past it
        ({"w": -2.0, "l": -3.0, "rw": -4.0, "rl": -2.0}, (0, 0)),
    ]
    for names, wanted in cases:
        turned = {"w": names["l"], "l": names["w"], "rw": names["rl"], "rl": names["rw"]}
        for seen, label in ((names, 1.0), (names, 0.7), (turned, 0.2)):  # a label below one half prefers the other side
            layout, tokens = pairs_of([seen])
            layout.pairs.label.fill_(label)
            batch, averages = scored(objective, layout, tokens), Averages()
            pair_metrics(objective, batch, averages)
            found = averages.reduce(lambda t: t)
            assert found["misranked"] == wanted[0]
            assert found.get("undesirable") == (wanted[1] if "reference" in objective.quantities else None)


# ---- optima on the bandit ----


def solved(loss) -> list[list[float]]:
    """[PROMPTS][REPLIES] probabilities that minimise the expectation of loss(chosen, rejected, their references) over all pairs, found
    in float64 without any of prefopt's objectives."""
    reference = torch.tensor(bandit.reference_table(), dtype=torch.float64)
    first, second = torch.triu_indices(bandit.REPLIES, bandit.REPLIES, 1)
    wins = floats(bandit.preference(x, a, b) for x in range(bandit.PROMPTS) for a, b in zip(first.tolist(), second.tolist(), strict=True))
    p, table = wins.view(bandit.PROMPTS, -1), reference.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([table], max_iter=3000, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        policy = table.log_softmax(-1)
        a, b, ra, rb = (t[:, side] for t in (policy, reference) for side in (first, second))
        value = (p * loss(a, b, ra, rb) + (1 - p) * loss(b, a, rb, ra)).sum()
        value.backward()
        return value

    optimiser.step(closure)
    assert table.grad.abs().max() < 1e-6
    return table.detach().softmax(-1).tolist()


def constrained(margin):
    return lambda a, b, ra, rb: F.softplus(margin(ra, rb) - (a - ra - b + rb))


def inverse(r):
    return r.neg().exp().clamp(max=100)


REGULARISED = [
    ("rpo_regularized", {"beta": 1.0, "eta": 0.2}, lambda a, b, ra, rb: F.softplus(b - rb - a + ra) - 0.2 * a),
    ("cal_dpo", {"beta": 0.5}, lambda a, b, ra, rb: F.softplus(b - rb - a + ra) + (a - ra - 1) ** 2 + (b - rb + 1) ** 2),
    ("cpo_constrained", {"beta": 1.0, "gamma": 0.05}, constrained(lambda ra, rb: 0.05 * (inverse(ra) + inverse(rb)))),
    ("cpo_constrained", {"beta": 1.0, "gamma": 0.3, "margin": "softplus"}, constrained(lambda ra, rb: F.softplus(2 * (0.3 - ra + rb)) / 2)),
]  # fmt: skip


@pytest.mark.parametrize(("slug", "settings", "loss"), REGULARISED, ids=[f"{r[0]}-{i}" for i, r in enumerate(REGULARISED)])
def test_reaches_its_regularised_optimum(slug, settings, loss):
    optimum = solved(loss)
    assert total_variation(trained(slug, 250, 0.1, **settings), optimum) < 2e-3
    tilted = torch.tensor(bandit.optimal_policy(settings["beta"]), dtype=torch.float64)
    assert total_variation(tilted, optimum) > 0.01  # not DPO's


@pytest.mark.parametrize("slug", ["is_daa", "wpo"])
def test_weights_do_not_move_an_optimum_that_fits_every_pair(slug):
    """With exact labels the tilted reference leaves no pair anything to learn, whatever the pairs weigh."""
    assert total_variation(trained(slug, 400, 0.1, beta=1.0), bandit.optimal_policy(1.0)) < 3e-3


# ---- what imitation is for ----


def test_imitation_keeps_chosen_replies_likely():
    """A small transformer, pairs that differ in one token, 200 steps: as many pairs ranked right as with DPO, chosen replies likelier."""
    torch.manual_seed(0)
    start = LlamaForCausalLM(LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    ))
    rows = torch.randint(2, 24, (8, 1, 9)).repeat(1, 2, 1)
    rows[:, 1, 5] = (rows[:, 0, 5] - 2 + torch.randint(1, 22, (8,))) % 22 + 2  # another token in the middle of the reply
    ids, one = rows.view(16, 9), torch.ones(8)
    layout = layout_of([6] * 16, pairs=Pairs(torch.arange(8) * 2, torch.arange(8) * 2 + 1, one, one, 0 * one))

    def token_logps(model):
        logps = model(input_ids=ids).logits.float().log_softmax(-1)
        return logps[:, 2:-1].gather(-1, ids[:, 3:, None]).flatten()

    def after_training(objective):
        model = copy.deepcopy(start)
        reference, optimiser = token_logps(start).detach(), torch.optim.AdamW(model.parameters(), lr=1e-3)
        totals = total_weights(objective, layout)
        for _ in range(200):
            batch = scored(objective, layout, {"policy": token_logps(model), "reference": reference})
            optimiser.zero_grad()
            reduce_terms(batch, objective(batch), totals)[0].backward()
            optimiser.step()
        batch = scored(objective, layout, {"policy": token_logps(model).detach(), "reference": reference})
        reward = objective.rewards(batch)
        return (reward[::2] > reward[1::2]).float().mean().item(), batch.logp()[::2].mean().item()

    dpo, imitating = after_training(DPO(beta=0.1)), after_training(RegularizedPO(beta=0.1, eta=0.005))
    assert dpo[0] == imitating[0] == 1.0
    assert imitating[1] > dpo[1] + 1
