"""Scores of pictures: batched as one by one, however a step is split, and equal to the reference's where the weights are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from prefopt.config.schema import DataConfig, OptimConfig, SamplerConfig
from prefopt.data.latents import Encodings
from prefopt.data.pictures import Framing
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.unary import KTO
from prefopt.policies.noise import Draws, address
from prefopt.policies.process import Process
from prefopt.policies.reference import AdapterOff, FrozenCopy, make_reference
from prefopt.training.engine import Engine, quantities
from tests import toy_denoising as toy
from tests.tiny_pipelines import save
from tests.toy_runs import fresh_accelerator, gradients

D = 4 * 8 * 8
LORA = {"enabled": True, "r": 2, "alpha": 2, "targets": "to_q,to_k,to_v,to_out.0"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {family: save(family, root / family) for family in ("sd15", "sd3")}


@pytest.fixture(params=["sd15", "sd3"])
def family(request):
    return request.param


def moved(policy, by: float = 0.02, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def engine_of(policy, accelerator, objective=None, reference=None) -> Engine:
    objective = objective or DPO(beta=5000 / D)
    return Engine(policy, objective, reference, OptimConfig(lr=1e-3, max_grad_norm=1e9), accelerator)


# ---- scores ---------------------------------------------------------------------------------------------


def test_a_score_is_half_the_squared_error_of_the_network(folders, family):
    """Against arithmetic on what the network says, for one picture and two draws."""
    policy = toy.policy(folders[family], {"draws": 2}, family=family)
    (row,) = toy.rows(policy, 1)
    micro = toy.micro(policy, [row])
    with torch.no_grad():
        made = policy(micro)
    (picture, caption, group, *numbers), process = row.tokens.branches[1].ids, policy.process
    x0, said = policy.encodings.latent(picture)[0], policy.encodings.caption(caption)
    for k, number in enumerate(numbers):
        t, eps = process.times(torch.tensor([policy.draws.time(group, number)[0]])), policy.draws.noise(toy.SHAPE, group, number, picture)
        alpha, sigma = (float(part) for part in process.scales(t))
        x_t, target = alpha * x0 + sigma * eps, eps - x0 if process.kind == "flow" else eps
        with torch.no_grad():
            prediction = policy.denoiser.predict(x_t[None], t, {n: v[None] for n, v in said.items()}, None)[0]
        error = (prediction - target).square()
        assert float(made["token_logp"][2 + k]) == pytest.approx(-0.5 * float(error.sum()) / 2, rel=1e-5)
        assert float(made["error"][2 + k]) == pytest.approx(float(error.mean()), rel=1e-5)


def test_batched_scores_are_those_of_one_picture_at_a_time(folders, family):
    policy = toy.policy(folders[family], {"draws": 3}, family=family).eval()
    rows = toy.rows(policy, 5)
    with torch.no_grad():
        whole = policy(toy.micro(policy, rows))["token_logp"]
        single = torch.cat([policy(toy.micro(policy, [row]))["token_logp"] for row in rows])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("objective", [DPO(beta=100 / D), KTO(beta=100 / D)], ids=["local", "coupled"])
def test_gradient_does_not_depend_on_the_split(folders, objective):
    """Micro-batches of one row, and two ranks of which each holds half: the sum of their gradients is that of one."""
    found = []
    for budget, world in ((10**6, 1), (1, 1), (10**6, 2)):
        parts = []
        for rank in range(world):
            policy = toy.policy(folders["sd15"], {"draws": 2})
            reference = FrozenCopy(policy)
            moved(policy)
            source = toy.source(policy, toy.rows(policy, 4), budget, rank, world, objective.view)
            parts += source.step(1)
        assert len(parts) == {(10**6, 1): 1, (1, 1): 4, (10**6, 2): 2}[budget, world]
        with fresh_accelerator() as accelerator:
            engine = engine_of(policy, accelerator, objective, reference)
            found.append(gradients(engine, parts))
    (whole, loss), *others = found
    largest = float(max(g.abs().max() for g in whole.values()))
    assert largest > 1e-3
    for gradient, other in others:
        assert other == pytest.approx(loss, rel=1e-5)
        for name in whole:
            torch.testing.assert_close(gradient[name], whole[name], rtol=1e-3, atol=1e-4 * largest)


# ---- policy and reference -------------------------------------------------------------------------------


def logits(policy, reference, rows, beta=5000 / D, visit=0):
    micro = toy.micro(policy, rows, visit)
    now, ref = policy(micro), reference(micro)
    h = quantities(now, micro.layout)["logp"] - quantities(ref, micro.layout)["logp"]
    return beta * (h[micro.layout.pairs.chosen] - h[micro.layout.pairs.rejected])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_trap_4_4_equal_weights_give_a_logit_of_zero(folders, family, lora):
    for precision, bound in (("fp32", 0.0), ("bf16", 1e-2)):
        policy = toy.policy(folders[family], lora=lora, precision=precision, family=family)
        reference = make_reference(policy, "initial")
        assert isinstance(reference, AdapterOff if lora else FrozenCopy)
        found = logits(policy, reference, toy.rows(policy, 6)).abs().max().detach()
        assert float(found) <= bound, precision


def test_trap_4_5_swapping_winner_and_loser_flips_the_logit_exactly(folders, family):
    policy = toy.policy(folders[family], {"dropout": 0.5, "draws": 2}, family=family)
    reference = FrozenCopy(policy)
    moved(policy)
    rows = toy.rows(policy, 4)
    before = logits(policy, reference, rows)
    for row in rows:
        row.tokens.branches.reverse()
    after = logits(policy, reference, rows)
    assert torch.equal(after, -before)
    assert before.abs().min() > 1e-3
    (row,) = rows[:1]
    sites = policy.sites(toy.micro(policy, [row]))
    assert torch.equal(sites.t[:2], sites.t[2:]) and sites.captions[:2] == sites.captions[2:]
    if policy.process.kind == "epsilon":
        assert torch.equal(sites.target[:2], sites.target[2:]), "one noise for both"


def test_identical_pictures_have_no_gradient_under_shared_noise(folders):
    for plan, flat in (("shared", True), ("independent", False)):
        policy = toy.policy(folders["sd15"], {"plan": plan})
        reference = FrozenCopy(policy)
        moved(policy)
        (row,) = toy.rows(policy, 1)
        row.tokens.branches[1] = row.tokens.branches[0]
        if plan == "independent":  # the same latents under another name
            twin = address("twin")
            policy.encodings.add_latent(twin, policy.encodings.latent(row.tokens.branches[0].ids[0])[0])
            row.tokens.branches[1] = copy.deepcopy(row.tokens.branches[0])
            row.tokens.branches[1].ids[0] = twin
        with fresh_accelerator() as accelerator:
            seen, _ = gradients(engine_of(policy, accelerator, reference=reference), toy.source(policy, [row]).step(0))
        largest = max(float(g.abs().max()) for g in seen.values())
        assert (largest < 1e-4) if flat else (largest > 1e-2)


def test_trap_4_23_checkpointing_does_not_change_the_gradient(folders):
    """With an adapter that is switched off for the reference in between, which a recomputation in backward must not see."""
    found = []
    for checkpointing in (False, True):
        policy = toy.policy(folders["sd15"], lora=LORA, gradient_checkpointing=checkpointing)
        moved(policy, 0.1)
        micros = toy.source(policy, toy.rows(policy, 3), 2).step(0)
        with fresh_accelerator() as accelerator:
            found.append(gradients(engine_of(policy, accelerator, reference=AdapterOff(policy)), micros))
    (plain, loss), (again, loss_again) = found
    assert loss == pytest.approx(loss_again, rel=1e-6)
    assert max(g.abs().max() for g in plain.values()) > 1e-3
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-6)


def test_a_frozen_copy_looks_into_the_same_book(folders):
    policy = toy.policy(folders["sd15"])
    reference = FrozenCopy(policy)
    assert reference.frozen.encodings is policy.encodings
    assert reference.frozen.network is not policy.network and reference.frozen.denoiser.network is reference.frozen.network
    rows = toy.rows(policy, 2)
    before = reference(toy.micro(policy, rows))["token_logp"]
    moved(policy)
    assert torch.equal(reference(toy.micro(policy, rows))["token_logp"], before)
    assert not torch.equal(policy(toy.micro(policy, rows))["token_logp"], before)


def test_the_reference_is_scored_at_the_sites_of_the_policy(folders):
    policy = toy.policy(folders["sd15"])
    micro, reference = toy.micro(policy, toy.rows(policy, 2)), FrozenCopy(policy)
    policy(micro)
    sites = micro.made
    reference(micro)
    assert micro.made is sites and sites is not None


# ---- pictures and videos --------------------------------------------------------------------------------


def test_a_mirrored_draw_shows_all_pictures_of_the_row_in_the_mirror(folders):
    policy = toy.policy(folders["sd15"], {"draws": 8})
    (row,) = toy.rows(policy, 1)
    pictures, group = [b.ids[0] for b in row.tokens.branches], row.tokens.branches[0].ids[2]
    plain = policy.sites(toy.micro(policy, [row]))
    for picture in pictures:
        policy.encodings.mirrored[picture] = address("mirror", picture)
        policy.encodings.add_latent(address("mirror", picture), policy.encodings.latent(picture)[0].flip(-1))
    mirrored = policy.sites(toy.micro(policy, [row]))
    flipped = [policy.draws.mirrored(group, number) for number in range(8)]
    assert 0 < sum(flipped) < 8
    same = [torch.equal(a, b) for a, b in zip(plain.x_t, mirrored.x_t, strict=True)]
    assert same == [not f for f in flipped] * 2


def test_dropped_captions_are_the_unconditional_one(folders):
    policy = toy.policy(folders["sd15"], {"dropout": 0.5, "draws": 16})
    (row,) = toy.rows(policy, 1)
    sites, (_, caption, group, *numbers) = policy.sites(toy.micro(policy, [row])), row.tokens.branches[0].ids
    nothing = policy.encodings.caption_of("")
    assert sites.captions == [nothing if policy.draws.dropped(group, number) else caption for number in numbers] * 2
    assert 0 < sites.captions.count(nothing) < 32


def test_a_deviation_of_the_posterior_is_drawn(folders):
    policy = toy.policy(folders["sd15"], {"draws": 2})
    (row,) = toy.rows(policy, 1)
    still = policy.sites(toy.micro(policy, [row]))
    for branch in row.tokens.branches:
        policy.encodings.add_latent(branch.ids[0], policy.encodings.latent(branch.ids[0])[0], torch.full(toy.SHAPE, 0.5))
    drawn = policy.sites(toy.micro(policy, [row]))
    alpha, _ = policy.process.scales(drawn.t)
    deviation = ((drawn.x_t - still.x_t) / alpha.view(-1, 1, 1, 1)).flatten(1)
    assert deviation.std(1).tolist() == pytest.approx([0.5] * 4, abs=0.08)
    assert not torch.equal(deviation[0], deviation[1]) and torch.equal(drawn.x_t, policy.sites(toy.micro(policy, [row])).x_t)


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_a_video_goes_through_draws_and_sites(folders, kind):
    """Latents [C, F, h, w]: one axis more, everywhere."""
    shape = (4, 3, 2, 2)
    policy = toy.policy(folders["sd15"])
    policy.process = Process("flow") if kind == "flow" else Process(kind, policy.process.alphas_cumprod)
    policy.denoiser.predict = lambda x_t, t, cond, sizes: 0.5 * x_t
    policy.encodings = Encodings(Framing.of(DataConfig(name="toy", source="files", pictures=True), 16), {"vae": "toy"}, shape=shape)
    for caption in ("", "a"):
        policy.encodings.add_caption(caption, {"prompt_embeds": torch.zeros(4, 16)})
    pictures, caption = [toy.picture(policy, i, shape) for i in range(2)], policy.encodings.caption_of("a")
    row = toy.Row(toy.Tokens([caption], [policy.draws.branch(p, caption, 7, [0]) for p in pictures]), "pair")
    micro = toy.micro(policy, [row])
    made = policy(micro)
    assert micro.made.x_t.shape == (2, *shape) and made["token_logp"].shape == (2,)
    eps = Draws(policy.draws.cfg, 0).noise(shape, 7, 0, pictures[0])
    x0, t = policy.encodings.latent(pictures[0])[0], micro.made.t[:1]
    x_t, target = policy.process.noised(x0[None], eps[None], t), policy.process.target(x0[None], eps[None], t)
    torch.testing.assert_close(made["token_logp"][:1], -0.5 * (0.5 * x_t - target).square().flatten(1).sum(1))


# ---- samples --------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_their_batch(folders, family):
    policy = toy.policy(folders[family], family=family)
    policy.encoders = lambda: type("Decoder", (), {"decode": staticmethod(lambda latents: [None] * len(latents))})()
    prompts = [[policy.encodings.caption_of(c)] for c in "abab"]

    def drawn(size: int, **settings) -> list[torch.Tensor]:
        made = policy.generate(prompts, SamplerConfig(steps=3, batch_size=size, **settings), 5)
        return [policy.encodings.latent(d.ids[0])[0] for d in made]

    whole, single = drawn(4, guidance=2.0), drawn(1, guidance=2.0)
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole[0], whole[2]), "the second picture of a caption starts elsewhere"
    assert not torch.allclose(whole[0], drawn(4, guidance=1.0)[0])
    assert policy.training


def test_pictures_of_different_shapes_are_scored_as_they_are_alone(folders):
    """Buckets of aspect ratios: a micro-batch holds pictures of one shape, and a step all of them."""
    policy = toy.policy(folders["sd15"])
    rows = toy.rows(policy, 4, shapes=((4, 8, 8), (4, 4, 16)))
    micros = toy.source(policy, rows).step(0)
    assert sorted(sorted(m.rows) for m in micros) == [[0, 2], [1, 3]]
    together = {row: policy(m)["token_logp"].view(-1, 2)[place] for m in micros for place, row in enumerate(m.rows)}
    for number in range(4):
        alone = policy(toy.source(policy, rows).micro_batches([number], 0)[0])["token_logp"]
        assert torch.allclose(together[number], alone, atol=1e-5, rtol=1e-5)
