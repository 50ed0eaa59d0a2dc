"""Scores of pictures: batched as one by one, however a step is split, and equal to the reference's where the weights are."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch

from prefopt.config.schema import DataConfig, ModelConfig, NoiseConfig, OptimConfig, SamplerConfig
from prefopt.data.latents import Encodings
from prefopt.data.pictures import Framing
from prefopt.objectives.pairwise import DPO
from prefopt.objectives.unary import KTO
from prefopt.policies.noise import HEAD, Draws, address
from prefopt.policies.pipeline import load_diffusion
from prefopt.policies.process import Process
from prefopt.policies.reference import AdapterOff, FrozenCopy, make_reference
from prefopt.training.engine import Engine, quantities
from tests import toy_denoising as toy
from tests.tiny_pipelines import pipeline, save, unet
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


def test_trap_4_1_a_score_is_half_the_squared_error_of_the_network(folders, family):
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


def test_trap_4_13_a_score_has_the_weight_of_its_time(folders, family):
    """That of the draw, which makes up for times that are drawn more often, and that of the process."""
    policy = toy.policy(folders[family], {"draws": 4, "timesteps": "importance", "weighting": "min_snr", "gamma": 2.0}, family=family)
    (row,) = toy.rows(policy, 1)
    with torch.no_grad():
        made = policy(toy.micro(policy, [row]))
    group, *numbers = row.tokens.branches[0].ids[2:]
    weights = []
    for number in numbers:
        u, own = policy.draws.time(group, number)
        weights.append(own * float(policy.process.weight(policy.process.times(torch.tensor([u])), "min_snr", 2.0)))
    assert max(weights) > 1.1 * min(weights)
    torch.testing.assert_close(made["token_logp"], -0.5 * D / 4 * torch.tensor(weights * 2) * made["error"], rtol=1e-5, atol=0)


def test_trap_4_16_batched_scores_are_those_of_one_picture_at_a_time(folders, family):
    policy = toy.policy(folders[family], {"draws": 3}, family=family).eval()
    rows = toy.rows(policy, 5)
    with torch.no_grad():
        whole = policy(toy.micro(policy, rows))["token_logp"]
        single = torch.cat([policy(toy.micro(policy, [row]))["token_logp"] for row in rows])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("objective", [DPO(beta=100 / D), KTO(beta=100 / D)], ids=["local", "coupled"])
def test_traps_4_3_and_4_21_gradient_does_not_depend_on_the_split(folders, objective):
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


def test_trap_4_4_errors_are_reduced_in_fp32(folders, family):
    """Of what bf16 rounds, a score sees the prediction alone."""
    policy = toy.policy(folders[family], {"draws": 2}, precision="bf16", family=family)
    micro = toy.micro(policy, toy.rows(policy, 3))
    with torch.no_grad():
        made, sites = policy(micro), micro.made
        prediction = policy.predict(sites.x_t, sites.t, sites.captions, None)
        policy.precision = "fp32"
        assert not torch.allclose(prediction, policy.predict(sites.x_t, sites.t, sites.captions, None), rtol=1e-4, atol=1e-6)
    squared = (prediction.double() - sites.target.double()).square().flatten(1)
    assert made["token_logp"].dtype == made["error"].dtype == torch.float32
    torch.testing.assert_close(made["token_logp"].double(), -0.5 * squared.sum(1) / 2, rtol=2e-6, atol=0)
    torch.testing.assert_close(made["error"].double(), squared.mean(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("settings", "noisy"), [({}, False), ({"dropout": 0.3}, True), ({"lora": LORA}, False),
                                                 ({"lora": LORA | {"dropout": 0.5}}, True), ({"lora": LORA, "dropout": 0.3}, True)])
def test_trap_4_32_training_has_no_dropout_unless_it_is_asked_for_and_a_reference_never(folders, tmp_path, settings, noisy):
    """Not even that of a network which was published with some. Samples are drawn without it as well."""
    model = shutil.copytree(folders["sd15"], tmp_path / "model")
    with torch.random.fork_rng(devices=[]):
        unet(dropout=0.5).save_pretrained(model / "unet")
    policy = toy.policy(model, **settings)
    reference = make_reference(policy, "initial")
    moved(policy, 0.1)
    policy.encoders = lambda: type("Decoder", (), {"decode": staticmethod(lambda latents: [None] * len(latents))})()
    micro, prompts = toy.micro(policy, toy.rows(policy, 2)), [[policy.encodings.caption_of("a")]]
    with torch.no_grad():
        assert torch.equal(policy(micro)["token_logp"], policy(micro)["token_logp"]) != noisy
        assert torch.equal(reference(micro)["token_logp"], reference(micro)["token_logp"])
    drawn = [policy.encodings.latent(policy.generate(prompts, SamplerConfig(steps=2), 5)[0].branch.ids[0])[0] for _ in range(2)]
    assert torch.equal(*drawn) and policy.training


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


def test_trap_4_23_an_adapter_is_on_again_after_an_error(folders):
    policy = toy.policy(folders["sd15"], lora=LORA)
    moved(policy, 0.1)
    micro, trainable = toy.micro(policy, toy.rows(policy, 2)), list(policy.trainable())
    own = policy(micro)["token_logp"]
    with pytest.raises(ZeroDivisionError), policy.without_adapter():
        with policy.without_adapter():
            pass
        assert not torch.equal(policy(micro)["token_logp"], own), "still off: what began it has not ended"
        raise ZeroDivisionError
    assert torch.equal(policy(micro)["token_logp"], own) and list(policy.trainable()) == trainable


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


def test_trap_4_11_every_picture_is_told_with_its_own_sizes(folders):
    """At each of its draws, unrounded whatever the precision."""
    policy = toy.policy(folders["sd15"], {"draws": 2}, precision="bf16")
    rows, told, seen = toy.rows(policy, 2), [], []
    for number, branch in enumerate(branch for row in rows for branch in row.tokens.branches):
        sizes, picture = [1001.0 + number, 1365.0, 3.0, 5.0 + number, 16.0, 16.0], branch.ids[0]
        policy.encodings.add_latent(picture, policy.encodings.latent(picture)[0], sizes=torch.tensor(sizes))
        told += [sizes, sizes]
    predict = policy.denoiser.predict
    policy.denoiser.predict = lambda x, t, cond, sizes: (seen.append(sizes), predict(x, t, cond, sizes))[1]
    policy(toy.micro(policy, rows))
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == told


def test_trap_4_31_a_pass_shows_every_row_once_and_each_pass_has_new_draws(folders):
    """Whichever order steps are made in, as where they are made ahead."""
    policy = toy.policy(folders["sd15"], {"draws": 2})
    source = toy.source(policy, toy.rows(policy, 5))
    source.batch_size = 2
    seen = {}
    for step in (5, 0, 3, 1, 4, 2):
        seen[step] = [(ids[1], *ids[1 + HEAD :]) for micro in source.step(step) for ids in micro.input_ids.tolist()]
    pictures = {branch.ids[0] for row in source.rows for branch in row.tokens.branches}
    for steps, numbers in (((0, 1, 2), (0, 1)), ((3, 4, 5), (2, 3))):
        assert sorted(one for step in steps for one in seen[step]) == sorted((picture, *numbers) for picture in pictures)


def test_trap_4_7_a_mirrored_draw_shows_all_pictures_of_the_row_in_the_mirror(folders):
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


def test_trap_4_10_dropped_captions_are_the_unconditional_one(folders):
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

    scored: list[list[list[int]]] = []  # the group and the draws that samples are scored at

    def drawn(size: int, **settings) -> list[torch.Tensor]:
        made = policy.generate(prompts, SamplerConfig(steps=3, batch_size=size, **settings), 5)
        scored.append([d.branch.ids[2:] for d in made])
        return [policy.encodings.latent(d.ids[0])[0] for d in made]

    whole, single = drawn(4, guidance=2.0), drawn(1, guidance=2.0)
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole[0], whole[2]), "the second picture of a caption starts elsewhere"
    assert not torch.allclose(whole[0], drawn(4, guidance=1.0)[0])
    assert policy.training
    assert all(of == scored[0] for of in scored) and len({group for group, *_ in scored[0]}) == 4
    (alone,) = policy.generate(prompts[1:2], SamplerConfig(steps=3, guidance=2.0), 5, [1])
    assert alone.branch.ids[2:] == scored[0][1], "as on a process of several"
    torch.testing.assert_close(policy.encodings.latent(alone.ids[0])[0], whole[1], rtol=1e-4, atol=1e-4)


def test_trap_4_34_a_sample_is_the_pipelines_under_its_guidance(folders, family):
    """From the same noise along the same times."""
    policy, pipe, prompt = toy.policy(folders[family], family=family).eval(), pipeline(folders[family]), "a red circle on the left"
    for text in ("", prompt):
        policy.encodings.add_caption(text, policy.encoders().captions([text])[0])
    start, settings = torch.randn(1, *toy.SHAPE, generator=torch.Generator().manual_seed(1)), {"num_inference_steps": 4}
    if family == "sd3":
        settings = {"sigmas": [1, 0.75, 0.5, 0.25]}
    else:
        ends = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **ends)
    for guidance in (1.0, 2.5):
        with torch.no_grad():
            drawn = policy._denoise(start, [[policy.encodings.caption_of(prompt)]], SamplerConfig(steps=4, guidance=guidance))
        wanted = pipe(prompt, height=16, width=16, latents=start, guidance_scale=guidance, output_type="latent", **settings).images
        torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=1e-4)


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


# ---- every family, size and guidance -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_trap_4_2_the_half_is_there_for_every_family(family, tmp_path):
    policy = toy.policy(save(family, tmp_path / family), {"draws": 2}, family=family)
    micro = toy.micro(policy, toy.rows(policy, 1))
    with torch.no_grad():
        made, sites = policy(micro), micro.made
        said = policy.predict(sites.x_t, sites.t, sites.captions, sites.sizes)
    torch.testing.assert_close(made["token_logp"], -0.5 * (said - sites.target).square().flatten(1).sum(1) / 2)


def test_trap_4_1_a_bucket_is_scored_by_its_own_number_of_dims(folders):
    policy = toy.policy(folders["sd15"])
    for shape in ((4, 8, 8), (4, 4, 12)):
        micro = toy.source(policy, toy.rows(policy, 1, shapes=(shape,))).step(0)[0]
        made = policy(micro)
        torch.testing.assert_close(made["token_logp"], -0.5 * math.prod(shape) * made["error"])


def test_trap_4_14_a_policy_has_the_dynamic_shift_of_its_own_resolution(tmp_path):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    folder = save("flux", tmp_path / "flux")
    for resolution in (64, 256):
        cfg = ModelConfig(name="toy", kind="diffusion", path=str(folder), resolution=resolution, latent=[4, 2])
        made = load_diffusion(cfg, torch.device("cpu"), "fp32", 0, NoiseConfig())
        assert made.process.shift == pytest.approx(math.exp(calculate_shift((resolution // 4) ** 2)))


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_trap_4_34_samples_have_the_models_guidance_unless_told_otherwise(folders, family):
    policy = toy.policy(folders[family], family=family, guidance=2.5).eval()
    start, said = torch.randn(1, *toy.SHAPE, generator=torch.Generator().manual_seed(1)), [[policy.encodings.caption_of("a")]]
    with torch.no_grad():
        own, asked, none = (policy._denoise(start, said, SamplerConfig(steps=3, guidance=g)) for g in (None, 2.5, 1.0))
    assert torch.equal(own, asked) and not torch.allclose(own, none)
