"""Steps of samplers: their means, deviations and densities against diffusers, closed forms and golden numbers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from prefopt.objectives.trajectory import surrogate
from prefopt.policies.process import Process
from prefopt.policies.samplers import gaussian_kl, log_prob, transition
from prefopt.training.advantages import Running, group_advantages

FLOW = Process("flow")
SHAPE = (3, 2, 4, 4)


def normals(seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def euler(steps: int = 10) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler


def flow_step(v, x, t, to, level, kind="sde", second=0.96013):
    times = [torch.full((len(x),), float(value), dtype=torch.float64) for value in (t, to, level)]
    return transition(FLOW, v, x, *times, torch.tensor(second), kind)


def test_golden_deviations_of_the_flow_sde():
    """Shift 3, ten steps, a = 0.7; at t = 1 the second sigma stands in for 1 in the denominator."""
    sigmas = euler().sigmas.double()
    assert sigmas.tolist() == pytest.approx([1, .96013, .91335, .85769, .79037, .70728, .60215, .46488, .27805, .00893, 0], abs=6e-6)
    x = torch.zeros(10, 1, 1, 1, dtype=torch.float64)
    _, std = transition(FLOW, x, x, sigmas[:-1], sigmas[1:], torch.full((10,), 0.7), sigmas[1])
    spread = std / (sigmas[:-1] - sigmas[1:]).sqrt()
    assert spread.tolist() == pytest.approx([3.5057, 3.4351, 2.2726, 1.7185, 1.3592, 1.0881, .8612, .6524, .4344, .0664], abs=1e-4)
    assert std.tolist() == pytest.approx([.7, .743, .5362, .4459, .3918, .3528, .3191, .2820, .2254, .0063], abs=6e-5)


def test_without_noise_a_flow_takes_eulers_steps():
    """The whole run of diffusers' scheduler too, to 1e-6."""
    scheduler, sigmas = euler(), euler().sigmas.double()
    x = ours = normals(0, torch.float32)
    for i, time in enumerate(scheduler.timesteps):
        v = torch.tanh(x) + i
        mean, std = flow_step(v.double(), ours.double(), sigmas[i], sigmas[i + 1], 0.0)
        torch.testing.assert_close(mean, ours.double() + (sigmas[i + 1] - sigmas[i]) * v.double(), atol=1e-12, rtol=0)
        assert not std.any()
        x, ours = scheduler.step(v, time, x, return_dict=False)[0], mean.float()
    torch.testing.assert_close(ours, x, atol=1e-6, rtol=1e-6)


def test_the_flow_sde_is_dance_grpos_where_its_eta_is_the_spread():
    """DanceGRPO (arXiv 2505.07818): x + v d - eta^2/2 score d, score = -(x - (1 - t) x0) / t^2."""
    v, x, t, to, level = normals(1), normals(2), 0.6, 0.5, 0.7
    eta = level * math.sqrt(t / (1 - t))
    score = -(x - (1 - t) * (x - t * v)) / t**2
    mean, std = flow_step(v, x, t, to, level)
    torch.testing.assert_close(mean, x + (to - t) * v - 0.5 * eta**2 * score * (to - t), atol=1e-12, rtol=0)
    assert std[0].item() == pytest.approx(eta * math.sqrt(t - to), rel=1e-12)


@pytest.mark.parametrize(("steps", "wanted"), [(10, 0.4245), (40, 0.479), (400, 0.498)])
def test_the_flow_sde_keeps_the_marginals_in_the_limit(steps, wanted):
    """Data N(2, 0.5^2) with the exact velocity; mean and variance of a chain of linear Gaussian steps are known in closed form."""
    scheduler = euler(steps)
    sigmas = scheduler.sigmas.double()
    mean, var = torch.zeros(1, 1, dtype=torch.float64), 1.0
    for i in range(steps):
        t, to = sigmas[i : i + 1], sigmas[i + 1 : i + 2]

        def velocity(x, t=t):  # E[eps - x0 | x_t]
            gain = 1 / ((1 - t) ** 2 * 0.25 + t**2)
            return (x - (1 - t) * 2) * (t - (1 - t) * 0.25) * gain - 2

        ends = [transition(FLOW, velocity(x), x, t, to, torch.tensor([0.7]), sigmas[1]) for x in (mean, mean + 1)]
        (here, std), (beside, _) = ends
        mean, var = here, float((beside - here) ** 2 * var + std**2)
    assert math.sqrt(var) == pytest.approx(wanted, abs=4e-3) and mean.item() == pytest.approx(2, abs=0.02)


def test_cps_at_full_noise_is_diffusers_stochastic_sampling():
    sigmas, v, x = euler().sigmas.double(), normals(3, torch.float32), normals(4, torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(10)
    scheduler._step_index = 4
    torch.manual_seed(7)
    wanted = scheduler.step(v, scheduler.timesteps[4], x, return_dict=False)[0]
    torch.manual_seed(7)
    noise = torch.randn_like(x)
    mean, std = flow_step(v.double(), x.double(), sigmas[4], sigmas[5], 1.0, "cps")
    torch.testing.assert_close((mean + std[0] * noise).float(), wanted, atol=1e-5, rtol=1e-5)
    still, none = flow_step(v.double(), x.double(), sigmas[4], sigmas[5], 0.0, "cps")
    torch.testing.assert_close(still, x.double() + (sigmas[5] - sigmas[4]) * v.double(), atol=1e-12, rtol=0)
    assert not none.any()


def ddim() -> tuple[DDIMScheduler, Process]:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
                              steps_offset=1)
    scheduler.set_timesteps(50)
    return scheduler, Process("epsilon", scheduler.alphas_cumprod.double())


def test_a_ddim_step_is_diffusers_and_its_deviations_are_golden():
    """Its leading spacing, from 981 to 1; the time before the last step's is clamped to 0, where some noise is left."""
    scheduler, process = ddim()
    times = scheduler.timesteps
    assert times[0] == 981 and times[-1] == 1
    stds = []
    for i, t in enumerate(times.tolist()):
        eps, x, z = (normals(3 * i + k, torch.float32) for k in range(3))
        before, to = torch.full((3,), t), torch.full((3,), max(t - 20, 0))
        mean, std = transition(process, eps, x, before, to, torch.ones(3), torch.tensor(0))
        wanted = scheduler.step(eps, t, x, eta=1.0, variance_noise=z, return_dict=False)[0]
        torch.testing.assert_close(mean + std[0].float() * z, wanted, atol=2e-6 * float(wanted.abs().max()), rtol=1e-5)
        stds.append(std[0].item())
    assert min(stds) > 0
    assert [stds[0], stds[24], stds[-1]] == pytest.approx([0.45446, 0.29478, 0.02065], abs=5e-6)
    still, none = transition(process, eps, x, before, to, torch.zeros(3), torch.tensor(0))
    torch.testing.assert_close(still, process.step(eps, x, before, to), atol=1e-5, rtol=1e-5)
    assert not none.any()


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_other_parameterisations_take_the_same_step(kind):
    _, process = ddim()
    eps, x, t, to = normals(1), normals(2), torch.tensor([600] * 3), torch.tensor([580] * 3)
    other = Process(kind, process.alphas_cumprod)
    x0 = process.x0_of(eps, x, t)
    found = [transition(p, said, x, t, to, torch.ones(3), torch.tensor(0)) for p, said in
             ((process, eps), (other, other.target(x0, eps, t)))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trap_4_18_log_prob_is_the_gaussian_density(reduction):
    """Summed it is the density; the papers' mean is that by the number of latent dims, and so is the ratio's exponent."""
    x, mean, std = normals(1), normals(2), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    exact = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(log_prob(x, mean, std, reduction), exact if reduction == "sum" else exact / x[0].numel())


def test_trap_4_19_the_kl_has_the_length_of_the_step_in_it():
    """Exact: ((-d)/2) (s (1-t) / (2t) + 1/s)^2 |v - v_ref|^2, and what a Monte Carlo of log-density ratios says."""
    v, other, x, t, to, level = normals(1), normals(2), normals(3), 0.7, 0.55, 0.7
    (mean, std), (mean_other, _) = (flow_step(said, x, t, to, level) for said in (v, other))
    found, s = gaussian_kl(mean, mean_other, std, "sum"), level * math.sqrt(t / (1 - t))
    wanted = (t - to) / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * (v - other).flatten(1).square().sum(1)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    drawn = mean + std.view(-1, 1, 1, 1) * torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = torch.stack([log_prob(d, mean, std, "sum") - log_prob(d, mean_other, std, "sum") for d in drawn])
    assert ((ratio.mean(0) - found).abs() < 4 * ratio.std(0) / math.sqrt(len(drawn))).all()


def test_advantages():
    """Flow-GRPO's golden numbers; groups are numbers and not texts; DDPO's past of a prompt."""
    assert group_advantages([1, 3, 6], [0, 0, 0]) == pytest.approx([-1.1355, -0.1622, 1.2977], abs=1e-4)
    found = group_advantages([1, 3, 6, 5, 5], [0, 0, 0, 1, 1], over_round=True)
    spread = torch.tensor([1.0, 3, 6, 5, 5]).std(correction=0).item()
    assert found[3:] == [0, 0] and found[0] == pytest.approx((1 - 10 / 3) / (spread + 1e-4))
    running = Running(size=3, least=3)
    whole = running([0.0, 2.0], ["a", "b"])
    assert whole == pytest.approx([-1, 1], abs=1e-5), "too few of either: mean and deviation of the round"
    assert running([3.0, 3.0], ["a", "a"]) == pytest.approx([1 / math.sqrt(2)] * 2, abs=1e-5), "of 0, 3, 3"


def test_trap_4_29_the_surrogate_lets_back_what_went_too_far():
    """Beyond the clip the gradient is zero where the step was in the right direction, and not where it was in the wrong one."""
    ratio = torch.tensor([1.2, 1.2, 0.8, 0.8, 1.05], requires_grad=True)
    surrogate(ratio, torch.tensor([1.0, -1, 1, -1, 1]), 0.1).sum().backward()
    assert ratio.grad.tolist() == [0, 1, -1, 0, -1]
