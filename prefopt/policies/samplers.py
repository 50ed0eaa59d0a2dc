"""One step of a sampler as pure functions: the Gaussian that the next latent is drawn from, its log-density, and the KL between two.

Levels [B] of noise: 0 is the deterministic step (DDIM, Euler). t and `to` [B] are two times of a schedule, from noise to picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.policies.process import Process

KINDS = ("sde", "cps")
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def transition(process: Process, prediction: Tensor, x_t: Tensor, t: Tensor, to: Tensor, level: Tensor, second: Tensor,
               kind: str = "sde") -> tuple[Tensor, Tensor]:
    """(mean [B, ...] in the type of `x_t`, standard deviation [B] fp64) of x_to given x_t.

    sde, variance preserving: DDIM with eta = level (arXiv 2010.02502, equation 16; level 1 is DDPM), ab = alpha^2:
        std = level sqrt((1 - ab_to) / (1 - ab_t) (1 - ab_t / ab_to)),  mean = alpha_to x0 + sqrt(1 - ab_to - std^2) eps
    sde, flow: Euler-Maruyama of the SDE with the flow's marginals (arXiv 2505.05470), s = level sqrt(t / (1 - t)), d = to - t:
        mean = x_t (1 + s^2 / (2 t) d) + v (1 + s^2 (1 - t) / (2 t)) d,  std = s sqrt(-d)
        At t = 1 the root has the schedule's second time, `second` (a number), in its denominator.
    cps, flow only (coefficients preserved, the later code of Flow-GRPO):
        std = to sin(level pi/2),  mean = (1 - to) x0 + sqrt(to^2 - std^2) eps
    """
    level = level.double()
    if process.kind != "flow":
        if kind != "sde":
            raise ValueError(f"the sampler {kind} is for flows, and this model predicts {process.kind}")
        alpha_to, sigma_to = process.scales(to)
        std = level * process.variance(t, to).sqrt()
        mean = _times(alpha_to, process.x0_of(prediction, x_t, t)) + \
            _times((sigma_to.square() - std.square()).clamp_min(0).sqrt(), process.eps_of(prediction, x_t, t))
        return mean, std
    now, then = t.double(), to.double()
    if kind == "cps":
        std = then * torch.sin(level * math.pi / 2)
        x0, eps = process.x0_of(prediction, x_t, t), process.eps_of(prediction, x_t, t)
        return _times(1 - then, x0) + _times((then.square() - std.square()).clamp_min(0).sqrt(), eps), std
    if kind != "sde":
        raise ValueError(f"a sampler is one of {', '.join(KINDS)}, not {kind}")
    span, spread = then - now, level * (now / (1 - torch.where(now == 1, second.double().to(now.device), now))).sqrt()
    pull = spread.square() / (2 * now)
    return _times(1 + pull * span, x_t) + _times((1 + pull * (1 - now)) * span, prediction), spread * (-span).sqrt()


def log_prob(x_to: Tensor, mean: Tensor, std: Tensor, reduction: str = "mean") -> Tensor:
    """[B] log-density of `x_to` under N(mean, std^2), nats: the sum over latent dims, or as the papers have it their mean. `x_to` gets no
    gradient."""
    std = _shaped(std, mean)
    each = -(x_to.detach() - mean).square() / (2 * std.square()) - std.log() - HALF_LOG_2PI
    return reduced(each, reduction)


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor, reduction: str = "mean") -> Tensor:
    """[B] KL of N(mean, std^2) from N(other, std^2), nats: (mean - other)^2 / (2 std^2), summed or averaged over latent dims."""
    return reduced((mean - other).square() / (2 * _shaped(std, mean).square()), reduction)


def reduced(each: Tensor, reduction: str) -> Tensor:
    """[B] sum or mean over latent dims."""
    flat = each.flatten(1)
    return flat.sum(1) if reduction == "sum" else flat.mean(1)


def _shaped(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _times(scale: Tensor, x: Tensor) -> Tensor:
    return _shaped(scale, x) * x
