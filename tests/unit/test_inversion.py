"""Noises that a model finds by inversion: exact where they can be, first order in the steps, the same sites for policy and reference."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from prefopt import cli
from prefopt.config.schema import NoiseConfig, OptimConfig
from prefopt.objectives.inverted import InversionDPO, SmPO
from prefopt.objectives.pairwise import DPO
from prefopt.policies.inversion import floored, grid, walk
from prefopt.policies.process import Process
from prefopt.policies.reference import AdapterOff, FrozenCopy
from prefopt.training.engine import Engine
from tests import toy_denoising as toy
from tests.tiny_pipelines import save
from tests.toy_runs import fresh_accelerator, gradients
from tests.unit.test_diffusion_policy import LORA, D, moved
from tests.unit.test_process import CUMPROD, KINDS, pictures, process

STEPS = 10
INVERTED = {"plan": "inverted", "inversion_steps": STEPS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save("sd15", tmp_path_factory.mktemp("pipeline") / "sd15")


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return save("sd3", tmp_path_factory.mktemp("pipeline") / "sd3")


def along(p: Process, constant: torch.Tensor):
    """A network that always means the same noise (of a flow: the same velocity)."""
    def predict(x, t, rows):
        said = constant[rows]
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in p.scales(t))
        x0 = (x - sigma * said) / alpha
        return {"epsilon": said, "flow": said, "v": alpha * said - sigma * x0, "x0": x0}[p.kind]

    return predict


def arrived(p: Process, predict, x0: torch.Tensor, reach: list[int], steps: int = STEPS, **settings) -> torch.Tensor:
    out = torch.empty_like(x0)
    for leg in walk(p, predict, x0, torch.tensor(reach), steps, **settings):
        for place, row in enumerate(leg.rows.tolist()):
            if reach[row] == leg.i:
                out[row] = leg.after[place]
    return out


# ---- the way up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("renoise", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_noise_is_recovered_on_the_grid(kind, renoise):
    """Four pictures that go to four different times."""
    (x0, constant), p, reach = pictures(), process(kind), [1, 4, 7, 9]
    t = grid(p, STEPS)[reach]
    x_t = arrived(p, along(p, constant), x0, reach, renoise=renoise)
    found = p.target(x0, p.noise_between(x0, x_t, t), t) if kind == "flow" else p.noise_between(x0, x_t, t)
    assert torch.allclose(found, constant, atol=1e-9)


def test_off_the_grid_the_noise_is_not_recovered_and_flooring_mends_it():
    """What stands at the grid time below, taken for what stands at the time itself: the fault of released code."""
    (x0, constant), p = pictures(), process("epsilon")
    t = torch.tensor([150, 333, 640, 870])
    reach = floored(t, grid(p, STEPS))
    assert grid(p, STEPS)[reach].tolist() == [99, 299, 599, 799]
    x_t = arrived(p, along(p, constant), x0, reach.tolist())
    wrong = p.noise_between(x0, x_t, t)
    assert (wrong - constant).abs().flatten(1).amax(1).min() > 0.05
    assert torch.allclose(p.noise_between(x0, x_t, grid(p, STEPS)[reach]), constant, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_times_are_floored_to_the_grid(kind):
    p = Process("flow", shift=3.0) if kind == "flow" else process(kind)
    at = grid(p, STEPS)
    assert at[0] == (0 if kind == "flow" else -1) and at.tolist() == sorted(at.tolist()) and len(at) == STEPS + 1
    assert floored(at, at).tolist() == [1, *range(1, STEPS + 1)], "never the picture itself, which has no noise"
    between = p.times(torch.linspace(0.001, 0.999, 200, dtype=torch.float64))
    below = at[floored(between, at)]
    assert ((below <= between) | (below == at[1])).all()
    assert ((at[(floored(between, at) + 1).clamp_max(STEPS)] > between) | (below == at[-1])).all()


def smooth(p: Process):
    """A network that depends on where it is asked."""
    def predict(x, t, rows):
        return torch.tanh(0.7 * x.flip(-1)) + 0.3 * (t.double() / (1 if p.kind == "flow" else 1000)).view(-1, 1, 1, 1) * x

    return predict


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_more_steps_change_less(kind):
    """First order: each doubling of the grid changes x_t by less than the one before, in the end by about half."""
    (x0, _), p = pictures(), process(kind)
    found = [arrived(p, smooth(p), x0, [steps // 2] * 4, steps) for steps in (10, 20, 40, 80, 160)]
    apart = [float((b - a).norm()) for a, b in zip(found, found[1:], strict=False)]
    assert all(b < a for a, b in zip(apart, apart[1:], strict=False))
    assert 0.35 < apart[-1] / apart[-2] < 0.75


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_sampling_undoes_an_inversion_the_better_the_more_steps(kind):
    (x0, _), p, errors = pictures(), process(kind), {}
    for renoise in (0, 8):
        for steps in (10, 40, 160):
            at, x = grid(p, steps), arrived(p, smooth(p), x0, [steps // 2] * 4, steps, renoise=renoise)
            for i in range(steps // 2, 0, -1):
                now, to = at[i].expand(4), at[i - 1].expand(4)
                x = p.step(smooth(p)(x, now, None), x, now, to)
            errors[renoise, steps] = float((x - x0).norm())
        assert errors[renoise, 10] > 2 * errors[renoise, 40] > 4 * errors[renoise, 160]
    assert all(errors[8, steps] < errors[0, steps] for steps in (10, 40, 160)), "refined steps come closer"


def test_eta_adds_the_noise_of_the_ancestral_step():
    """None at the step from the picture itself; after the next one the deviation of the published sampler."""
    (x0, constant), p, zero = pictures(shape=(4, 3, 64, 64)), process("epsilon"), []

    def noise(i, rows):
        return torch.randn((len(rows), 3, 64, 64), generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    for reach in (1, 2):
        plain, noisy = (arrived(p, along(p, constant), x0, [reach] * 4, eta=eta, noise=noise) for eta in (0.0, 0.1))
        zero.append(float((noisy - plain).std()))
    s, t = CUMPROD[99], CUMPROD[199]
    assert zero[0] == 0 and zero[1] == pytest.approx(0.1 * math.sqrt((1 - s) / (1 - t) * (1 - t / s)), rel=0.02)


# ---- the plans ------------------------------------------------------------------------------------------


def sites_of(policy, rows, reference=None, visit=0):
    micro = toy.micro(policy, rows, visit)
    policy.prepare(micro, reference)
    return micro.made


@pytest.mark.parametrize("which", ["folder", "flow"])
def test_a_constant_network_finds_its_own_noise_in_both_pictures(which, request):
    policy = toy.policy(request.getfixturevalue(which), INVERTED, family={"folder": "sd15", "flow": "sd3"}[which])
    constant = torch.randn(toy.SHAPE)
    policy.denoiser.predict = lambda x, t, cond, sizes: constant.expand_as(x)
    sites = sites_of(policy, toy.rows(policy, 4))
    assert torch.allclose(sites.target, constant.expand_as(sites.target), atol=1e-3)
    assert set(sites.t.tolist()) <= set(grid(policy.process, STEPS).tolist()) and len(set(sites.t.tolist())) > 1
    assert sites.t[0::2].tolist() == sites.t[1::2].tolist(), "both pictures of a row stand at one time"


@pytest.mark.parametrize("noise", [{**INVERTED, "eta": 0.1, "renoise": 1, "draws": 2}, {"plan": "path", "inversion_steps": 6, "draws": 3}],
                         ids=["inverted", "path"])
def test_sites_do_not_depend_on_the_batch(folder, noise):
    """Rows at different times, together and one by one: each has its own."""
    policy = toy.policy(folder, noise)
    reference, rows = FrozenCopy(policy), toy.rows(policy, 3)
    whole = sites_of(policy, rows, reference)
    parts = [sites_of(policy, [row], reference) for row in rows]
    assert torch.equal(whole.t, torch.cat([p.t for p in parts])) and len(set(whole.t.tolist())) > 2
    for name in ("x_t", "target", "weight"):
        torch.testing.assert_close(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]), rtol=1e-4, atol=1e-4)
    assert policy.training and reference.frozen.training is False


def test_the_inverter_is_the_policy_as_it_stands_or_the_reference(folder):
    for inverter, moves in (("policy", True), ("reference", False)):
        policy = toy.policy(folder, {**INVERTED, "inverter": inverter})
        reference, rows = FrozenCopy(policy), toy.rows(policy, 2)
        before = sites_of(policy, rows, reference)
        moved(policy, 0.1)
        after = sites_of(policy, rows, reference)
        assert torch.equal(before.x_t, after.x_t) is not moves
        assert not after.x_t.requires_grad


def test_policy_and_reference_are_scored_at_the_same_sites(folder):
    """Also by an objective that asks the reference first, and in the second pass of one that couples its batch."""
    from prefopt.objectives.diffusion import DSPO
    from prefopt.objectives.unary import KTO

    for objective, calls in ((DPO(beta=1.0), 2), (DSPO(scale=2 / D), 2), (KTO(beta=0.1), 3)):
        policy = toy.policy(folder, INVERTED)
        reference, asked = FrozenCopy(policy), []
        moved(policy, 0.1)
        for model in (policy, reference.frozen):
            model.forward = lambda micro, *a, plain=model.forward: (asked.append(micro.made.x_t), plain(micro, *a))[1]
        with fresh_accelerator() as accelerator:
            engine = Engine(policy, objective, reference, OptimConfig(), accelerator)
            engine.step(toy.source(policy, toy.rows(policy, 2), view=objective.view).step(0), 0.0)
        assert len(asked) == calls
        for x in asked[1:]:
            assert torch.equal(x, asked[0])


def test_held_out_pictures_are_judged_at_random_noise(folder):
    """Whatever the plan, so that all runs are judged at the same sites."""
    plain = toy.policy(folder)
    rows = toy.rows(plain, 2, held_out=True)
    made = {}
    for plan in ("shared", "independent", "inverted", "path"):
        policy = toy.policy(folder, {"plan": plan})
        toy.rows(policy, 2)
        (micro,) = toy.source(policy, rows).everything("pairs")
        policy.prepare(micro)
        made[plan] = micro.made
        assert torch.equal(micro.made.x_t, made["shared"].x_t) and torch.equal(micro.made.target, made["shared"].target)


# ---- DDIM-InPO and SmPO ---------------------------------------------------------------------------------


def step_of(policy, objective, rows, reference, visit=0):
    with fresh_accelerator() as accelerator:
        engine = Engine(policy, objective, reference, OptimConfig(max_grad_norm=1e9), accelerator)
        return gradients(engine, toy.source(policy, rows).micro_batches(list(range(len(rows))), visit))


def largest(gradient) -> float:
    return max(float(g.abs().max()) for g in gradient.values())


def same(gradient, other) -> None:
    for name, wanted in other.items():
        torch.testing.assert_close(gradient[name], wanted, rtol=1e-4, atol=1e-5 * largest(other))


def labelled(policy, p: float, count: int = 2):
    rows = toy.rows(policy, count)
    for row in rows:
        row.label = p
    return rows


def test_smpo_at_a_factor_of_one_is_ddim_inpo(folder):
    found = []
    for objective, label in ((DPO(beta=2000 / D), 1.0), (SmPO(beta=2000 / D, gamma=1.0), 1.0), (SmPO(beta=2000 / D, gamma=10.0), 0.55)):
        policy = toy.policy(folder, {**INVERTED, "eta": 0.1})
        reference = FrozenCopy(policy)
        moved(policy, 0.05)
        found.append(step_of(policy, objective, labelled(policy, label), reference))
    (inpo, loss), *others = found
    assert abs(loss - math.log(2)) > 1e-3
    for gradient, other in others:
        assert other == pytest.approx(loss, rel=1e-6)
        same(gradient, inpo)


def test_smpo_leaves_a_tie_alone_and_is_diffusion_dpo_at_shared_noise(folder):
    found = {}
    beta = 2000 / D
    for name, objective, label in (("tie", SmPO(beta=beta), 0.5), ("sure", SmPO(beta=beta), 0.55), ("dpo", DPO(beta=beta), 1.0)):
        policy = toy.policy(folder)
        reference = FrozenCopy(policy)
        moved(policy, 0.05)
        found[name] = step_of(policy, objective, labelled(policy, label), reference)
    assert found["tie"][1] == pytest.approx(math.log(2), abs=1e-7) and all((g == 0).all() for g in found["tie"][0].values())
    assert found["sure"][1] == pytest.approx(found["dpo"][1], rel=1e-6)
    same(found["sure"][0], found["dpo"][0])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_loss_of_equal_weights_is_log_two(folder, lora):
    policy = toy.policy(folder, {**INVERTED, "eta": 0.1}, lora)
    reference = AdapterOff(policy) if lora else FrozenCopy(policy)
    gradient, loss = step_of(policy, DPO(beta=2000 / D), toy.rows(policy, 2), reference)
    assert loss == pytest.approx(math.log(2), abs=1e-6) and largest(gradient) > 1e-4


# ---- Inversion-DPO --------------------------------------------------------------------------------------

PATH = {"plan": "path", "inversion_steps": 6, "draws": 3, "weighting": "dsm", "inversion_guidance": 2.0}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_weights_make_no_error_and_have_no_gradient(folder, sign, lora):
    policy = toy.policy(folder, {**PATH, "weighting": "constant"}, lora)  # no factor 100 on the rounding at the last times
    reference = AdapterOff(policy) if lora else FrozenCopy(policy)
    rows = toy.rows(policy, 2)
    micro = toy.micro(policy, rows)
    policy.prepare(micro, reference)
    assert float(policy(micro)["error"].detach().max()) < 1e-9 and float(reference(micro)["error"].max()) < 1e-9
    gradient, loss = step_of(policy, InversionDPO(beta=1.0, sign=sign), rows, reference)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    moved(policy, 0.02)
    assert largest(gradient) < 1e-4 * largest(step_of(policy, InversionDPO(beta=1.0, sign=sign), rows, reference)[0])


def test_a_small_change_of_the_weights_counts_by_its_square_and_the_sign(folder):
    found = {}
    for sign in (1, -1):
        for delta in (0.001, 0.002):
            policy = toy.policy(folder, PATH)
            reference, rows = FrozenCopy(policy), toy.rows(policy, 1)
            loser = rows[0].tokens.branches[1].ids[0]
            policy.encodings.add_latent(loser, 5 * policy.encodings.latent(loser)[0])  # or winner and loser differ by little
            moved(policy, delta)
            found[sign, delta] = step_of(policy, InversionDPO(beta=0.1, sign=sign), rows, reference)[1] - math.log(2)
    for sign in (1, -1):
        assert found[sign, 0.002] / found[sign, 0.001] == pytest.approx(4, rel=0.15)
    assert found[1, 0.002] == pytest.approx(-found[-1, 0.002], rel=0.05) and abs(found[1, 0.002]) > 1e-5


def test_one_step_asks_the_network_at_the_picture_itself(folder):
    """N = 1: D = w |pi(x0, t_1) - ref(x0, t_1)|^2, the mean over latent dims, t_1 the last time there is."""
    policy = toy.policy(folder, {"plan": "path", "inversion_steps": 1, "weighting": "dsm"})
    reference, rows = FrozenCopy(policy), toy.rows(policy, 1)
    moved(policy, 0.05)
    micro = toy.micro(policy, rows)
    policy.prepare(micro, reference)
    x0 = torch.stack([policy.encodings.latent(b.ids[0])[0] for b in rows[0].tokens.branches])
    assert torch.equal(micro.made.x_t, x0) and micro.made.t.tolist() == [999, 999]
    with torch.no_grad():
        said = [m.predict(x0, micro.made.t, [b.ids[1] for b in rows[0].tokens.branches], None) for m in (policy, reference.frozen)]
    wanted = (said[0] - said[1]).square().flatten(1).mean(1) / (2 * policy.process.alphas_cumprod[999])
    with torch.no_grad():
        assert torch.allclose(-2 / D * policy(micro)["token_logp"].double(), wanted.double(), rtol=1e-4)


def test_states_of_a_path_are_spread_over_it_and_shared_by_its_draws(folder):
    """Guided by two, so each state asks twice, of the two pictures at once: the draws of a picture share one way."""
    policy = toy.policy(folder, {**PATH, "draws": 6})
    reference, asked = FrozenCopy(policy), []
    plain = reference.frozen.denoiser.predict
    reference.frozen.denoiser.predict = lambda x, *rest: (asked.append(len(x)), plain(x, *rest))[1]
    sites = sites_of(policy, toy.rows(policy, 1), reference)
    assert set(sites.t.tolist()) <= set(grid(policy.process, 6)[1:].tolist()) and len(set(sites.t[:6].tolist())) >= 4
    last = grid(policy.process, 6).tolist().index(int(sites.t.max()))
    assert asked == [4] * last and sites.guidance.scale == 2, "both predictions of guidance are of one call"


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "said"), [
    (["algo=mapo", "noise=path"], "has none"),
    (["algo=abc_diffusion", "noise=inverted"], "several captions"),
    (["algo=ddim_inpo", "reference.store=on"], "while it trains"),
    (["algo=inversion_dpo", "algo.sign=2"], "sign"),
    (["algo=ddim_inpo", "noise.inversion_steps=0"], "noise.inversion_steps"),
])  # fmt: skip
def test_what_cannot_be_is_refused(overrides, said, capsys, tmp_path):
    command = ["train", "model=tiny-diffusion", "data=tiny-pictures", f"hydra.run.dir={tmp_path / 'run'}", *overrides]
    assert cli.main(command) == 2 and said in capsys.readouterr().err


def test_scores_become_win_probabilities():
    from prefopt.data.transform_kinds import KINDS
    from prefopt.errors import UserError

    def pair(*scores):
        return replace(toy_pair, completions=[replace(c, score=s) for c, s in zip(toy_pair.completions, scores, strict=True)])

    from tests.toy import pair as example

    toy_pair, job = example(), SimpleNamespace(name="soft_labels", counts=__import__("collections").Counter())
    rows = [pair(0.2, 0.1), pair(0.1, 0.3), pair(0.2, 0.2)]
    made = KINDS["soft_labels"].run(rows, job, tau=None)
    assert [e.label for e in made] == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.e), 0.5])
    assert NoiseConfig().plan == "shared"
    with pytest.raises(UserError, match="all scores are 0.2"):
        KINDS["soft_labels"].run([pair(0.2, 0.2)], job, tau=None)
