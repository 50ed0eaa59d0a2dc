"""Objectives on pictures: every one takes steps, what their papers claim in numbers, and the traps of training by denoising errors."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from samples import floats, layout_of, one_unit, rankings, scored

from prefopt.config.catalogue import algo_info, groups, load_yaml, modalities
from prefopt.config.compose import typed
from prefopt.config.schema import ModelConfig, OptimConfig
from prefopt.config.strength import SD15, in_nats, latent_dims
from prefopt.data.extra import EXTRA, captions_of, less_liked
from prefopt.data.records import BadRow
from prefopt.objectives.base import Unary, reduce_terms, total_weights
from prefopt.objectives.diffusion import ABC, DSPO, SUDO, CaptionDPO, MarginAwarePO, RewardWeightedRegression
from prefopt.objectives.listwise import RankDPO
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.unary import DiffusionKTO
from prefopt.policies.noise import HEAD
from prefopt.policies.reference import make_reference
from prefopt.training.engine import Engine
from prefopt.training.moving import moving_averages
from prefopt.training.setup import make_objective
from tests.toy import example
from tests.toy_pictures import picture_policy, picture_source, pictured, ranked, rows_of
from tests.toy_runs import fresh_accelerator, gradients
from tests.unit.test_compose import composed
from tests.unit.test_engine import engine_of, rows_for, source_of

BOTH = [slug for slug in groups()["algo"] if "diffusion" in modalities(algo_info(slug)) and not algo_info(slug).stepwise]
CAPTIONS = ("a cat", "a dog on the left", "two red birds", "a house", "three blue cars", "a tree")


def named(slug: str, dims: int = 2, **settings):
    return make_objective(in_nats({**load_yaml("algo", slug), **settings}, dims))


def loss_of(objective, batch):
    return reduce_terms(batch, objective(batch), total_weights(objective, batch))[0]


def pairs(count: int = 6, **row) -> list:
    return [pictured(CAPTIONS[i % 6], f"good.{i}", f"bad.{i}", **row) for i in range(count)]


def trained(policy, objective, examples, steps: int, lr: float = 1e-2, batch: int | None = None) -> list[float]:
    """Losses of so many steps."""
    with fresh_accelerator() as accelerator:
        reference = make_reference(policy, "initial") if "reference" in objective.quantities else None
        averages = moving_averages(objective, policy)
        engine = Engine(policy, objective, reference, OptimConfig(lr=lr, warmup=0.0, max_grad_norm=1e9), accelerator)
        engine.beside |= averages
        source = picture_source(policy, objective, rows_of(policy, objective, examples), batch=batch)
        return [engine.step(source.step(step), lr).loss for step in range(steps)]


def scored_rows(policy, objective, examples, change: float = 0.0):
    """The batch of all rows, against the policy as it stands; `change` moves the policy's weights beforehand."""
    reference = make_reference(policy, "initial")
    with torch.no_grad():
        for weight in policy.parameters():
            weight += change * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with fresh_accelerator() as accelerator:
        engine = Engine(policy, objective, reference, OptimConfig(), accelerator)
        (micro,) = picture_source(policy, objective, rows_of(policy, objective, examples)).step(0)
        return engine.score(micro), micro


# ---- every objective, on pictures and on texts ----------------------------------------------------


@pytest.mark.parametrize("slug", BOTH)
def test_trap_4_9_every_objective_takes_steps_on_pictures(slug):
    """Nothing is registered that does not run. Losses are finite and the weights move."""
    policy = picture_policy()
    objective = named(slug)
    before = copy.deepcopy(policy.network.state_dict())
    examples = [ranked(CAPTIONS[i], 2.0, 1.0, 0.0) for i in range(3)] + pairs() if objective.view == "ranking" else pairs()
    losses = trained(policy, objective, examples, 3)
    assert all(map(math.isfinite, losses))
    assert any((policy.network.state_dict()[name] != value).any() for name, value in before.items())


@pytest.mark.parametrize("slug", [slug for slug in BOTH if "llm" in modalities(algo_info(slug))])
def test_the_same_objectives_take_steps_on_texts(slug):
    objective = make_objective(load_yaml("algo", slug))
    with fresh_accelerator() as accelerator:
        engine, source = engine_of(objective, accelerator), source_of(objective, rows_for(objective, 8), 10**6)
        before = copy.deepcopy(engine.policy.state_dict())
        losses = [engine.step(source.step(step), 1e-2).loss for step in range(2)]
        assert all(map(math.isfinite, losses)) and any((engine.policy.state_dict()[n] != v).any() for n, v in before.items())


@pytest.mark.parametrize(("slug", "kind"), [("diffusion_dpo", "epsilon"), ("diffusion_kto", "flow"), ("abc_diffusion", "epsilon"),
                                           ("dspo", "flow"), ("rankdpo", "epsilon")])  # fmt: skip
def test_trap_4_3_the_gradient_does_not_depend_on_the_split(slug, kind):
    """The logistic loss is taken of each row, not of a mean over the batch."""
    found = []
    for budget in (10**6, 1):
        policy, objective = picture_policy(kind, draws=2, dropout=0.3), named(slug)
        reference = make_reference(policy, "initial")
        with torch.no_grad():
            policy.network.layers[0].weight += 0.1
        with fresh_accelerator() as accelerator:
            engine = Engine(policy, objective, reference, OptimConfig(max_grad_norm=1e9), accelerator)
            micros = picture_source(policy, objective, rows_of(policy, objective, pairs()), budget).step(0)
            assert len(micros) == (1 if budget > 1 else 6)
            found.append(gradients(engine, micros))
    (whole, loss), (split, loss_split) = found
    assert loss == pytest.approx(loss_split, rel=1e-5)
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-4, atol=1e-7)


# ---- Diffusion-DPO and Flow-DPO --------------------------------------------------------------------


SDXL = ModelConfig(name="sdxl", kind="diffusion", resolution=1024, latent=[4, 8])


@pytest.mark.parametrize(("beta", "margin", "loss"), [(5000, 1.5, 0.2014133), (2000, 0.6, 0.4374880)])
@pytest.mark.parametrize("dims", [SD15, latent_dims(SDXL), 8])
def test_traps_4_1_and_4_2_a_papers_beta_means_the_same_on_every_model(beta, margin, loss, dims):
    """Errors are means over latent dims, with the factor one half on all models alike; at any resolution the same errors give one loss."""
    objective = named("diffusion_dpo", dims, beta=f"{beta}/D")
    names = {name: -0.5 * dims * error for name, error in {"w": 0.1, "l": 0.101, "rw": 0.1003, "rl": 0.1007}.items()}
    batch = one_unit(objective, names)
    assert float(loss_of(objective, batch)) == pytest.approx(loss, abs=1e-6)
    assert float(objective.rewards(batch) @ floats([1, -1])) == pytest.approx(margin, abs=1e-9)


def test_trap_4_1_the_strengths_of_known_models():
    assert latent_dims(SDXL) == 65536 and SD15 == 16384
    assert (5000 / SD15, 5000 / latent_dims(SDXL)) == pytest.approx((0.305, 0.0763), abs=3e-4)
    policy = picture_policy(shape=(2, 1, 1))
    assert latent_dims(policy.cfg) == 2


@pytest.mark.parametrize(("words", "dims"), [(("model=sd15",), SD15), (("model=sdxl",), 4 * SD15),
                                             (("model=sdxl", "model.resolution=512"), SD15), (("model=tiny-flow",), 3 * 16 * 16)])
def test_trap_4_1_a_run_has_the_beta_of_its_models_latents(words, dims):
    cfg = typed(composed("algo=diffusion_dpo", "data=tiny-pictures", *words), "train", "diffusion_dpo")
    assert latent_dims(cfg.model) == dims and make_objective(cfg.algo).beta == pytest.approx(2000 / dims)


def test_where_code_and_paper_disagree_the_paper_is_the_default():
    words = ("model=sd15", "data=pictures", "data.path=x")
    sudo, rankdpo = (typed(composed(f"algo={slug}", *words), "train", slug) for slug in ("sudo", "rankdpo"))
    assert list(sudo.data.transforms) == ["damaged_pictures"]  # its code takes other rows' pictures
    assert (rankdpo.noise.plan, rankdpo.data.transforms) == ("independent", {})  # one time for all pictures of a prompt, a noise for each


def test_a_score_is_half_the_summed_error():
    policy = picture_policy(draws=3, shape=(2, 2, 2))
    batch, _ = scored_rows(policy, DPO(), pairs(2))
    made = batch.scores["policy"]
    mean = batch.edge_sum(made["error"]) / 3
    torch.testing.assert_close(batch.logp(), -0.5 * 8 * mean)


@pytest.mark.parametrize("beta", [2000, 5000])
def test_the_gradient_on_errors_is_a_quarter_of_beta_at_the_start(beta):
    objective, error = named("diffusion_dpo", SD15, beta=f"{beta}/D"), torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    for order, sign in (((0, 1), 1), ((1, 0), -1)):  # exchanged sides, exchanged signs
        batch = one_unit(objective, {"w": 0, "l": 0})
        logp = -0.5 * SD15 * error[list(order)]
        batch.scores = {"policy": {"logp": logp}, "reference": {"logp": logp.detach()}}
        loss = loss_of(objective, batch)
        assert loss.item() == pytest.approx(math.log(2))
        assert torch.autograd.grad(loss, error)[0].tolist() == pytest.approx([sign * beta / 4, -sign * beta / 4])


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_trap_4_5_a_pair_shares_its_draws_and_turning_it_round_turns_the_logit(kind):
    objective = named("diffusion_dpo")
    seen = []
    for sides in (("good.1", "bad.1"), ("bad.1", "good.1")):
        policy = picture_policy(kind, draws=4, dropout=0.5)
        batch, micro = scored_rows(policy, objective, [pictured("a cat", *sides)], change=0.3)
        seen.append(float(objective.rewards(batch) @ torch.tensor([1.0, -1.0])))
        t, target = micro.made.t, micro.made.target
        assert torch.equal(t[:4], t[4:]) and micro.made.captions[:4] == micro.made.captions[4:]
        if kind == "epsilon":
            assert torch.equal(target[:4], target[4:])  # one noise for both
    assert seen[0] == -seen[1] != 0


@pytest.mark.parametrize("plan", ["shared", "independent"])
def test_trap_4_5_pictures_that_look_alike_teach_nothing_under_shared_noise(plan):
    policy = picture_policy(plan=plan)
    with fresh_accelerator() as accelerator:
        objective = named("diffusion_dpo", beta="2/D")
        engine = Engine(policy, objective, make_reference(policy, "initial"), OptimConfig(max_grad_norm=1e9), accelerator)
        rows = rows_of(policy, objective, [pictured("a cat", "good.1", "good.2")])  # two files, the same numbers
        grads, loss = gradients(engine, picture_source(policy, objective, rows).step(0))
    assert loss == pytest.approx(math.log(2))
    steepest = max(float(g.abs().max()) for g in grads.values())
    assert steepest < 1e-6 if plan == "shared" else steepest > 1e-3


def test_trap_4_6_a_tie_teaches_nothing_at_the_start():
    """A label of one half is no win for the first picture, and pictures with equal scores are not compared."""
    policy = picture_policy()
    tie = [pictured("a cat", "good", "bad", label=0.5)]
    for slug, examples in (("diffusion_dpo", tie), ("rankdpo", [ranked("a cat", 1.0, 1.0, 0.0)])):
        objective = named(slug)
        with fresh_accelerator() as accelerator:
            engine = Engine(policy, objective, make_reference(policy, "initial"), OptimConfig(max_grad_norm=1e9), accelerator)
            rows = rows_of(policy, objective, examples)
            (micro,) = picture_source(policy, objective, rows).step(0)
            batch = engine.score(micro)
            scores = batch.logp()
            grad = torch.autograd.grad(loss_of(objective, batch), scores)[0]
        if slug == "rankdpo":
            assert grad[0] == grad[1] < 0 < grad[2]
        else:
            assert not grad.any()


def test_trap_4_8_a_caption_is_left_out_for_the_pair_and_the_reference_alike():
    policy = picture_policy(dropout=0.5)
    nothing, left_out = policy.encodings.caption_of(""), 0
    _, micro = scored_rows(policy, named("diffusion_dpo"), pairs(24))
    for chosen, rejected in zip(micro.layout.pairs.chosen.tolist(), micro.layout.pairs.rejected.tolist(), strict=True):
        assert micro.made.captions[chosen] == micro.made.captions[rejected]
        left_out += micro.made.captions[chosen] == nothing
    assert 4 < left_out < 20
    batch, _ = scored_rows(policy, named("diffusion_dpo"), pairs(24))
    assert torch.equal(batch.logp(), batch.logp("reference"))


def test_diffusion_dpo_learns_which_of_two_clusters_is_liked():
    policy, objective = picture_policy(), named("diffusion_dpo", 2, beta="20/D")
    trained(policy, objective, [pictured("a cat", f"good.{i}" if i % 2 else f"good{i}", f"bad{i}") for i in range(32)], 200, batch=16)
    fresh = picture_policy()
    fresh.network.load_state_dict(policy.network.state_dict())
    start = picture_policy()
    held_out = [pictured("a cat", f"good-{i}", f"bad-{i}") for i in range(100)]
    rows = rows_of(policy, objective, held_out, held_out=True)
    start.encodings, fresh.encodings = policy.encodings, policy.encodings
    (micro,) = picture_source(policy, objective, rows).everything("pairs")
    with torch.no_grad():
        gain = torch.zeros(len(micro.layout.lengths)).index_add(
            0, micro.layout.token_edge, fresh(micro)["token_logp"] - start(micro)["token_logp"])
    wins = gain[micro.layout.pairs.chosen] > gain[micro.layout.pairs.rejected]
    assert float(wins.float().mean()) > 0.9


def test_flow_dpo_with_the_weights_of_theory_is_diffusion_dpo_on_the_noise():
    """(1 - t)^2 times the error of a velocity is the error of the noise."""
    policy = picture_policy("flow", weighting="snr", shape=(4, 1, 1))
    batch, micro = scored_rows(policy, named("flow_dpo", 4), pairs(3), change=0.2)
    sites = micro.made
    with torch.no_grad():
        v = policy.predict(sites.x_t, sites.t, sites.captions, None)
    eps, true = (policy.process.eps_of(velocity, sites.x_t, sites.t) for velocity in (v, sites.target))
    torch.testing.assert_close(batch.logp(), -0.5 * (eps - true).square().flatten(1).sum(1), rtol=1e-4, atol=1e-5)


# ---- the others ------------------------------------------------------------------------------------


def ranking_loss(objective, scores, ratios):
    layout = layout_of([1] * len(scores), ranking=rankings([sorted(enumerate(scores), key=lambda e: -e[1])], floats([1])))
    policy = floats(ratios).requires_grad_()
    loss = loss_of(objective, scored(objective, layout, {"policy": policy, "reference": 0 * policy.detach()}))
    return loss.item(), torch.autograd.grad(loss, policy)[0]


@pytest.mark.parametrize("rank_by", ["labels", "model"])
def test_rankdpo_does_not_compare_equals_and_knows_no_order(rank_by):
    objective, rng = RankDPO(beta=1.0, rank_by=rank_by), random.Random(0)
    scores, ratios = [3.0, 1.0, 1.0, 0.0], [0.2, -1.0, 0.4, -0.3]
    want, grads = ranking_loss(objective, scores, ratios)
    for _ in range(5):
        order = rng.sample(range(4), 4)
        loss, grad = ranking_loss(objective, [scores[i] for i in order], [ratios[i] for i in order])
        assert loss == pytest.approx(want) and grad.tolist() == pytest.approx(grads[order].tolist())
    alone, grads = ranking_loss(objective, [1.0, 1.0, 0.0], [0.0, 0.0, 0.0])
    assert grads[0] == pytest.approx(float(grads[1])) if rank_by == "labels" else alone > 0


def test_rankdpo_weighs_a_list_of_two_as_lambdarank_does():
    (loss, _), (plain, _) = (ranking_loss(o, [1.0, 0.0], [0.7, -0.4]) for o in (RankDPO(beta=1.0), RankDPO(beta=1.0, gain="score")))
    assert loss == plain == pytest.approx(0.5324558 * math.log(1 + math.exp(-1.1)), abs=1e-7)
    weights = (0.3119054, 0.7213475, 0.0782415)
    assert ranking_loss(RankDPO(), [5.0, 2.0, -1.0], [0.0] * 3)[0] == pytest.approx(math.log(2) * sum(weights), abs=1e-6)


def test_diffusion_kto_compares_with_the_mean_of_its_batch():
    """What is as likely as the batch's mean, above 0, costs one half; below 0 nothing is subtracted; an edge of weight 0 has no say."""
    objective, edges = DiffusionKTO(beta=2.0), torch.arange(3)
    for ratios, weight, z in (([1.0, 1.0, 1.0], [1, 1, 1], 1.0), ([-3.0, -1.0, -2.0], [1, 1, 1], 0.0), ([1.0, 3.0, 99.0], [1, 1, 0], 2.0)):
        layout = layout_of([1] * 3, unary=Unary(edges, edges < 2, floats(weight), edges[:0]))
        terms = objective(scored(objective, layout, {"policy": floats(ratios), "reference": floats([0, 0, 0])}))
        assert float(terms.metrics["kl_estimate"]) == z
        want = [1 - 1 / (1 + math.exp(-sign * 2 * (r - z))) for r, sign in zip(ratios, (1, 1, -1), strict=True)]
        assert terms.terms[0].values.tolist() == pytest.approx(want)


def test_two_captions_of_one_picture():
    """TDPO is Diffusion-DPO with a caption for each side; the picture, its time and its noise are the same."""
    right, wrong = ({"image": "good", "caption": text} for text in ("a red cat", "a blue cat"))
    example = pictured("a red cat", right, wrong)
    losses = []
    for objective in (CaptionDPO(beta=0.5, clip=1e9), DPO(beta=0.5)):
        policy = picture_policy(draws=2, plan="independent")
        batch, micro = scored_rows(policy, objective, [example], change=0.3)
        losses.append(loss_of(objective, batch).item())
        assert torch.equal(micro.made.x_t[:2], micro.made.x_t[2:]) and len(set(micro.made.captions)) == 2
        ids = [row[1 : 1 + HEAD] for row in micro.input_ids.tolist()]
        assert ids[0][0] == ids[1][0] and ids[0][1] != ids[1][1] and ids[0][2] == ids[1][2]
    assert losses[0] == losses[1] != pytest.approx(math.log(2), abs=1e-3)


def test_a_wrong_caption_is_not_pushed_beyond_the_clip():
    objective = CaptionDPO(beta=1.0, clip=2.0)
    for rejected, learns in ((-1.9, True), (-2.1, False)):
        leaf = floats([0.3, rejected]).requires_grad_()
        batch = replace(one_unit(objective, {"w": 0, "l": 0}), scores={"policy": {"logp": leaf}, "reference": {"logp": floats([0, 0])}})
        terms = objective(batch)
        grad = torch.autograd.grad(terms.terms[0].values.sum(), leaf)[0]
        assert grad[0] < 0 and (grad[1] > 0) == learns and float(terms.metrics["clipped"]) == (not learns)
    same = floats([0.3, 0.3]).requires_grad_()
    batch.scores["policy"]["logp"] = same
    loss = objective(batch).terms[0].values.sum()
    assert loss.item() == pytest.approx(math.log(2)) and float(torch.autograd.grad(loss, same)[0].sum()) == 0


def test_abc_scores_both_pictures_under_both_captions_at_one_draw():
    policy, objective = picture_policy(draws=2), ABC(scale=1.0)
    _, micro = scored_rows(policy, objective, pairs(1))
    said = [policy.encodings.said[c] for c in micro.made.captions]
    assert said == ["a cat"] * 4 + [less_liked("a cat")] * 4
    assert torch.equal(micro.made.x_t[:4], micro.made.x_t[4:]) and torch.equal(micro.made.t[:4], micro.made.t[4:])
    assert micro.layout.pairs.extra.tolist() == [[2, 3]] and not torch.equal(micro.made.x_t[:2], micro.made.x_t[2:4])


def abc_gradients(delta: float, w: float, other: float) -> tuple[float, float]:
    """dL/ds of the loser's error and of the winner's, both under the caption, where the other two errors fit."""
    objective = ABC(delta=delta, scale=1.0)
    errors = floats([w, other, w + delta, w]).requires_grad_()
    batch = one_unit(objective, {"w": 0, "l": 0, "XS": [(0, 0, 1), (0, 0, 1)]})
    batch.scores = {"policy": {"logp": -errors}}
    grad = torch.autograd.grad(loss_of(objective, batch), errors)[0]
    return float(grad[1]), float(grad[0])


def test_abc_pushes_losers_to_the_margin_and_no_further():
    for error, sign in ((0.11, -1), (0.125, 0), (0.2, 1)):
        loser, winner = abc_gradients(0.025, 0.1, error)
        assert loser * sign > 1e-3 if sign else abs(loser) < 1e-12
        assert winner > 0
    assert abs(abc_gradients(0.0, 0.1, 0.1)[0]) < 1e-15 and abc_gradients(0.0, 0.1, 0.1)[1] > 0  # alike, and no margin


def test_sudo_between_its_two_halves():
    """A loser that is its winner leaves half of imitation's gradient; without imitation it is Diffusion-DPO."""
    logp = floats([-0.1, -0.1]).requires_grad_()
    objective = SUDO(beta=10.0, scale=2.0)
    batch = one_unit(objective, {"w": 0, "l": 0})
    batch.pairs.rejected = batch.pairs.chosen  # one picture, twice
    batch.scores = {"policy": {"logp": logp}, "reference": {"logp": floats([-0.3, -0.3])}}
    grad = torch.autograd.grad(loss_of(objective, batch), logp)[0]
    assert grad.tolist() == pytest.approx([-0.5 * 2.0, 0.0])  # the mean error is -2 log pi
    names = {"w": -0.1, "l": -0.4, "rw": -0.2, "rl": -0.2}
    losses = [float(loss_of(o, one_unit(o, names))) for o in (SUDO(beta=3.0, mix=0.0), DPO(beta=3.0))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_equal_scores_make_plain_imitation():
    entries = [(-0.1, None, 1, 1.5), (-0.3, None, 1, 1.5), (-0.8, None, 1, 1.5)]
    plain = 2 * 1.2 / 3
    for weights, factor in (("exp", math.exp(1.5)), ("softmax", 1.0)):
        objective = RewardWeightedRegression(weights=weights, scale=2.0)
        assert float(loss_of(objective, one_unit(objective, {"S": entries}))) == pytest.approx(factor * plain)


def test_dspo_is_the_squared_distance_from_a_moved_target():
    """Against the definition, on the predictions themselves."""
    policy, objective = picture_policy(shape=(3, 1, 1)), DSPO(beta=0.7, scale=2 / 3)
    before = copy.deepcopy(policy)
    batch, micro = scored_rows(policy, objective, pairs(4), change=0.3)
    sites = micro.made
    with torch.no_grad():
        now, then = (p.predict(sites.x_t, sites.t, sites.captions, None).flatten(1) for p in (policy, before))
    target = sites.target.flatten(1)
    error = [(prediction - target).square().mean(1) for prediction in (now, then)]
    w, lose = batch.pairs.chosen, batch.pairs.rejected
    margin = -0.5 * 0.7 * ((error[0][w] - error[0][lose]) - (error[1][w] - error[1][lose]))
    k = 0.7 * torch.sigmoid(-margin)[:, None]
    want = ((now - target)[w] - k * (now - then)[w]).square().mean(1)
    torch.testing.assert_close(objective(batch).terms[0].values * objective.scale, want, rtol=1e-4, atol=1e-6)


def test_mapo_prefers_the_smaller_error():
    objective = MarginAwarePO(scale=2.0)
    batch = one_unit(objective, {"w": -0.05, "l": -0.06})
    reward = objective.rewards(batch)
    assert reward[0] > reward[1] and float(reward.max()) < objective.times
    u = 0.5 * 2 * 0.05
    assert float(reward[0]) == pytest.approx(1000 * u / math.expm1(u))


def test_the_captions_of_extra_pictures_are_known_beforehand():
    """Under the row's caption with the suffix, or under the picture's own; a ranking's pairs share its group of pictures."""
    rows = [*pairs(2), pictured("a cat", {"image": "good", "caption": "a dog."}, "bad"), ranked("a house", 2.0, 1.0, 0.0)]
    texts = [row.prompt_text for row in captions_of(rows, ABC.extra)]
    assert texts == [less_liked(c) for c in ("a cat", "a dog on the left", "a dog", "a house")]
    assert captions_of(rows, ()) == [] == captions_of(rows, ("rationale",))
    policy = picture_policy()
    for row in rows_of(policy, ABC(), rows):
        groups_of = {branch.ids[2] for made in (row.tokens, *row.extra) for branch in made.branches}
        assert len(groups_of) == 1 and len(row.extra) == 2 * len(row.pairs())
        said = {policy.encodings.said[made.branches[0].ids[1]] for made in row.extra}
        assert said <= set(texts)
    with pytest.raises(BadRow, match="it is a text, and this algorithm is about pictures"):
        EXTRA[ABC.extra[0]].make(example(prompt="Q", chosen="a", rejected="b"))
