"""The diffusion process of a model, as pure functions of a picture, a noise and a time. No scheduler, no state.

Variance-preserving kinds (arXiv 2006.11239): x_t = alpha_t x0 + sigma_t eps with alpha_t^2 = ab_t and sigma_t^2 = 1 - ab_t, t = 0 .. T-1.
Rectified flow (arXiv 2209.03003): x_t = (1 - t) x0 + t eps, t in (0, 1). What a network of each kind predicts:

    epsilon  eps                        x0       x0
    v        alpha_t eps - sigma_t x0   flow     eps - x0   (v: arXiv 2202.00512)

With any two of x0, eps, x_t and a prediction the others follow, so one squared error can be written as another: the error of x0 is J^2
times the error of a prediction, where J = |d x0 / d prediction| is sigma/alpha, sigma, 1 and t in this order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefopt.objectives.base import double, double_type

KINDS = ("epsilon", "v", "x0", "flow")
WEIGHTS = ("constant", "snr", "min_snr", "dsm")
TINY = 1e-8


@dataclass(frozen=True, eq=False)
class Process:
    """`alphas_cumprod` [T] of the variance-preserving kinds, fp64; `shift` of flow: times are moved to s t / (1 + (s - 1) t)
    (arXiv 2403.03206, equation 23) in training and sampling. A last `alphas_cumprod` of 0 (zero terminal SNR) is refused for epsilon."""

    kind: str
    alphas_cumprod: Tensor | None = field(default=None, repr=False)
    shift: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a process is one of {', '.join(KINDS)}, not {self.kind}")
        if (self.kind == "flow") != (self.alphas_cumprod is None):
            raise ValueError("a process has alphas_cumprod if and only if it is not a flow")
        if self.kind == "epsilon" and float(self.alphas_cumprod[-1]) == 0:
            raise ValueError("at a last signal-to-noise ratio of zero the noise is all there is, and predicting it says nothing of the "
                             "picture: zero terminal SNR goes with v or x0")

    @property
    def steps(self) -> int:
        """T, by which times are told to the network: the times of a flow are fractions of it."""
        return 1000 if self.alphas_cumprod is None else len(self.alphas_cumprod)

    def times(self, u: Tensor) -> Tensor:
        """The time at each share u in [0, 1) of the process: a whole number, or of a flow a number in (0, 1), after its shift."""
        if self.kind != "flow":
            return (double(u) * self.steps).long().clamp(0, self.steps - 1)
        u = double(u).clamp(1e-4, 1 - 1e-4)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), fp64, of the shape of `t`. A time of -1 is the picture itself: (1, 0), as 0 is of a flow."""
        if self.kind == "flow":
            return 1 - double(t), double(t)
        cumprod = double(self.alphas_cumprod).to(t.device, double_type(t.device))[t.clamp_min(0)]
        cumprod = torch.where(t < 0, torch.ones_like(cumprod), cumprod)
        return cumprod.sqrt(), (1 - cumprod).sqrt()

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of pictures [B, ...] at times [B]."""
        alpha, sigma = self._like(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict."""
        if self.kind == "epsilon":
            return eps
        if self.kind == "x0":
            return x0
        if self.kind == "flow":
            return eps - x0
        alpha, sigma = self._like(t, x0)
        return alpha * eps - sigma * x0

    def x0_of(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The picture that a prediction means."""
        alpha, sigma = self._like(t, x_t)
        if self.kind == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if self.kind == "v":
            return alpha * x_t - sigma * prediction
        return prediction if self.kind == "x0" else x_t - sigma * prediction

    def eps_of(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction means."""
        alpha, sigma = self._like(t, x_t)
        if self.kind == "epsilon":
            return prediction
        if self.kind == "v":
            return sigma * x_t + alpha * prediction
        if self.kind == "x0":
            return (x_t - alpha * prediction) / sigma
        return x_t + alpha * prediction

    def noise_between(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x_t of x0."""
        alpha, sigma = self._like(t, x0)
        return (x_t - alpha * x0) / sigma

    def snr(self, t: Tensor) -> Tensor:
        """alpha^2 / sigma^2, fp64."""
        alpha, sigma = self.scales(t)
        return alpha.square() / sigma.square().clamp_min(TINY)

    def log_snr(self, t: Tensor) -> Tensor:
        return self.snr(t).clamp_min(TINY).log()

    def weight(self, t: Tensor, name: str, gamma: float = 5.0) -> Tensor:
        """w(t), fp64, by which the squared error of the network's own prediction is multiplied:

        constant  1
        snr       the error of the noise, whatever is predicted: SNR J^2. Of a flow (1 - t)^2
        min_snr   min(SNR, gamma) times the error of x0 (arXiv 2303.09556)
        dsm       the error of the noise times 1 / (2 ab_t), as in Inversion-DPO (arXiv 2507.11554); of a flow with ab = (1 - t)^2

        Finite where the SNR is 0 or unbounded.
        """
        alpha, sigma = self.scales(t)
        if name == "constant":
            return torch.ones_like(alpha)
        if name not in WEIGHTS:
            raise ValueError(f"the weighting of times is one of {', '.join(WEIGHTS)}, not {name}")
        # J^2 / sigma^2, so that nothing is divided by a sigma of 0: SNR J^2 = alpha^2 J^2 / sigma^2.
        of = {"epsilon": alpha, "x0": sigma}.get(self.kind, torch.ones_like(alpha))
        jacobian = 1 / of.square().clamp_min(TINY)
        if name == "snr":
            return alpha.square() * jacobian
        if name == "dsm":
            return 0.5 * jacobian
        return torch.minimum(alpha.square(), gamma * sigma.square()) * jacobian

    def schedule(self, steps: int) -> Tensor:
        """[steps + 1] the times of a sampler, from noise to picture. The last one is the picture itself: 0 of a flow, -1 otherwise."""
        if self.kind == "flow":
            u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            return self.shift * u / (1 + (self.shift - 1) * u)
        ends = torch.linspace(self.steps, 0, steps + 1, dtype=torch.float64).round().long() - 1  # trailing: it begins at T - 1 (2305.08891)
        return ends

    def jittered(self, times: Tensor, share: Tensor) -> Tensor:
        """Sampling times [B, steps + 1], all but the first and the last moved on by a `share` [B] in [0, 1) of the step that follows."""
        ahead = (times[:, 1:-1] - times[:, 2:]) * share[:, None]
        moved = times[:, 1:-1] - (ahead if self.kind == "flow" else ahead.floor().to(times.dtype))
        return torch.cat([times[:, :1], moved, times[:, -1:]], 1)

    def step(self, prediction: Tensor, x_t: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """One step of the deterministic sampler (DDIM, arXiv 2010.02502; Euler of a flow) from times `t` [B] to `to` [B], either way."""
        if self.kind == "flow":
            span = (to - t).to(x_t.dtype).view(-1, *[1] * (x_t.dim() - 1))
            return x_t + span * prediction
        x0, eps = self.x0_of(prediction, x_t, t), self.eps_of(prediction, x_t, t)
        alpha, sigma = self._like(to, x_t)
        return alpha * x0 + sigma * eps

    def direction(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What stays the same along a deterministic step: the noise that a prediction means, or of a flow the velocity."""
        return prediction if self.kind == "flow" else self.eps_of(prediction, x_t, t)

    def climb(self, direction: Tensor, x: Tensor, now: Tensor, to: Tensor) -> Tensor:
        """One step of an inversion, from times `now` [B] (the picture itself, or where some of it is left) up to `to` [B], along a
        direction that was found elsewhere."""
        if self.kind == "flow":
            return self.step(direction, x, now, to)
        (alpha, sigma), (alpha_to, sigma_to) = self._like(now, x), self._like(to, x)
        return alpha_to * (x - sigma * direction) / alpha + sigma_to * direction

    def variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Of x_s given x_t and the picture, for s before t: (1 - (alpha_t/alpha_s)^2 (sigma_s/sigma_t)^2) sigma_s^2, fp64; 0 where s is the
        picture itself."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.scales(t), self.scales(s)
        left = alpha_t.square() * sigma_s.square() / (alpha_s.square() * sigma_t.square())
        return ((1 - left) * sigma_s.square()).clamp_min(0)

    def _like(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scales in the type of `x`, shaped to multiply it."""
        shape = (-1, *[1] * (x.dim() - 1))
        alpha, sigma = self.scales(t)
        return alpha.to(x.dtype).view(shape), sigma.to(x.dtype).view(shape)
