"""The diffusion process: conversions, weights, samplers, against diffusers' schedulers where they say the same."""

import math

import pytest
import torch

from prefopt.policies.process import WEIGHTS, Process

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
CUMPROD = torch.cumprod(1 - BETAS, 0)
KINDS = ("epsilon", "v", "x0", "flow")


def process(kind: str) -> Process:
    return Process(kind, None if kind == "flow" else CUMPROD)


def times(kind: str) -> torch.Tensor:
    return torch.tensor([0.01, 0.3, 0.7, 0.99], dtype=torch.float64) if kind == "flow" else torch.tensor([3, 250, 700, 998])


def pictures(seed: int = 0, shape: tuple = (4, 3, 2, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_gives_back_picture_and_noise(kind):
    (x0, eps), t, p = pictures(), times(kind), process(kind)
    x_t, target = p.noised(x0, eps, t), p.target(x0, eps, t)
    assert torch.allclose(p.x0_of(target, x_t, t), x0, atol=1e-9)
    assert torch.allclose(p.eps_of(target, x_t, t), eps, atol=1e-9)
    assert torch.allclose(p.noise_between(x0, x_t, t), eps, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_has_one_axis_more(kind):
    (x0, eps), t, p = pictures(shape=(4, 3, 5, 2, 2)), times(kind), process(kind)
    frame = p.noised(x0[:, :, 2], eps[:, :, 2], t)
    assert torch.equal(p.noised(x0, eps, t)[:, :, 2], frame)
    assert p.x0_of(p.target(x0, eps, t), p.noised(x0, eps, t), t).shape == x0.shape


@pytest.mark.parametrize("name", ["snr", "min_snr", "dsm"])
def test_trap_4_13_one_function_has_one_weighted_error_in_every_parameterisation(name):
    """A wrong idea of the picture is written as what each kind of network would have said."""
    (x0, eps), (wrong, _), t = pictures(), pictures(1), times("v")
    x_t = process("epsilon").noised(x0, eps, t)
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in process("v").scales(t))
    said = {"x0": wrong, "epsilon": (x_t - alpha * wrong) / sigma, "v": (alpha * x_t - wrong) / sigma}
    errors = {}
    for kind, prediction in said.items():
        p = process(kind)
        errors[kind] = p.weight(t, name) * (prediction - p.target(x0, eps, t)).square().flatten(1).sum(1)
    assert torch.allclose(errors["epsilon"], errors["v"]) and torch.allclose(errors["x0"], errors["v"])


def test_min_snr_is_the_published_weight():
    t = times("v")
    snr = CUMPROD[t] / (1 - CUMPROD[t])
    bounded = snr.clamp_max(5.0)
    for kind, wanted in {"epsilon": bounded / snr, "v": bounded / (snr + 1), "x0": bounded}.items():
        assert torch.allclose(process(kind).weight(t, "min_snr", 5.0), wanted), kind


def test_snr_weights_of_a_flow_are_those_of_the_noise():
    t = times("flow")
    assert torch.allclose(process("flow").weight(t, "snr"), (1 - t) ** 2)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_trap_4_13_weights_are_finite_where_nothing_is_left_of_the_picture(kind, name):
    cumprod = CUMPROD.clone()
    cumprod[-1] = 0
    p = Process(kind, cumprod)
    assert p.weight(torch.tensor([0, 999]), name).isfinite().all()
    (x0, eps), t = pictures(), torch.full((4,), 999)
    assert p.x0_of(p.target(x0, eps, t), p.noised(x0, eps, t), t).isfinite().all()
    with pytest.raises(ValueError, match="zero terminal SNR goes with v or x0"):
        Process("epsilon", cumprod)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_both_ways(kind):
    """Along a prediction that is right everywhere, a step down undoes a step up."""
    (x0, eps), p = pictures(), process(kind)
    times_of = (0.2, 0.8) if kind == "flow" else (200, 800)
    low, high = (torch.full((4,), t, dtype=torch.float64 if kind == "flow" else torch.long) for t in times_of)
    x = p.noised(x0, eps, low)
    up = p.step(p.target(x0, eps, low), x, low, high)
    assert torch.allclose(up, p.noised(x0, eps, high), atol=1e-9)
    assert torch.allclose(p.step(p.target(x0, eps, high), up, high, low), x, atol=1e-9)


@pytest.mark.parametrize(("kind", "named"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_sampling_steps_are_those_of_ddim(kind, named):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=named, clip_sample=False,
                              set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    p = Process(kind, scheduler.alphas_cumprod.double())
    schedule = p.schedule(10)
    assert schedule[:-1].tolist() == scheduler.timesteps.tolist() and schedule[-1] == -1
    (x, prediction) = (part.float() for part in pictures())
    for now, to in zip(schedule[:-1], schedule[1:], strict=True):
        wanted = scheduler.step(prediction, int(now), x).prev_sample
        x = p.step(prediction, x, now.expand(4), to.expand(4))
        assert torch.allclose(x, wanted, atol=2e-4, rtol=1e-4), int(now)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_steps_are_those_of_the_flow_scheduler(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    p = Process("flow", shift=shift)
    schedule = p.schedule(8)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 8, 8).tolist())
    assert torch.allclose(schedule.float(), scheduler.sigmas, atol=1e-6)
    (x, prediction) = (part.float() for part in pictures())
    for number, (now, to) in enumerate(zip(schedule[:-1], schedule[1:], strict=True)):
        wanted = scheduler.step(prediction, scheduler.timesteps[number], x).prev_sample
        x = p.step(prediction, x, now.expand(4), to.expand(4))
        assert torch.allclose(x, wanted, atol=1e-5)


def test_trap_4_14_training_times_are_shifted_as_the_sampler_is():
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    p = Process("flow", shift=3.0)
    assert torch.allclose(p.times(u), 3 * u / (1 + 2 * u))
    assert torch.allclose(p.times(p.schedule(4)[1:-1].flip(0) / (3 - 2 * p.schedule(4)[1:-1].flip(0))), p.schedule(4)[1:-1].flip(0))


def test_times_cover_the_whole_process():
    p = process("epsilon")
    assert p.times(torch.tensor([0.0, 0.5, 1 - 1e-12])).tolist() == [0, 500, 999]
    flow = process("flow").times(torch.tensor([0.0, 1.0]))
    assert 0 < float(flow[0]) < float(flow[1]) < 1


def test_log_snr_falls():
    for kind in KINDS:
        falls = process(kind).log_snr(times(kind))
        assert all(a > b for a, b in zip(falls, falls[1:], strict=False)) and all(map(math.isfinite, falls))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="one of epsilon, v, x0, flow"):
        Process("score", CUMPROD)
    with pytest.raises(ValueError, match="if and only if"):
        Process("flow", CUMPROD)
    with pytest.raises(ValueError, match="one of constant, snr"):
        process("v").weight(times("v"), "sqrt")
