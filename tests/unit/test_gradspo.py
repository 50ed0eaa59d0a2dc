"""GradSPO's targets: which they are, what they teach, and who draws the candidates that they are made of."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.config.schema import TrainConfig
from prefopt.objectives.trajectory import GradSPO, SPODiffusion
from prefopt.policies.guidance import Guidance
from prefopt.policies.reference import FrozenCopy
from prefopt.policies.trajectory import Sampling, policy_times
from prefopt.training.branches import Branches
from prefopt.training.moving import Moving, moving_averages
from prefopt.training.replay import replay_check
from tests.toy_pictures import picture_policy, process_of
from tests.toy_runs import fresh_accelerator
from tests.unit.test_trajectories import make

CANDIDATES = {"candidates": 3, "window": [1, 3], "noise": 1.0}
KINDS = ("epsilon", "v", "flow")


def pairs_of(engine, source):
    """(step-1 micro-batch, its chosen edges, its rejected edges, its sites)."""
    micro = source.step(0)[0]
    engine.score(micro)
    return micro, micro.layout.pairs.chosen, micro.layout.pairs.rejected, micro.made


def noises(model, sampling, sites):
    said = model.predict(sites.x_t, policy_times(sampling, sites.step, sites.x_t), sites.captions, None, sampling.guidance)
    return sampling.noise_of(said, sites.x_t, sites.step)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_lie_on_both_sides_of_the_prediction_along_what_made_the_candidates(kind, tmp_path):
    """q = eps -/+ grad_scale sigma g, with g = (x_best - x_worst) / (2 std) of the candidates that SPO keeps of the same draw."""
    kept, extra = {}, {"kind": "cps"} if kind == "flow" else {}
    with fresh_accelerator() as accelerator:
        for objective in (SPODiffusion(), GradSPO(grad_scale=0.7)):
            engine, source = make(accelerator, tmp_path / type(objective).__name__, objective, kind, trajectory=CANDIDATES | extra)
            micro, chosen, rejected, sites = pairs_of(engine, source)
            assert torch.equal(sites.x_t[chosen], sites.x_t[rejected]) and len(chosen)
            kept[type(objective)] = sites.x_t[chosen], sites.x_to[chosen], sites.x_to[rejected]
    sampling, eps, step = engine.policy.sampling, noises(engine.policy, engine.policy.sampling, sites)[chosen], sites.step[chosen]
    (parent, best, worst), (same, better, worse) = kept.values()
    assert torch.equal(parent, same)
    std = sampling.gaussian(torch.zeros_like(parent), parent, step)[1]
    sigma = sampling.process.scales(sampling.times[step])[1]
    apart = (best - worst) / (2 * std.float().view(-1, 1, 1, 1)) * 0.7 * sigma.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(better, eps - apart, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(worse, eps + apart, atol=2e-5, rtol=1e-4)


def sampling_of(kind):
    times = process_of(kind).schedule(5)
    return Sampling(process_of(kind), times, torch.ones(5, dtype=torch.float64), (1, 2, 3), Guidance(), targets=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", [0.0, 3.0])
def test_the_logit_is_the_product_of_g_and_the_change_of_the_noise(kind, average):
    """-4 beta s sigma mean g (eps - eps_ref), in fp64, whatever the prediction is that the targets lie around."""
    rng = torch.Generator().manual_seed(1)
    x, now, then, drawn, g = (0.01 * torch.randn(6, 3, 2, 2, generator=rng, dtype=torch.float64) for _ in range(5))
    step, sampling, objective = torch.tensor([1, 1, 2, 2, 3, 3]), sampling_of(kind), GradSPO(beta=2.0, epsilon=0.9, grad_scale=0.3)
    targets = Branches(None, None, objective.pull())._targets(sampling, average + drawn, x, step, g)
    score = {name: [sampling.score(said, x, q, step) for q in targets] for name, said in (("policy", now), ("reference", then))}
    ratio = [a - b for a, b in zip(score["policy"], score["reference"], strict=True)]
    apart = sampling.noise_of(now, x, step) - sampling.noise_of(then, x, step)
    wanted = -4 * 2.0 * 0.3 * sampling.process.scales(sampling.times[step])[1] * (g * apart).flatten(1).mean(1)
    torch.testing.assert_close(objective.beta * (ratio[0] - ratio[1]), wanted, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_at_the_start_the_loss_is_ln_2_and_a_step_makes_the_best_candidates_noise_likelier(kind, tmp_path):
    """eps moves against g = (q_l - q_w) / (2 s sigma)."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, GradSPO(), kind, trajectory=CANDIDATES, batch=4)
        micro, chosen, rejected, sites = pairs_of(engine, source)
        assert replay_check(engine, [micro], "fp32")["replay"] <= 1e-5
        before = noises(engine.policy, engine.policy.sampling, sites)[chosen].detach()
        assert engine.step([micro], 1e-4).loss == pytest.approx(math.log(2), abs=1e-6)
        moved = noises(engine.policy, engine.policy.sampling, sites)[chosen].detach() - before
        along = (moved * (sites.x_to[rejected] - sites.x_to[chosen])).flatten(1).sum(1)
    assert along.mean() < 0


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_nothing_is_learned_where_candidates_or_targets_do_not_differ(scale, tmp_path):
    """grad_scale 0: no margin however far the policy goes; g = 0: no gradient."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, GradSPO(grad_scale=scale), "epsilon", trajectory=CANDIDATES)
        micro = source.step(0)[0]
        if scale:
            for walk in engine.policy.walks.values():
                walk.latents[1] = 0.25  # one target for both sides
        with torch.no_grad():
            for parameter in engine.policy.trainable().values():
                parameter += 0.1
        batch = engine.score(micro)
        values = engine.objective(batch).terms[0].values
        torch.testing.assert_close(values, torch.full_like(values, math.log(2)))
        grads = torch.autograd.grad(values.sum(), list(engine.policy.trainable().values()))
    assert max(float(g.abs().max()) for g in grads) < 1e-6


def test_the_average_of_the_policy_draws(tmp_path):
    """With the share that ema_decay leaves, after each step; it stays where it was while the policy learns from its targets."""
    with fresh_accelerator() as accelerator:
        objective = GradSPO(ema_decay=0.75)
        engine, source = make(accelerator, tmp_path, objective, "epsilon", trajectory=CANDIDATES)
        source.cfg.algo, averages = {}, moving_averages(objective, engine.policy)
        moving = Moving(engine, source, TrainConfig(algo={}), averages)
        start = {name: p.clone() for name, p in engine.policy.trainable().items()}
        engine.step(source.step(0), 1e-2)
        moving(1)
        for name, p in averages["writer"].state().items():
            torch.testing.assert_close(p, 0.75 * start[name] + 0.25 * engine.policy.trainable()[name])
        drawn = source._begin(2, source.sampling(2))
        with averages["writer"].model() as writer:
            sites = [own[place] for own in drawn.latents for place in range(2)]
            captions = [source.prompts.rows[d.prompt].tokens.prompt[0] for d in drawn.drawn for _ in range(2)]
            x, step = torch.stack([s[0] for s in sites]), torch.tensor([1, 2] * len(drawn.drawn))
            eps = writer.predict(x, policy_times(source.sampling(2), step, x), captions, None)
    torch.testing.assert_close(torch.stack([(s[1] + s[2]) / 2 for s in sites]), eps, atol=1e-5, rtol=1e-4)


def test_a_copy_shares_what_is_not_trained():
    """An average of an adapter costs the adapter, not the model that it lies on."""
    policy = picture_policy()
    policy.network.layers[0].weight.requires_grad_(False)
    copied = FrozenCopy(policy).frozen.network.layers
    assert copied[0].weight is policy.network.layers[0].weight
    assert copied[2].weight is not policy.network.layers[2].weight and torch.equal(copied[2].weight, policy.network.layers[2].weight)
    assert policy.network.layers[2].weight.requires_grad and not copied[2].weight.requires_grad
