"""Rounds of pictures on a policy of a few hundred weights: who meets whom, what is kept, what follows from which seed, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from prefopt.config.catalogue import load_yaml, resolved_keys
from prefopt.config.compose import typed
from prefopt.config.schema import ModelConfig, OptimConfig, ReferenceConfig, SamplerConfig, SourceConfig, TrainConfig
from prefopt.config.strength import in_nats
from prefopt.data.dataset import make_dataset, prompts_of
from prefopt.data.sources import Split
from prefopt.errors import UserError
from prefopt.policies.noise import HEAD
from prefopt.policies.reference import make_reference
from prefopt.training.engine import Engine, learning_rate, quantities
from prefopt.training.moving import PAST, Moving
from prefopt.training.picture_rounds import PictureRounds
from prefopt.training.setup import make_objective
from prefopt.training.source import OfflineSource
from tests.toy import data_config
from tests.toy_pictures import picture_policy, pictured
from tests.toy_runs import fresh_accelerator
from tests.unit.test_compose import composed

CAPTIONS = ("a cat", "a dog on the left", "two red birds", "a house", "three blue cars", "a tree")
DIMS = 2


@pytest.fixture
def accelerator():
    with fresh_accelerator() as made:
        yield made


def numbers(example) -> torch.Tensor:
    """The "picture" of a toy: its latents, or of a given one the numbers that its name stands for."""
    part = example.completions[0].picture
    return part["image"] if "image" in part else torch.full((2, 1, 1), 1.0 if part["path"].startswith("good") else -1.0)


def mean(examples) -> list[float]:
    return [float(numbers(e).mean()) for e in examples]


def rounds(accelerator, folder, slug: str, reward=mean, kind: str = "flow", batch: int = 6, lr: float = 1e-2, reference: str = "default",
           seed: int = 0, noise: dict | None = None, sampler: SamplerConfig | None = None, settings: dict | None = None, **source):
    """(source, engine, moving) of a run on six captions, whose given pictures are good and bad ones."""
    noise, settings = noise or {}, settings or {}
    made = in_nats({**load_yaml("algo", slug), **settings}, DIMS)
    objective = make_objective(made)
    policy = picture_policy(kind, seed=seed, **noise)
    policy.encoders = lambda: SimpleNamespace(decode=lambda latents: list(latents))
    cfg = SourceConfig(kind="rounds", **{"prompts": 6, **source})
    examples = [pictured(c, f"good.{i}", f"bad.{i}") for i, c in enumerate(CAPTIONS)]
    folder.mkdir(exist_ok=True)
    given = make_dataset(Split("train", examples), data_config(pictures=True), policy.tokenise, "pairs", objective.columns, False, 0)
    refresh = {key: value.value for key, value in resolved_keys("reference", reference).items()}["refresh"]
    moves = refresh != "never"
    frozen = make_reference(policy, "initial", moves)
    start = make_reference(policy, "initial")
    engine = Engine(policy, objective, frozen, OptimConfig(lr=lr, max_grad_norm=1e9), accelerator, moves)
    batches = OfflineSource([], objective.view, batch, 10**6, 0, "label" in objective.columns, seed, layout="draws", share=False,
                            draws=policy.draws)
    sampler = sampler or SamplerConfig(steps=4, guidance=1.0)
    found = PictureRounds(engine, prompts_of(given), reward, cfg, sampler, "best_worst", folder, batches, given=given, start=start)
    run = TrainConfig(algo={}, model=ModelConfig(kind="diffusion"), source=cfg, reference=ReferenceConfig(refresh=refresh, every=2))
    return found, engine, Moving(engine, found, run, {})


def steps(made, count: int, lr: float = 1e-2) -> list:
    source, engine, moving = made
    out = []
    for step in range(count):
        moving(step)
        micros = source.step(step)
        out.append(engine.step(micros, learning_rate(step, count, OptimConfig(lr=lr, warmup=0.0))))
    return out


# ---- drawing ---------------------------------------------------------------------------------------


def test_samples_follow_from_seed_round_and_row_and_not_from_the_split(accelerator, tmp_path):
    """In batches of any size the same pictures come, each sample of a prompt another one, and other ones in the next round."""
    found = {}
    for size in (2, 5, 64):
        source, _, _ = rounds(accelerator, tmp_path / str(size), "online_diffusion_dpo", samples=2,
                              sampler=SamplerConfig(steps=3, guidance=1.0, batch_size=size))
        found[size] = source._begin(0)
    for samples in (found[2], found[5]):
        assert [s.ids for s in samples] == [s.ids for s in found[64]]
        own, wanted = (torch.stack([s.latent for s in of]) for of in (samples, found[64]))
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)
    latents = torch.stack([s.latent for s in found[64]]).flatten(1)
    assert torch.cdist(latents, latents).fill_diagonal_(1.0).min() > 1e-3, "no two samples are the same"
    later = source._begin(1)
    assert not {s.ids[0] for s in later} & {s.ids[0] for s in found[64]}


def test_the_best_and_the_worst_share_times_and_noise_and_ties_weigh_nothing(accelerator, tmp_path):
    source, engine, _ = rounds(accelerator, tmp_path, "online_diffusion_dpo", samples=4)
    samples = source._begin(0)
    for s in samples[:4]:
        s.reward = 1.0  # a prompt whose samples are all worth the same
    rows = source._rows(samples, 0)
    assert [r.weight for r in rows] == [0.0] + [1.0] * 5
    for k, row in enumerate(rows[1:], 1):
        group = samples[4 * k : 4 * k + 4]
        best, worst = (pick(group, key=lambda s: s.reward).ids[0] for pick in (max, min))
        assert [b.ids[0] for b in row.tokens.branches] == [best, worst]
        assert row.tokens.branches[0].ids[1:] == row.tokens.branches[1].ids[1:], "one caption, one group, the same draws"


def test_a_round_is_forgotten_when_the_next_begins(accelerator, tmp_path):
    made = rounds(accelerator, tmp_path, "online_diffusion_dpo")
    steps(made, 3)
    assert len(made[1].policy.encodings.added) == 12, "six prompts, two samples each, of the last round alone"


def test_rewards_get_every_picture_with_its_own_caption(accelerator, tmp_path):
    """Trap 4.27: a reward that saw one caption for all, or the pictures in another order, would give other values."""
    def reward(examples):
        return [10 * CAPTIONS.index(e.prompt_text) + float(numbers(e).mean()) for e in examples]

    source, _, _ = rounds(accelerator, tmp_path, "online_diffusion_dpo", reward, sampler=SamplerConfig(steps=2, guidance=1.0, batch_size=4))
    for s in source._begin(0):
        assert s.reward == pytest.approx(10 * CAPTIONS.index(source.prompts.examples[s.prompt].prompt_text) + float(s.latent.mean()))


@pytest.mark.parametrize(("reward", "said"), [
    (lambda e: [math.nan] * len(e), "is nan; a reward must be a finite number"),
    (lambda e: [0.0] * (len(e) - 1), "the reward gave 11 numbers for 12 samples"),
    (lambda e: [0.5] * len(e), "the reward of all 12 pictures of the first round is 0.5; a constant tells none from another"),
])
def test_a_reward_that_cannot_judge_stops_the_run(reward, said, accelerator, tmp_path):
    source, _, _ = rounds(accelerator, tmp_path, "online_diffusion_dpo", reward)
    with pytest.raises(UserError, match=said):
        source.step(0)


@pytest.mark.parametrize(("words", "said"), [
    (["source.samples=1"], "source.samples=1: it must be at least 2: one reply alone is neither better nor worse"),
    (["source.labels=given"], "source.labels=given prefers the picture that a row holds, and source.partner=sample leaves it out"),
    (["source.partner=given"], "it goes with source.samples=1"),
    (["reward=none"], "gives none for data=tiny-pictures. Choose one for pictures"),
    (["noise=states"], "use source=self_play_states"),
    (["algo=diffusion_dro", "source.guidance=2"], "use source=self_play_states"),
    (["algo=diffusion_dpo", "noise=states"], "at the states that they were drawn through, and source=offline"),
    (["algo=diffusion_dpo", "reference=past"], "reference.refresh=past needs rounds"),
    (["source.top=0.5"], "source.top=0.5 keeps the best samples to imitate"),
    (["source.judge=policy", "source.partner=given", "source.samples=1"], "source.judge=policy ranks a prompt's samples"),
    (["source.mix=0.5", "source.samples=4", "source.keep=2"], "source.mix=0.5 mixes samples with pairs of the data"),
    (["data.buckets=8"], "rounds draw pictures of one shape; set data.buckets=null"),
    (["algo=online_dpo", "model=tiny-lm", "data=tiny-feedback", "source.guidance=2"], "source.guidance=2.0 is for rounds of pictures"),
    (["algo=diffusion_dpo", "source=rollout"], "does not fit: DPO reads pairs"),
])
def test_refused(words, said):
    slug = next((w.partition("=")[2] for w in words if w.startswith("algo=")), "online_diffusion_dpo")
    with pytest.raises(UserError) as error:
        others = [w for w in words if not w.startswith("algo=")]
        typed(composed("model=tiny-flow", "data=tiny-pictures", f"algo={slug}", *others), "train", slug)
    assert said in str(error.value)


# ---- learning --------------------------------------------------------------------------------------


LEARNERS = {
    "online_diffusion_dpo": ({"samples": 4}, {"beta": 1.0}, {}),
    "seppo": ({"partner": "given", "labels": "given", "samples": 1, "writer": "reference"}, {"beta": 1.0}, {"reference": "past"}),
    "diffusion_dro": ({"partner": "given", "labels": "given", "samples": 1, "guidance": 1.0}, {"margin": 1.0},
                      {"noise": {"plan": "states"}}),
    "rpo_subject": ({"partner": "given", "labels": "sampled", "samples": 1, "writer": "reference"}, {"beta": 1.0},
                    {"noise": {"plan": "independent"}}),
    "spro_selfplay": ({"samples": 4, "top": 0.5}, {}, {}),
}


@pytest.mark.parametrize("slug", LEARNERS)
def test_what_is_drawn_gets_better(slug, accelerator, tmp_path):
    """Good pictures have higher numbers. Samples for the same captions and noises, before and after: every mean of six is higher."""
    source, settings, more = LEARNERS[slug]
    made = rounds(accelerator, tmp_path, slug, settings=settings, **source, **more)
    policy, prompts = made[1].policy, [r.tokens.prompt for r in made[0].prompts.rows for _ in range(16)]
    keys, sampler = [("test", k) for k in range(len(prompts))], SamplerConfig(steps=4, guidance=1.0)
    before = policy.draw(prompts, keys, sampler).flatten(1).mean(1)
    results = steps(made, 40)
    gain = policy.draw(prompts, keys, sampler).flatten(1).mean(1) - before
    error = float(gain.std()) / math.sqrt(len(gain))
    assert all(math.isfinite(r.loss) for r in results) and float(gain.mean()) > 3 * error, (float(gain.mean()), error)


# ---- Diffusion-DRO ---------------------------------------------------------------------------------


def own_states(accelerator, folder, kind="epsilon"):
    made = rounds(accelerator, folder, "diffusion_dro", kind=kind, settings={"margin": 0.001}, partner="given", labels="given", samples=1,
                  guidance=1.0, noise={"plan": "states"})
    return made, made[0].step(0)[0]


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_an_own_sample_is_scored_where_it_was_drawn_through(kind, accelerator, tmp_path):
    """At those states the model that drew it makes no error, and the given picture stands at the same time."""
    (_, engine, _), micro = own_states(accelerator, tmp_path, kind)
    made = engine.policy(micro)
    pairs = micro.layout.pairs
    own, given = (made["error"].detach()[side] for side in (pairs.rejected, pairs.chosen))
    assert own.max() < 1e-10 and given.min() > 1e-6
    assert torch.equal(micro.made.t[pairs.rejected], micro.made.t[pairs.chosen])
    assert len(set(micro.made.t.tolist())) > 1


def test_dro_starts_at_its_margin_and_ends_where_a_pair_has_it(accelerator, tmp_path):
    """Policy = reference: the loss is the margin on every pair. The gradient has slope 1 whatever the errors are, then none."""
    (_, engine, _), micro = own_states(accelerator, tmp_path)
    batch = engine.score(micro)
    assert engine.objective(batch).terms[0].values.tolist() == pytest.approx([0.001] * 6, abs=1e-9)
    logp = batch.scores["policy"]["logp"].detach()
    for shift, slope in ((0.0, 1.0), (-5.0, 1.0), (5.0, 0.0)):
        moved = logp.clone()
        moved[batch.pairs.chosen] += shift
        batch.scores["policy"]["logp"] = moved.requires_grad_()
        engine.objective(batch).terms[0].values.sum().backward()
        wanted = torch.zeros_like(moved)
        wanted[batch.pairs.chosen], wanted[batch.pairs.rejected] = -slope * engine.objective.scale, slope * engine.objective.scale
        torch.testing.assert_close(moved.grad, wanted)


def test_times_of_a_way_stay_within_their_steps(accelerator, tmp_path):
    for kind in ("epsilon", "flow"):
        policy, ways = picture_policy(kind), []
        schedule = policy.process.schedule(5)
        ids = [policy.encodings.caption_of("a cat")]
        policy.draw([ids] * 32, [("k", i) for i in range(32)], SamplerConfig(steps=5, guidance=1.0), ways)
        times = torch.stack([w.times for w in ways])
        assert torch.equal(times[:, 0], schedule[0].expand(32))
        assert (times[:, 1:] <= schedule[1:-1]).all() and (times[:, 1:] > schedule[2:]).all() and len(times[:, 2].unique()) > 8


# ---- SePPO and the past ------------------------------------------------------------------------------


def test_the_reference_is_one_of_the_past_states(accelerator, tmp_path):
    """A state is kept every two steps, the first one for ever; what is chosen follows from the step, and what a checkpoint holds is all."""
    made = rounds(accelerator, tmp_path, "seppo", reference="past", partner="given", labels="given", samples=1, writer="reference")
    past, reference = made[1].beside["past"], made[1].reference
    first = {n: t.clone() for n, t in past.states[0].items()}
    seen = []
    real = past.choose
    past.choose = lambda step: (real(step), seen.append({n: t.clone() for n, t in reference.state().items()}))
    steps(made, 20)
    assert len(past.states) == PAST and all(torch.equal(first[n], past.states[0][n]) for n in first)

    def same(a, b):
        return all(torch.equal(a[n].cpu(), b[n].cpu()) for n in a)

    assert any(same(s, first) for s in seen) and sum(not same(s, first) for s in seen) > 5
    assert any(same(seen[-1], state) for state in past.states)
    held = {n: t.clone() for n, t in past.state().items()}
    past.states = past.states[:1]
    past.load(held)
    assert len(past.states) == PAST and held.keys() == past.state().keys()


def test_a_pool_of_the_start_alone_is_self_play_against_it(accelerator, tmp_path):
    made = rounds(accelerator, tmp_path, "seppo", reference="past", partner="given", labels="given", samples=1, writer="reference")
    made[2].cfg = replace(made[2].cfg, every=10**6)
    before = {n: t.clone() for n, t in made[1].reference.state().items()}
    steps(made, 4)
    assert all(torch.equal(before[n], t) for n, t in made[1].reference.state().items())


# ---- SAIL --------------------------------------------------------------------------------------------


def test_a_policy_finds_nothing_likelier_than_at_its_own_start(accelerator, tmp_path):
    source, engine, _ = rounds(accelerator, tmp_path, "sail_diffusion", samples=4, judge="policy", mix=0.5)
    assert source._begin(0) == [] and {r.weight for r in source._rows([], 0)} == {1.0}, "the first round is the seed set alone"
    samples = source._begin(1)
    assert len(samples) == 3 * 4 and {s.reward for s in samples} == {0.0}
    with torch.no_grad():
        for p in engine.policy.parameters():
            p += 0.1
    again = source._begin(1)
    assert len({s.reward for s in again}) == 12
    rows = source._rows(again, 1)
    assert len(rows) == 6 and [len(r.tokens.branches) for r in rows] == [2] * 6
    assert {b.ids[0] for r in rows[:3] for b in r.tokens.branches} <= {s.ids[0] for s in again}
    assert not {b.ids[0] for r in rows[3:] for b in r.tokens.branches} & {s.ids[0] for s in again}


def test_no_own_pairs_is_diffusion_dpo_on_the_seed(accelerator, tmp_path):
    source, _, _ = rounds(accelerator, tmp_path, "sail_diffusion", judge="policy", mix=0.0)
    for number in range(3):
        source.step(number)
        own, seed = (sorted(r.tokens.branches[0].ids[0] for r in rows) for rows in (source.batches.rows, source.given.rows))
        assert own == seed


def test_the_implicit_reward_is_surer_with_more_draws_and_agrees_with_the_labels(accelerator, tmp_path):
    """Its standard error falls as one over the root of the draws, which a prompt's pictures share; after DPO on the seed it tells good
    pictures from bad ones."""
    source, engine, moving = rounds(accelerator, tmp_path, "sail_diffusion", judge="policy", mix=0.0, settings={"beta": "40/D"})
    steps((source, engine, moving), 60)
    rows, spread, right = source.given.rows, {}, []
    for draws in (4, 64):
        gaps = []
        for repeat in range(24):
            numbers_of = list(range(repeat * draws, (repeat + 1) * draws))
            made = [replace(r, tokens=replace(r.tokens, branches=[engine.policy.draws.branch(*b.ids[:HEAD], numbers_of)
                                                                  for b in r.tokens.branches])) for r in rows]
            (micro,) = replace(source.batches, rows=made, view="pairs").everything("pairs")
            with torch.no_grad():
                now, then = (quantities(s(micro), micro.layout)["logp"] for s in (engine.policy, source.start))
            gap = (now - then)[micro.layout.pairs.chosen] - (now - then)[micro.layout.pairs.rejected]
            gaps.append(gap)
        spread[draws] = float(torch.stack(gaps).std(0).mean())
        right += torch.stack(gaps).flatten().tolist()
    assert sum(g > 0 for g in right) / len(right) > 0.9
    assert spread[64] < 0.5 * spread[4]


# ---- RPO for subjects --------------------------------------------------------------------------------


def test_a_photo_meets_a_picture_of_the_base_model_at_times_and_noises_of_their_own(accelerator, tmp_path):
    source, _, _ = rounds(accelerator, tmp_path, "rpo_subject", partner="given", labels="sampled", samples=1, writer="reference",
                          noise={"plan": "independent"})
    source.step(0)
    for row in source.batches.rows:
        photo, own = row.tokens.branches
        assert photo.ids[2] != own.ids[2] and photo.ids[HEAD:] == own.ids[HEAD:] and row.label in (0.0, 1.0)


def test_labels_of_given_pictures(accelerator, tmp_path):
    """Bradley-Terry's draw, drawn anew in each round; `best` says which reward is higher, and `soft` by how much."""
    seen = {}
    for labels in ("sampled", "best", "soft"):
        source, _, _ = rounds(accelerator, tmp_path / labels, "rpo_subject", partner="given", labels=labels, samples=1)
        samples = source._begin(0)
        seen[labels] = [[source._rows(samples, k)[i].label for i in range(6)] for k in range(200 if labels == "sampled" else 1)]
        likely = torch.tensor([1 / (1 + math.exp(s.reward - s.partner)) for s in samples])
    assert {s.partner for s in samples} == {1.0}, "the good pictures of the rows"
    torch.testing.assert_close(torch.tensor(seen["soft"][0]), likely)
    assert seen["best"][0] == [float(x > 0.5) for x in likely.tolist()]
    torch.testing.assert_close(torch.tensor(seen["sampled"]).mean(0), likely, rtol=0, atol=0.12)


# ---- SPRO --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "samples", "kept"), [(1.0, 1, 6), (0.5, 1, 3), (0.5, 4, 3)])
def test_the_best_of_the_best_are_imitated(top, samples, kept, accelerator, tmp_path):
    """A share of 1 of single samples is plain fine-tuning on everything that was drawn."""
    source, _, _ = rounds(accelerator, tmp_path, "spro_selfplay", top=top, samples=samples, batch=2)
    drawn = source._begin(0)
    rows = source._rows(drawn, 0)
    best = sorted(max(s.reward for s in drawn[i : i + samples]) for i in range(0, len(drawn), samples))[-kept:]
    reward = {s.ids[0]: s.reward for s in drawn}
    assert sorted(reward[r.tokens.branches[0].ids[0]] for r in rows) == best and {r.weight for r in rows} == {1.0}
    assert source.steps_per_round == math.ceil(kept / 2)
