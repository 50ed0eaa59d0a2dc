"""Learning from sampling trajectories, on a policy of a few hundred weights: rounds, replay, resuming, and the traps of online training."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from prefopt.config.schema import OptimConfig, SamplerConfig, SourceConfig, TrainConfig, TrajectoryConfig
from prefopt.data.batch import Row
from prefopt.data.dataset import Dataset
from prefopt.data.tokenise import Tokens
from prefopt.errors import RunFailed, UserError
from prefopt.objectives.trajectory import D3PO, DDPO, DPOK, FlowGRPO, GradSPO, SPODiffusion
from prefopt.policies.guidance import Guidance
from prefopt.policies.process import Process
from prefopt.policies.reference import make_reference
from prefopt.policies.samplers import log_prob
from prefopt.policies.trajectory import STEP, draw_walks, window_of
from prefopt.training.engine import Engine
from prefopt.training.replay import replay_check
from prefopt.training.source import OfflineSource
from prefopt.training.trajectories import TrajectorySource
from tests.toy import data_config, example
from tests.toy_pictures import picture_policy
from tests.toy_runs import fresh_accelerator, gradients

CAPTIONS = ("a cat", "a dog", "A cat", "a bird")
FEW = {"steps": 4, "window": [0, 3], "window_size": None}
ADVANTAGE = {DPOK: "none"}


def bright(examples) -> list[float]:
    """The known reward: the sum of a picture's numbers, at most 3."""
    return [min(float(e.completions[0].picture["image"].sum()), 3.0) for e in examples]


def score(x, captions, left, examples):
    """The same of latents that are foreseen."""
    return x.flatten(1).sum(1)


def make(accelerator, tmp_path, objective, kind="flow", reward=bright, trajectory=None, batch=2, lr=1e-2, budget=10**6, seed=0,
         captions=CAPTIONS, guidance=1.0, policy=None, samples=4):
    policy = policy or picture_policy(kind, seed=seed)
    policy.cfg = replace(policy.cfg, guidance=guidance)
    policy.encoders = lambda: SimpleNamespace(decode=list)
    examples = [replace(example(prompt=text, chosen={"image": "good"}, rejected={"image": "bad"}), completions=[], origin=f"row {i}")
                for i, text in enumerate(captions)]
    rows = [Row(Tokens([policy.encodings.caption_of(text)], []), "prompt") for text in captions]
    reference = make_reference(policy, "initial") if "reference" in objective.quantities else None
    engine = Engine(policy, objective, reference, OptimConfig(lr=lr, warmup=0.0), accelerator)
    own = {"advantage": ADVANTAGE.get(type(objective), "group"), **FEW, **(trajectory or {})}
    source = SourceConfig("trajectories", prompts=4, samples=samples)
    cfg = TrainConfig(algo={}, trajectory=TrajectoryConfig(**own), source=source, sampler=SamplerConfig(batch_size=7),
                      data=data_config(pictures=True), run_dir=str(tmp_path))
    batches = OfflineSource([], objective.view, batch, budget, 0, True, seed, layout="draws", share=False)
    return engine, TrajectorySource(engine, Dataset(rows, examples), reward, cfg, batches, score)


def learn(engine, source, steps, lr=1e-2):
    return [engine.step(source.step(i), lr) for i in range(steps)]


def drawn_reward(policy, source, number=10**6, count=96) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of the reward of new pictures, drawn with the steps' noise."""
    captions = [row.tokens.prompt[0] for row in source.prompts.rows] * (count // 4)
    latents, _ = draw_walks(policy, source.sampling(0), captions, [("judged", number, i) for i in range(count)])
    rewards = latents[:, -1].flatten(1).sum(1).clamp(max=3)
    return rewards.mean().item(), 1.96 * rewards.std().item() / math.sqrt(count)


# ---- each method learns -------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "kind", "trajectory"), [
    (FlowGRPO(beta=0.001, epsilon=0.2), "flow", {"kl": "exact"}),
    (DDPO(epsilon=0.2), "epsilon", {"noise": 1.0, "advantage": "running"}),
    (DPOK(epsilon=0.2, beta=0.001, w_r=1.0), "flow", {"kl": "error"}),
    (D3PO(beta=5.0, epsilon=0.5), "epsilon", {"noise": 1.0, "shared_start": True}),
    (SPODiffusion(beta=5.0, epsilon=0.5), "epsilon", {"noise": 1.0, "candidates": 3, "window": [1, 3], "threshold": 0.05}),
    (GradSPO(beta=5.0, epsilon=0.5), "epsilon", {"noise": 1.0, "candidates": 3, "window": [1, 3], "threshold": 0.05}),
], ids=["flow_grpo", "ddpo", "dpok", "d3po", "spo_diffusion", "gradspo"])
def test_the_reward_rises(objective, kind, trajectory, tmp_path):
    """The interval of the gain is clear of zero, in fifty steps of a policy of a few hundred weights."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, objective, kind, trajectory=trajectory, batch=4)
        before, wide = drawn_reward(engine.policy, source)
        learn(engine, source, 50, 2e-2)
        after, narrow = drawn_reward(engine.policy, source)
    assert after - before > wide + narrow


def compressible(examples) -> list[float]:
    """Minus the size of a picture of 16 pixels as a JPEG, kB: each of its numbers is a square of four."""
    out = []
    for e in examples:
        pixels = ((e.completions[0].picture["image"][0].clamp(-1, 1) + 1) * 127.5).byte().numpy().repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=90)
        out.append(-file.tell() / 1000)
    return out


def test_ddpo_makes_pictures_compressible(tmp_path):
    """DDPO's first task (arXiv 2305.13301): the mean size of a round's pictures falls from each ten rounds to the next."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO(), reward=compressible, policy=picture_policy("flow", (1, 4, 4)), batch=4,
                              trajectory={"advantage": "running", "steps": 6, "window": [0, 5]}, samples=16)
        sizes = []
        for number in range(50):
            engine.step(source.step(number), 3e-2)
            sizes.append(-source.metrics["rollout/reward"])
    tens = [fmean(sizes[i : i + 10]) for i in range(0, 50, 10)]
    assert tens == sorted(tens, reverse=True) and tens[-1] < 0.85 * tens[0]


# ---- what is stored is what was drawn -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trap_4_15_a_stored_step_has_the_ratio_one(kind, reduction, tmp_path):
    """Per transition, within the bound, whatever the micro-batches; and nothing is clipped in the first step of a round."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO(), kind, trajectory={"reduction": reduction}, budget=5)
        assert replay_check(engine, source.step(0), "fp32")["replay"] <= 1e-5
        assert engine.step(source.step(0), 1e-3).metrics["clipped"] == 0


def test_trap_4_15_rounded_latents_are_found(tmp_path):
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO())
        micros = source.step(0)
        for walk in engine.policy.walks.values():
            walk.latents = walk.latents.bfloat16().float()
        with pytest.raises(RunFailed, match="replay check: .* Likely cause: the latents that were stored"):
            replay_check(engine, micros, "fp32")


def test_trap_4_32_dropout_is_found_and_named(tmp_path):
    """The reference and rollouts are always without it: two rollouts agree."""
    with fresh_accelerator() as accelerator:
        policy = picture_policy("flow")
        policy.network.layers.insert(2, nn.Dropout(0.5))
        engine, source = make(accelerator, tmp_path, FlowGRPO(), policy=policy)
        micros = source.step(0)
        assert engine.policy.training
        again = source._begin(0, source.sampling(0))
        assert torch.equal(torch.stack([engine.policy.walks[d.walk].latents for d in again.drawn]), again.latents)
        scored = [engine.score(micros[0]).scores["reference"]["step_logp"] for _ in range(2)]
        assert torch.equal(*scored)
        with pytest.raises(RunFailed, match="the network drops out parts of itself while it trains; set model.dropout=0"):
            replay_check(engine, micros, "fp32")


def test_trap_4_34_another_guidance_is_found(tmp_path):
    """What was drawn under one guidance is not trained under another."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO(), guidance=2.0)
        micros = source.step(0)
        assert engine.policy.sampling.guidance == Guidance(2.0, False) and replay_check(engine, micros, "fp32")["replay"] <= 1e-5
        engine.policy.sampling = replace(engine.policy.sampling, guidance=Guidance(1.0))
        with pytest.raises(RunFailed, match="guidance or weights have changed since"):
            replay_check(engine, micros, "fp32")


def test_the_blank_branch_carries_a_gradient_only_where_it_is_asked_to(tmp_path):
    found = []
    with fresh_accelerator() as accelerator:
        for blank in (False, True):
            engine, source = make(accelerator, tmp_path / str(blank), DDPO(), guidance=2.0, trajectory={"blank_gradient": blank})
            found.append(gradients(engine, source.step(0))[0])
    assert any(not torch.allclose(found[0][name], found[1][name]) for name in found[0])


def test_trap_4_16_and_4_33_neither_micro_batches_nor_ranks_change_the_gradient(tmp_path):
    """One process with the union of two ranks' transitions, in micro-batches of any size."""
    found = []
    with fresh_accelerator() as accelerator:
        for budget in (10**6, 5):
            engine, source = make(accelerator, tmp_path / str(budget), FlowGRPO(beta=0.1), budget=budget, trajectory={"window": [0, 3]})
            micros = source.step(0)
            found.append(gradients(engine, micros))
        parts = []
        for rank in range(2):
            engine, source = make(accelerator, tmp_path / f"r{rank}", FlowGRPO(beta=0.1))
            source.step(0)
            source.batches = replace(source.batches, rank=rank, world=2)
            parts += source.step(0)
        found.append(gradients(engine, parts))
    assert len(micros) > 1
    for grads, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][0][name], atol=1e-6, rtol=1e-4)


def test_noise_follows_from_seed_round_row_and_sample(tmp_path):
    """Not from how many are drawn at once; members of a group share x_T where asked, and never the noise of a step."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, D3PO(), trajectory={"shared_start": True})
        whole = source._begin(3, source.sampling(3))
        source.cfg = replace(source.cfg, sampler=SamplerConfig(batch_size=3))
        parts = source._begin(3, source.sampling(3))
        other = source._begin(4, source.sampling(4))
    torch.testing.assert_close(whole.latents, parts.latents, atol=1e-5, rtol=1e-5)
    starts = whole.latents[:, 0].view(4, 4, -1)
    assert (starts == starts[:, :1]).all() and len(starts[:, 0].unique(dim=0)) == 4
    assert len(whole.latents[:, 1].flatten(1).unique(dim=0)) == 16 and not torch.equal(other.latents[:, 0], whole.latents[:, 0])


def test_trap_4_30_the_network_is_told_the_schedules_times(tmp_path, monkeypatch):
    """The same numbers when drawing and when training; those of a flow are no whole thousandths."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO(), trajectory={"steps": 7, "window": [0, 7]})
        told, real = [], engine.policy.denoiser.predict
        monkeypatch.setattr(engine.policy.denoiser, "predict", lambda x, t, *rest: told.append(t) or real(x, t, *rest))
        source._begin(0, source.sampling(0))
        drawn, told[:] = torch.cat(told).unique(), []
        engine.step(source.step(0), 1e-3)
    assert torch.equal(torch.cat(told).unique(), drawn) and len(drawn) == 7
    assert ((drawn * 1000) % 1 > 0.01).any()


@pytest.mark.parametrize(("kind", "words", "first", "last"), [
    ("flow", {"steps": 10}, range(5), 7),  # Flow-GRPO's fast variant: three steps that begin in the first half
    ("flow", {"steps": 10, "early": 1.0}, range(8), 10),
    ("epsilon", {"steps": 10, "early": 1.0}, range(7), 9),  # DDIM's last step has no noise
    ("epsilon", {"steps": 10, "window_size": None}, [0], 5),
    ("epsilon", {"steps": 10, "window_size": None, "early": 1.0}, [0], 9),
    ("flow", {"steps": 5, "window_size": 1, "early": 0.5}, range(3), 3),
    ("flow", {"steps": 10, "window": [6, 10]}, [6, 7], 10),  # what is named is not cut short
])
def test_windows_begin_early(kind, words, first, last):
    cfg, process = TrajectoryConfig(**words), Process(kind, None if kind == "flow" else torch.linspace(0.999, 0.01, 1000))
    found = [window_of(cfg, process, lambda n, place=place: min(place, n - 1)) for place in range(12)]
    assert {window[0] for window in found} == set(first) and max(window[-1] for window in found) + 1 == last
    assert {len(window) for window in found} == {cfg.window_size or last - first[0]}


def test_trap_4_17_a_round_has_one_window(tmp_path):
    """Drawn for all its pictures, inside what is allowed; other rounds have others, and with outside=ode only its steps have noise."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO(), trajectory={"steps": 8, "window": [1, 7], "window_size": 2, "outside": "ode"})
        windows = [source.sampling(number).trained for number in range(20)]
        micros = source.step(0)
        numbers = torch.cat([m.input_ids[m.trained] for m in micros]) - STEP
    assert set(map(len, windows)) == {2} and len(set(windows)) > 2 and min(w[0] for w in windows) >= 1 and max(w[1] for w in windows) <= 6
    assert tuple(numbers.unique().tolist()) == windows[0]
    assert (source.sampling(0).levels > 0).nonzero().flatten().tolist() == list(windows[0])


def test_trap_4_20_and_4_31_groups_are_told_apart_by_number(tmp_path):
    """Captions that are alike but for a capital are two groups, all prompts of a round are different ones, and none is skipped."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO())
        rounds = [source._begin(number, source.sampling(number)) for number in range(2)]
        source._set(rounds[0], 0, source.sampling(0))
    for made in rounds:
        assert sorted({d.prompt for d in made.drawn}) == [0, 1, 2, 3]
    by_picture = {row.tokens.branches[0].ids[0]: row.scores[0] for row in source.rows[1:]}
    for group in range(4):
        assert fmean(by_picture[d.walk] for d in rounds[0].drawn if d.group == group) == pytest.approx(0, abs=1e-6)


def test_trap_4_27_each_picture_is_judged_under_its_own_prompt(tmp_path):
    """A reward that answers with the prompt's number says whose it was asked about; prompts that come twice are two rows."""
    asked = []

    def reward(examples):
        asked.extend(e.prompt_text for e in examples)
        return [CAPTIONS.index(e.prompt_text) + len(asked) / 1000 for e in examples]

    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO(), reward=reward, captions=(*CAPTIONS, "a cat"))
        made = source._begin(0, source.sampling(0))
    assert len(asked) == 16
    for drawn in made.drawn:
        assert int(drawn.reward) == CAPTIONS.index(source.prompts.examples[drawn.prompt].prompt_text)


def test_trap_4_28_nothing_is_written_outside_of_the_run(tmp_path):
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path / "run", DDPO())
        (tmp_path / "run").mkdir()
        learn(engine, source, 3)
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    assert sorted(f.name for f in (tmp_path / "run").rglob("round*.*")) == [
        "round-000000.jsonl", "round-000001.jsonl", "round-000001.safetensors"], "latents no longer than they are needed"


def test_a_round_is_gone_on_with(tmp_path):
    """From its files: the same transitions, advantages and past of each prompt."""
    with fresh_accelerator() as accelerator:
        make_it = dict(trajectory={"advantage": "running", "buffer": 6, "min_count": 3})
        engine, source = make(accelerator, tmp_path, DDPO(), **make_it)
        learn(engine, source, 3, 0.0)
        wanted = source.step(3)[0]
        _, again = make(accelerator, tmp_path, DDPO(), **make_it)
        found = again.step(3)[0]
        assert torch.equal(found.layout.groups.reward, wanted.layout.groups.reward)
        assert torch.equal(found.input_ids, wanted.input_ids)
        assert torch.equal(found.stored["previous"]["token_logp"], wanted.stored["previous"]["token_logp"])
        (tmp_path / "rounds" / "round-000001.safetensors").unlink()
        with pytest.raises(UserError, match="round-000001.safetensors is missing, and the run stopped in the middle of that round"):
            make(accelerator, tmp_path, DDPO(), **make_it)[1].step(3)


# ---- the objectives' own promises ------------------------------------------------------------------------


def scored(engine, source, moved=0.3, micro=None):
    """A batch of the first step, or this micro-batch of it, scored by a policy that has moved."""
    micro = micro or source.step(0)[0]
    with torch.no_grad():
        for i, parameter in enumerate(engine.policy.trainable().values()):
            parameter += moved * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    return engine.score(micro)


def test_dpok_is_ddpo_without_critic_and_penalty(tmp_path):
    with fresh_accelerator() as accelerator:
        dpok = DPOK(beta=0.0, w_r=1.0, epsilon=0.1)
        batch = scored(*make(accelerator, tmp_path, dpok, trajectory={"advantage": "group"}))
    batch.scores["policy"]["value"] = torch.zeros_like(batch.scores["policy"]["value"])
    mine, theirs = dpok(batch).terms[0].values, DDPO(epsilon=0.1)(batch).terms[0].values
    assert torch.equal(mine, theirs) and mine.std() > 0


def test_the_critic_of_dpok_learns_at_a_rate_of_its_own(tmp_path):
    """With the policy's, which is far smaller, the baseline would be what it began as; both follow the schedule."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DPOK(), lr=1e-4)
        before = {name: p.detach().clone() for name, p in engine.policy.trainable().items()}
        engine.step(source.step(0), 1e-5)
        rates = {group["lr"] for group in engine.optimizer.param_groups}
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in engine.policy.trainable().items()}
    policy, critic = (max(far for name, far in moved.items() if name.startswith("owned.") == own) for own in (False, True))
    assert rates == {1e-5, 10 * 1e-5}
    assert policy == pytest.approx(1e-5, rel=0.01) and critic == pytest.approx(10e-5, rel=0.01)  # Adam's first step is its rate


def test_trap_4_29_a_clamp_alone_has_no_gradient_outside_of_its_band():
    """Of either sign of the advantage; PPO's has one where the unclipped loss is the larger."""
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.05], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    slopes = {mode: torch.autograd.grad(DPOK(epsilon=0.1, clip_mode=mode).step_loss(ratio, advantage).sum(), ratio)[0].tolist()
              for mode in ("clamp", "ppo")}
    assert slopes == {"clamp": [0, 0, 0, 0, -1], "ppo": [0, 1, -1, 0, -1]}


@pytest.mark.parametrize("kl", ["exact", "code", "error"])
def test_the_penalty_is_zero_with_zero_slope_at_the_start(kl, tmp_path):
    """And the code's form is the exact one times the length of the step."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, FlowGRPO(), trajectory={"kl": kl})
        micro = source.step(0)[0]
        divergence = engine.score(micro).scores["policy"]["divergence"]
        assert not divergence.any()
        assert not any(g.any() for g in torch.autograd.grad(divergence.sum(), list(engine.policy.trainable().values())))
        moved = scored(engine, source).scores["policy"]["divergence"]
        sampling, sites = engine.policy.sampling, micro.made
        models = engine.policy, engine.reference.frozen
        now, then = (m.predict(sites.x_t, sampling.times[sites.step], sites.captions, None) for m in models)
        if kl == "error":
            wanted = (now - then).square().flatten(1).mean(1)
        else:
            (mean, std), (other, _) = (sampling.gaussian(said, sites.x_t, sites.step) for said in (now, then))
            wanted = (mean - other).square().flatten(1).mean(1) / (2 * std**2).float()
            wanted = wanted * (0.25 if kl == "code" else 1)
        torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("objective", "low", "high"), [(D3PO(), 0.683164, 0.703231), (SPODiffusion(), 0.1261309, 2.1328378),
                                                    (GradSPO(), 0.1261309, 2.1328378)])
def test_trap_4_29_pairs_have_no_gradient_outside_of_the_band(objective, low, high, tmp_path):
    """Inside it the slope is that of the log-ratio; the loss stays between its bounds however far the policy goes."""
    with fresh_accelerator() as accelerator:
        batch = scored(*make(accelerator, tmp_path, objective, trajectory={"shared_start": True}), moved=0.05)
    for scale in (0.02, 50.0):
        ratio = (scale * (batch.scores["policy"]["step_logp"] - batch.scores["reference"]["step_logp"])).detach().requires_grad_()
        here = replace(batch, scores={"policy": {"step_logp": ratio}, "reference": {"step_logp": torch.zeros_like(ratio)}})
        values = objective(here).terms[0].values
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        (slope,) = torch.autograd.grad(values.sum(), ratio)
        outside = (ratio < math.log1p(-0.1)) | (ratio > math.log1p(0.1))
        assert not slope[outside].any() and (slope[~outside] != 0).all() and outside.any() == (scale == 50)


def test_ties_make_no_pair_and_a_step_without_pairs_changes_nothing(tmp_path):
    """Also of a threshold of 1, above which no candidate is: the update is left out, and nobody waits for it."""
    with fresh_accelerator() as accelerator:
        for name, objective, own in (("ties", D3PO(), {}), ("none", SPODiffusion(), {"candidates": 2, "threshold": 1.0})):
            values = iter(range(10**6))
            reward = bright if own else lambda examples, values=values: [float(next(values) // 4) for _ in examples]
            engine, source = make(accelerator, tmp_path / name, objective, trajectory=own, reward=reward)
            before = [p.clone() for p in engine.policy.trainable().values()]
            results = learn(engine, source, 2)
            assert all(r.loss == 0 and r.grad_norm == 0 and not r.skipped for r in results)
            assert all(torch.equal(a, b) for a, b in zip(before, engine.policy.trainable().values(), strict=True))
            assert source.metrics["rollout/kept"] == 0
            assert ("rollout/ties" in source.metrics) == (not own), "candidates are compared with one another, not pictures"


def test_candidates_share_their_parent(tmp_path):
    """log rho_w - log rho_l = mean((x_w - x_l) (mu - mu_ref)) / std^2; the walk goes on from a random one, or where asked from the best."""
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, SPODiffusion(), trajectory={"candidates": 4, "window": [1, 3]})
        micro = source.step(0)[0]
        batch = scored(engine, source, 0.05, micro)
        pairs, sites, sampling = micro.layout.pairs, micro.made, engine.policy.sampling
        assert len(pairs.chosen) and torch.equal(sites.x_t[pairs.chosen], sites.x_t[pairs.rejected])
        means = [sampling.gaussian(m.predict(sites.x_t, sampling.times[sites.step], sites.captions, None), sites.x_t, sites.step)
                 for m in (engine.policy, engine.reference.frozen)]
        apart = (sites.x_to[pairs.chosen] - sites.x_to[pairs.rejected]) * (means[0][0] - means[1][0])[pairs.chosen]
        wanted = apart.flatten(1).mean(1) / means[0][1][pairs.chosen].square()
        ratio = batch.scores["policy"]["step_logp"] - batch.scores["reference"]["step_logp"]
        torch.testing.assert_close(ratio[pairs.chosen] - ratio[pairs.rejected], wanted.float(), atol=1e-5, rtol=1e-4)
        for go_on, share in (("best", 1.0), ("random", 0.25)):
            source.branches.cfg = replace(source.branches.cfg, go_on=go_on)
            made = source._begin(0, sampling)
            went = fmean(torch.equal(own[1, 0], own[0, 1]) for own in made.latents)  # the next parent is the best candidate
            assert went == 1 if share == 1 else went < 0.7


def test_the_log_prob_of_a_transition_is_the_gaussians_density(tmp_path):
    with fresh_accelerator() as accelerator:
        engine, source = make(accelerator, tmp_path, DDPO(), "epsilon", trajectory={"noise": 1.0})
        micro = source.step(0)[0]
        found, sites, sampling = engine.score(micro).scores["policy"]["step_logp"], micro.made, engine.policy.sampling
        said = engine.policy.predict(sites.x_t, sampling.times[sites.step], sites.captions, None)
        mean, std = sampling.gaussian(said, sites.x_t, sites.step)
    exact = torch.distributions.Normal(mean.double(), std.view(-1, 1, 1, 1)).log_prob(sites.x_to.double()).flatten(1).mean(1)
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(log_prob(sites.x_to, mean, std), found)


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reward", "says"), [
    (lambda e: [math.nan] * len(e), "the reward of a sample for the prompt of row . is nan; a reward must be a finite number"),
    (lambda e: [1.0], "the reward gave 1 numbers for 7 samples; it must give one for each"),
    (lambda e: [2.0] * len(e), "the reward of all 16 pictures of the first round is 2: a constant reward says nothing"),
])
def test_a_reward_that_is_none_is_refused(reward, says, tmp_path):
    with fresh_accelerator() as accelerator, pytest.raises(UserError, match=says):
        make(accelerator, tmp_path, DDPO(), reward=reward)[1].step(0)


def test_a_step_without_noise_cannot_be_trained(tmp_path):
    """DDIM's last step ends at the picture itself, where log std would be minus infinity."""
    with fresh_accelerator() as accelerator, pytest.raises(UserError, match=r"step 3 of the 4 .* leave it out: trajectory.window=\[0,3\]"):
        make(accelerator, tmp_path, DDPO(), "epsilon", trajectory={"window": [0, 4]})
