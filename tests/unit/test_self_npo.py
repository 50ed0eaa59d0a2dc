"""Self-NPO: where its pictures are scored, what they are to be, and samples that are drawn by two models."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from prefopt.cli import main
from prefopt.config.schema import OptimConfig, SamplerConfig
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.self_play import SelfNPO
from prefopt.policies.guidance import Guidance, Loaded
from prefopt.policies.noise import HEAD, normals, share
from prefopt.policies.reference import FrozenCopy
from prefopt.policies.truncated import LATEST, renoised
from prefopt.tracking.tracker import read_jsonl
from prefopt.training.engine import Engine
from tests.tiny_pipelines import save
from tests.toy_pictures import picture_policy, picture_source, pictured, process_of, rows_of
from tests.toy_runs import fresh_accelerator, train

KINDS = ("epsilon", "v", "flow")
DIMS = 2


def scene(accelerator, kind="epsilon", count=6, objective=None, lr=1e-2, **noise):
    """(engine with a reference that does not move, its micro-batch of pictures)."""
    policy, objective = picture_policy(kind, plan="truncated", **noise), objective or SelfNPO(scale=1 / DIMS)
    reference = FrozenCopy(policy)
    with torch.no_grad():  # sites are the reference's affair
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    engine = Engine(policy, objective, reference, OptimConfig(lr=lr, warmup=0.0), accelerator)
    examples = [pictured(("a cat", "a dog", "a bird")[i % 3], f"good.{i}", f"bad.{i}") for i in range(count)]
    (micro,) = picture_source(policy, objective, rows_of(policy, objective, examples)).step(0)
    return engine, micro


def by_hand(engine, micro, steps, grid, scale, start_with="picture"):
    """(x_r, y, r) of each draw by itself, in the words of the paper: w + 1 is the scale of the guidance."""
    policy, teacher, p = engine.policy, engine.reference.frozen, engine.policy.process
    times, blank = p.schedule(grid), policy.encodings.caption_of("")
    for edge, number in zip(micro.layout.token_edge.tolist(), micro.input_ids[micro.trained].tolist(), strict=True):
        start = int(micro.prompt[edge])
        picture, caption, group = micro.input_ids[edge, start : start + HEAD].tolist()
        key = (group, number, picture)
        place = min(int((1 - policy.draws.time(group, number)[0]) * grid), grid - 1)
        x = policy.draws.noise(policy.encodings.shape, *key)[None]
        if start_with == "picture":
            x = p.noised(policy.encodings.latent(picture)[0][None], x, times[place][None])
        else:
            place = 0
        for taken in range(steps + 1):
            t = times[place][None]
            with_caption, without = (p.x0_of(teacher.predict(x, t, [c], None), x, t) for c in (caption, blank))
            y = with_caption + (scale - 1) * (with_caption - without)
            if taken == steps or place == grid - 1:
                break
            eps = [p.eps_of(teacher.predict(x, t, [c], None), x, t) for c in (caption, blank)]
            alpha, sigma = (v.float() for v in p.scales(times[place + 1][None]))
            x, place = alpha * y + sigma * (eps[0] + (scale - 1) * (eps[0] - eps[1])), place + 1
        later, z = share("later", policy.draws.seed, *key), normals(policy.encodings.shape, "again", policy.draws.seed, *key)
        s = float(times[place])
        r = min(s, LATEST) + (LATEST - min(s, LATEST)) * later if p.kind == "flow" else min(int(s) + 1 + int(later * (999 - s)), 999)
        scales = [float(v) for at in (s, r) for v in p.scales(torch.tensor(at if p.kind == "flow" else int(at)))]
        ratio = (scales[3] / scales[2]) ** 2 - (scales[1] / scales[0]) ** 2 if scales[0] else 0.0
        x_r = scales[2] * (x[0] / scales[0] + math.sqrt(max(ratio, 0)) * z) if scales[0] else x[0]
        yield x_r, y[0], r


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "scale", "begin"), [(5, 0.0, "picture"), (2, -4.0, "picture"), (0, 1.0, "picture"), (5, -4.0, "noise")])
@torch.no_grad()
def test_a_picture_is_scored_where_the_papers_words_lead(kind, steps, scale, begin):
    """Also where the sampler would go beyond its last prediction; each draw by itself comes to what a batch of them does."""
    with fresh_accelerator() as accelerator:
        engine, micro = scene(accelerator, kind, count=12, truncation=steps, truncation_grid=8, truncation_guidance=scale, draws=2,
                              truncation_start=begin, truncation_caption=scale == 0)
        engine.score(micro)
        sites = micro.made
        told = [micro.input_ids[e, int(micro.prompt[e]) + 1].item() for e in micro.layout.token_edge.tolist()]
        assert sites.captions == (told if scale == 0 else [engine.policy.encodings.caption_of("")] * len(told))
        for k, (x_r, y, r) in enumerate(by_hand(engine, micro, steps, 8, scale, begin)):
            assert float(sites.t[k]) == pytest.approx(r, abs=1e-9)
            torch.testing.assert_close(sites.target[k], y, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(sites.x_t[k], x_r, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_a_weight_of_minus_one_is_the_prediction_without_caption():
    with fresh_accelerator() as accelerator:
        engine, micro = scene(accelerator, truncation=0, truncation_grid=8, truncation_start="picture")
        engine.score(micro)
        teacher, p, seen = engine.reference.frozen, engine.policy.process, engine.policy._seen(micro)
        t = p.schedule(8)[((1 - seen.share) * 8).long().clamp(0, 7)]
        x = p.noised(seen.clean, torch.stack([engine.policy.draws.noise(seen.clean.shape[1:], *key) for key in seen.keys]), t)
        nothing = [engine.policy.encodings.caption_of("")] * len(x)
        assert torch.equal(micro.made.target, p.x0_of(teacher.predict(x, t, nothing, None), x, t))
        guided = p.x0_of(teacher.predict(x, t, seen.captions, None, Guidance(0.0)), x, t)
        torch.testing.assert_close(micro.made.target, guided, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_noising_again_stays_on_the_way_of_a_picture(kind):
    """With x_s on it, x_r has mean alpha_r x0 and variance sigma_r^2, to a percent; r lies after s and is spread over what is left."""
    p, count, rng = process_of(kind), 400_000, torch.Generator().manual_seed(0)
    for at in (0.3, 0.8) if kind == "flow" else (200, 700):
        s, x0 = torch.full((count,), at), 1.7
        x_s = p.noised(torch.full((count, 1), x0), torch.randn(count, 1, generator=rng), s)
        x_r, r = renoised(p, x_s, s, torch.full((count,), 0.4, dtype=torch.float64), torch.randn(count, 1, generator=rng))
        alpha, sigma = (float(v[0]) for v in p.scales(r))
        assert float(x_r.mean()) == pytest.approx(alpha * x0, abs=0.01 * x0) and float(x_r.var()) == pytest.approx(sigma**2, rel=0.01)
        share = torch.rand(1000, generator=rng, dtype=torch.float64)
        later = renoised(p, x_s[:1000], s[:1000], share, x_s[:1000])[1].double()
        last = LATEST if kind == "flow" else 999
        assert (later > at).all() and (later <= last).all() and float(later.mean()) == pytest.approx((at + last) / 2, rel=0.05)


@pytest.mark.parametrize("huber", [1e-6, 1e-3, 1e5])
def test_the_loss_is_the_pseudo_huber_distance_of_foreseen_pictures(huber):
    """Of small h the mean absolute error, of large h the mean squared one over 2h."""
    with fresh_accelerator() as accelerator:
        engine, micro = scene(accelerator, huber=huber, draws=2)
        micro = replace(micro, made=None)
        values = engine.objective(batch := engine.score(micro)).terms[0]
        sites = micro.made
        with torch.no_grad():
            off = engine.policy.process.x0_of(engine.policy.predict(sites.x_t, sites.t, sites.captions, None), sites.x_t, sites.t).double()
        off = off - sites.target.double()
        each = ((off.square() + huber**2).sqrt() - huber).flatten(1).mean(1)
        wanted = torch.stack([each[batch.token_edge == e].mean() for e in range(len(batch.lengths))])[batch.token_edge]
        torch.testing.assert_close((values.weight * values.values).double(), wanted, atol=1e-6, rtol=1e-5)
    limit = off.abs() if huber < 1e-3 else off.square() / (2 * huber)
    if huber != 1e-3:
        torch.testing.assert_close(each, limit.flatten(1).mean(1), atol=1e-5, rtol=1e-2)


def test_the_policy_comes_to_foresee_what_the_teacher_does():
    """At draws that it was not trained at; the teacher stays where it is."""
    with fresh_accelerator() as accelerator:
        engine, micro = scene(accelerator, count=24, truncation_grid=8, truncation_start="picture")
        held = {name: p.clone() for name, p in engine.reference.frozen.named_parameters()}
        (new,) = picture_source(engine.policy, engine.objective, rows_of(engine.policy, engine.objective, [
            pictured(text, f"good.{i}", f"bad.{i}") for i, text in enumerate(("a cat", "a dog", "a bird") * 20)])).step(0)

        def off() -> float:
            return float(engine.objective(engine.score(new)).terms[0].values.detach().mean())

        before = off()
        for _ in range(100):
            engine.step([replace(micro, made=None)], 1e-2)
        assert off() < 0.7 * before
        assert all(torch.equal(p, held[name]) for name, p in engine.reference.frozen.named_parameters())


# ---- two models draw ---------------------------------------------------------------------------------


def drawn(policy, sides=(None, None), guidance=3.0):
    captions = [[policy.encodings.caption_of(text)] for text in ("a cat", "a dog", "a cat")]
    keys = [("key", i) for i in range(3)]
    return policy.draw(captions, keys, SamplerConfig(steps=4, guidance=guidance), sides=sides)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_model_that_is_the_positive_one_changes_nothing(kind):
    """Beyond rounding: one model predicts both sides in one call, two do so in two."""
    policy = picture_policy(kind)
    plain = drawn(policy)
    same = copy.deepcopy(policy)
    for sides in ((FrozenCopy(policy), None), (None, Loaded(same)), (FrozenCopy(policy), Loaded(same))):
        torch.testing.assert_close(drawn(policy, sides), plain, atol=1e-5, rtol=1e-5)


def test_each_side_is_asked_for_its_own_prediction():
    """eps_neg(x, nothing) + g (eps_pos(x, c) - eps_neg(x, nothing)); without guidance nobody asks the negative one."""
    policy, other = picture_policy(seed=0), picture_policy(seed=1)
    other.encodings = policy.encodings
    x, t = torch.randn(2, DIMS, 1, 1), torch.full((2,), 300)
    captions, nothing = [policy.encodings.caption_of("a cat")] * 2, [policy.encodings.caption_of("")] * 2
    positive, negative = policy.predict(x, t, captions, None), other.predict(x, t, nothing, None)
    for asked, guidance in ((policy, Guidance(2.5, negative=Loaded(other))), (other, Guidance(2.5, positive=Loaded(policy)))):
        assert torch.equal(asked.predict(x, t, captions, None, guidance), negative + 2.5 * (positive - negative))
    assert torch.equal(policy.predict(x, t, captions, None, Guidance(1.0, negative=Loaded(other))), positive)
    assert not torch.equal(drawn(policy, (None, Loaded(other))), drawn(policy))
    assert Guidance(2.5) != Guidance(2.5, negative=Loaded(other))


def test_swapped_labels_make_a_negative_model_of_any_paired_method():
    """The loss of a pair with the label 0 is that of the pair turned round (Diffusion-NPO)."""
    losses = []
    for sides, label in ((("good.1", "bad.1"), 0.0), (("bad.1", "good.1"), 1.0)):
        policy = picture_policy()
        with fresh_accelerator() as accelerator:
            engine = Engine(policy, DPO(beta=2.0), FrozenCopy(picture_policy(seed=4)), OptimConfig(), accelerator)
            engine.reference.frozen.encodings = policy.encodings
            rows = rows_of(policy, engine.objective, [pictured("a cat", *sides, label=label)])
            (micro,) = picture_source(policy, engine.objective, rows).step(0)
            losses.append(float(engine.objective(engine.score(micro)).terms[0].values.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] != pytest.approx(math.log(2), abs=1e-3)


# ---- runs --------------------------------------------------------------------------------------------

WORDS = ["model=tiny-diffusion", "model.resolution=16", "model.latent=[4,2]", "data=tiny-pictures", "data.limit=12", "data.eval_limit=4",
         "train.batch_size=4", "train.steps=2", "train.eval_every=2", "evaluation.prompts=3", "sampler.steps=3", "optim.warmup=0",
         "optim.lr=0.01"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of Self-NPO, and one of imitation that is evaluated beside its model."""
    folder = tmp_path_factory.mktemp("runs")
    path = save("sd15", folder / "sd15")
    assert train(folder / "npo", f"model.path={path}", *WORDS, "algo=self_npo", "noise.truncation_grid=4") == 0
    return folder, path


def pictures(run, step):
    return [(run / row["image"]).read_bytes() for row in read_jsonl(run / "samples.jsonl") if row["step"] == step]


def test_a_run_is_judged_by_what_it_is_for(runs, tmp_path, capsys):
    """Samples are the start's, away from the trained model: other ones than before, and than the trained one draws alone. No KL is told."""
    npo = runs[0] / "npo"
    rows = [row for row in read_jsonl(npo / "metrics.jsonl") if row["split"] == "eval"]
    assert len(rows) == 2 and all(math.isfinite(row["true_reward"]) and "kl" not in row for row in rows)
    assert pictures(npo, 0) != pictures(npo, 2)
    assert main(["eval", f"run={npo}", "prompts=3", "sampler.steps=3", f"output={tmp_path / 'eval.json'}"]) == 0
    assert "draws nothing alone" in capsys.readouterr().out
    again = json.loads((tmp_path / "eval.json").read_text())
    assert again["after"]["true_reward"] == pytest.approx(rows[1]["true_reward"], abs=1e-4)
    assert main(["eval", f"run={npo}", "prompts=3", "sampler.steps=3", "sampler.negative=none", f"output={tmp_path / 'alone.json'}"]) == 0
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert alone["before"]["true_reward"] == pytest.approx(rows[0]["true_reward"], abs=1e-4)
    assert alone["after"]["saturation"] != again["after"]["saturation"] and "kl" in alone["after"]


def test_another_run_may_be_the_negative_side(runs, tmp_path, capsys):
    """At the start the pictures of both ways to say so are the same: the start's caption, the trained model's blank."""
    npo, path = runs[0] / "npo", runs[1]
    words = [f"model.path={path}", *WORDS, "algo=sft", f"sampler.negative={npo}", "optim.lr=1e-30"]
    assert train(tmp_path / "with", *words) == 0
    assert pictures(tmp_path / "with", 0) == pictures(npo, 2) == pictures(tmp_path / "with", 2)
    paths = [tmp_path / name for name in ("a", "b")]
    for run, folder in ((npo, paths[0]), (tmp_path / "with", paths[1])):
        assert main(["sample", f"run={run}", "count=2", "sampler.steps=3", f"output={folder}"]) == 0
    assert (paths[0] / "000-after.png").read_bytes() == (paths[1] / "000-after.png").read_bytes()
    assert main(["sample", f"run={npo}", "sampler.negative=nowhere", "sampler.steps=3"]) == 2
    assert "sampler.negative=nowhere: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "says"), [
    (["algo=dpo", "sampler.negative=policy"], "sampler.negative=policy predicts without the caption where pictures are drawn, and model"),
    (["algo=self_npo", "model=tiny-flow", "sampler.guidance=1"], "with a guidance of 1 nobody does; set sampler.guidance=2.5"),
    (["algo=flow_grpo", "model=tiny-flow", "sampler=negative"], "samples are evaluated with sampler.negative=policy; leave it out"),
    (["algo=mapo", "model=tiny-flow", "noise=truncated"], "noise.plan=truncated inverts pictures by the reference here, and"),
    (["algo=self_npo", "model=tiny-flow", "noise.huber=0"], "noise.huber=0.0: it must be above 0"),
    (["algo=gradspo", "model=tiny-diffusion", "trajectory.candidates=null"], "trajectory.candidates=null draws none; set"),
])
def test_what_cannot_work_is_said(words, says, tmp_path, capsys):
    assert train(tmp_path, *words) == 2
    assert says in capsys.readouterr().err
