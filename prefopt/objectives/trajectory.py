"""Objectives on transitions of a diffusion model's own sampling trajectories (x_t -> x_t-1), whose log-prob is `step_logp`: DDPO, DPOK,
Flow-GRPO, D3PO, SPO and GradSPO. A completion is one transition; `Groups.reward` is its picture's advantage, as `trajectory.advantage`
makes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prefopt.objectives.base import About, Batch, Objective, Term, Terms


def step_logp(batch: Batch, scorer: str) -> Tensor:
    """[E] log-prob of each edge's transition; of held-out pictures, which have none, that of their draws of noise."""
    scores = batch.scores[scorer]
    return scores["step_logp"] if "step_logp" in scores else scores["logp"]


def surrogate(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1-epsilon, 1+epsilon)), PPO's loss (arXiv 1707.06347)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


@dataclass
class DDPO(Objective):
    """Denoising diffusion policy optimization: a clipped policy gradient over the sampler's steps (arXiv 2305.13301).

    A = clip(R, -adv_clip, adv_clip), R the picture's advantage; rho = exp(log pi(x_t-1 | x_t) - that of the policy that drew it)
    L = mean max(-A rho, -A clip(rho, 1-epsilon, 1+epsilon)); with `clipped` false the score function's L = -mean A log pi(x_t-1 | x_t)
    Rewards: log pi of a transition, nats per latent dim (of all dims under trajectory.reduction=sum). Ranges: the clipped loss starts
    near 0 and says nothing, watch rollout/reward; `clipped` is a share of transitions, and above one half the step is too large.
    When: a reward that judges any picture. Limits: nothing holds the model back, so what the reward overlooks is exploited; epsilon is for
    log-probs that are means over latent dims, and another resolution or reduction needs another one.
    """

    epsilon: float = 1e-4
    adv_clip: float = 5.0
    clipped: bool = True

    view: ClassVar = "groups"
    quantities: ClassVar = {"policy": ("step_logp",), "previous": ("step_logp",)}
    pictures: ClassVar = True
    starts_level: ClassVar = False
    paper: ClassVar = "2305.13301"
    require: ClassVar = ("0 < epsilon < 1", "adv_clip > 0")
    formula: ClassVar = {
        "policy_gradient": "mean(max(-A*exp(min(y-o, 20)), -A*max(min(exp(min(y-o, 20)), 1+epsilon), 1-epsilon)) if clipped else -A*y"
        " for A in [max(min(R, adv_clip), -adv_clip)])"
    }
    golden: ClassVar = (
        ({"R": 2, "y": 0.5, "o": 0}, -2.0002),
        ({"R": -7, "y": -1, "o": -1}, 5),
        ({"R": 2, "y": 0.5, "o": 0, "clipped": False}, -1),
    )
    limits: ClassVar = (({"R": 0}, "0"), ({"y": -1, "o": -1, "R": 1.5, "clipped": True, "adv_clip": 5}, "-1.5"))

    def advantage(self, batch: Batch) -> Tensor:
        """[S] detached."""
        return batch.groups.reward.to(step_logp(batch, "policy").dtype)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """([S] of each transition, metrics)."""
        edge, now = batch.groups.edge, step_logp(batch, "policy")
        advantage = self.advantage(batch).clamp(-self.adv_clip, self.adv_clip)
        ratio = (now - step_logp(batch, "previous").detach())[edge].clamp(max=20).exp()
        beyond = ((ratio - 1).abs() > self.epsilon).to(ratio.dtype).detach()
        return self.step_loss(ratio, advantage) if self.clipped else -advantage * now[edge], {"clipped": beyond}

    def step_loss(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return surrogate(ratio, advantage, self.epsilon)

    def __call__(self, batch: Batch) -> Terms:
        values, metrics = self.losses(batch)
        return Terms([Term("policy_gradient", values, "completion")], metrics)

    def rewards(self, batch: Batch) -> Tensor:
        reward = step_logp(batch, "policy").detach()
        return reward - step_logp(batch, "reference") if batch.scores.get("reference") else reward


@dataclass
class FlowGRPO(DDPO):
    """Flow-GRPO: DDPO on a flow's stochastic sampler, with a penalty on each step's KL to the reference (arXiv 2505.05470).

    L = mean max(-A rho, -A clip(rho, 1-epsilon, 1+epsilon)) + beta KL(pi(. | x_t) || ref(. | x_t)), A and rho as in ddpo
    The KL is that of two Gaussians, exact: |mu - mu_ref|^2 / (2 std^2), by trajectory.reduction summed or averaged over latent dims. The
    authors' code leaves out the step's length (trajectory.kl=code): their beta of 0.04 is about 0.004 with the exact KL at ten steps.
    Rewards: log pi - log ref of a transition. Ranges: as ddpo, with its share `clipped`; `kl_to_reference` is 0 at the start.
    When: as ddpo, where the model is to stay near the reference. Limits: one more forward pass for each step.
    """

    beta: float = 0.004

    quantities: ClassVar = {"policy": ("step_logp", "divergence"), "reference": ("step_logp",), "previous": ("step_logp",)}
    paper: ClassVar = "2505.05470"
    require: ClassVar = (*DDPO.require, "beta >= 0")
    formula: ClassVar = {"policy_gradient": DDPO.formula["policy_gradient"], "kl": "beta*k"}
    golden: ClassVar = (({"R": 2, "y": 0.5, "o": 0, "k": 0.5}, -1.9982), ({"R": -7, "y": -1, "o": -1, "k": 0.0}, 5))
    limits: ClassVar = (({"R": 0, "k": 0.0}, "0"), ({"y": -1, "o": -1, "R": 1.5, "clipped": True, "adv_clip": 5}, "beta*k - 1.5"))

    def __call__(self, batch: Batch) -> Terms:
        values, metrics = self.losses(batch)
        kl = batch.edge_sum(batch.scores["policy"]["divergence"])[batch.groups.edge]
        terms = [Term("policy_gradient", values, "completion"), Term("kl", kl, "completion", self.beta)]
        return Terms(terms, metrics | {"kl_to_reference": kl.detach()})


class Critic(nn.Module):
    """V(x_t, caption, t): a small perceptron on what `About` tells the width of, whose last layer starts at zero."""

    weight_decay = 0.0
    rate = 10.0  # times the policy's: the authors' 1e-4 to 1e-5

    def __init__(self, width: int):
        super().__init__()
        hidden = [nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU()]
        self.layers = nn.Sequential(nn.LayerNorm(width), *hidden, nn.Linear(128, 1))
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, layout: Batch, hidden: Tensor, layers: Tensor | None) -> dict[str, Tensor]:
        return {"value": self.layers(hidden)[:, 0]}


@dataclass
class DPOK(FlowGRPO):
    """DPOK: a policy gradient over the sampler's steps with a learned baseline and a KL penalty (arXiv 2305.16381).

    A = clip(R - sg(V(x_t, caption, t)), -adv_clip, adv_clip); R is standardised over the round (trajectory.advantage=global), as the scores
    of ImageReward are. V, a small network of its own with ten times the policy's learning rate, is trained by (V - R)^2 beside
    L = w_r mean loss(rho, A) + beta KL + mean (V - R)^2; `clip_mode=ppo`: max(-A rho, -A clip(rho)), `clamp`: -A clip(rho), as the
    authors' code: outside the band it has no gradient, whatever the sign of A. Their KL is trajectory.kl=error, their w_kl is beta.
    Rewards: as flow_grpo. Ranges: as flow_grpo, with its `clipped` and `kl_to_reference`; `baseline` is the mean of V, in units of R.
    When: where the pictures of one prompt are too few for a group's mean. Limits: as flow_grpo. The authors' script draws
    transitions from its last thousand, some three rounds; here a round has its own alone, which source.epochs visits again.
    """

    beta: float = 0.01
    w_r: float = 100.0
    clip_mode: Literal["ppo", "clamp"] = "ppo"

    quantities: ClassVar = {"policy": ("step_logp", "divergence", "value"), "reference": ("step_logp",), "previous": ("step_logp",)}
    paper: ClassVar = "2305.16381"
    require: ClassVar = (*FlowGRPO.require, "w_r > 0", "clip_mode in ('ppo', 'clamp')")
    formula: ClassVar = {
        "policy_gradient": "mean(w_r*(max(-A*exp(min(y-o, 20)), -A*C) if clip_mode == 'ppo' else -A*C) if clipped else -w_r*A*y"
        " for A in [max(min(R-sg(v), adv_clip), -adv_clip)] for C in [max(min(exp(min(y-o, 20)), 1+epsilon), 1-epsilon)])",
        "kl": "beta*k",
        "value": "(v-R)**2",
    }
    golden: ClassVar = (
        ({"R": 2, "y": 0.5, "o": 0, "k": 0.5, "v": 0.0, "w_r": 1}, 2.0048),
        ({"R": 1, "y": -1, "o": -1, "k": 0.0, "v": 3.0, "w_r": 1}, 6),
        ({"R": -1, "y": 0.5, "o": 0, "k": 0.0, "v": 0.0, "w_r": 1, "clip_mode": "clamp"}, 2.0001),
    )
    limits: ClassVar = (({"R": 0, "v": 0.0, "k": 0.0}, "0"),)

    def build(self, about: About) -> Any:
        return Critic(about.hidden)

    def advantage(self, batch: Batch) -> Tensor:
        return super().advantage(batch) - self._value(batch).detach()

    def _value(self, batch: Batch) -> Tensor:
        return (batch.edge_sum(batch.scores["policy"]["value"]) / batch.lengths)[batch.groups.edge]

    def step_loss(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        if self.clip_mode == "ppo":
            return super().step_loss(ratio, advantage)
        return -advantage * ratio.clamp(1 - self.epsilon, 1 + self.epsilon)

    def __call__(self, batch: Batch) -> Terms:
        made, value = super().__call__(batch), self._value(batch)
        made.terms[0].weight = self.w_r
        made.terms.append(Term("value", (value - batch.groups.reward.to(value.dtype)).square(), "completion"))
        return Terms(made.terms, made.metrics | {"baseline": value.detach()})


@dataclass
class D3PO(Objective):
    """D3PO: DPO at each step of the sampler, on the log-ratio of a transition clamped to a narrow band (arXiv 2311.13231).

    g = log clip(pi(x_t-1 | x_t) / ref(x_t-1 | x_t), 1-epsilon, 1+epsilon)
    L = -log sigmoid(beta (g_w - g_l)), the mean over pairs of transitions at the same step; outside the band the gradient is zero
    Rewards: beta log pi/ref of a transition, without the clip. Ranges: logits stay within beta log((1+epsilon)/(1-epsilon)), so the loss
    moves little: 0.683 to 0.703 for beta 0.1 and epsilon 0.1; `clipped` is a share of transitions. When: preferences over the model's own
    pictures. Limits: all steps of a picture have its label; spo_diffusion judges each of them, at the cost of candidates at each.
    """

    beta: float = 0.1
    epsilon: float = 0.1

    quantities: ClassVar = {"policy": ("step_logp",), "reference": ("step_logp",)}
    pictures: ClassVar = True
    paper: ClassVar = "2311.13231"
    require: ClassVar = ("beta > 0", "0 < epsilon < 1")
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*(log(max(min(exp(w-rw), 1+epsilon), 1-epsilon))"
        " - log(max(min(exp(l-rl), 1+epsilon), 1-epsilon)))))"
    }
    golden: ClassVar = (
        ({"w": 1, "l": -1, "beta": 0.1, "epsilon": 0.1}, 0.683164),
        ({"w": -1, "l": 1, "beta": 0.1, "epsilon": 0.1}, 0.703231),
        ({"w": 1, "l": -1, "beta": 10, "epsilon": 0.1}, 0.126131),
        ({"w": -1, "l": 1, "beta": 10, "epsilon": 0.1}, 2.132838),
    )
    limits: ClassVar = (({"w": -1, "rw": -1, "l": -2, "rl": -2}, "log(2)"),
                        ({"w": 0.05, "rw": 0, "l": 0, "rl": 0.02, "epsilon": 0.1}, "-log(sigmoid(beta*h))"))

    def rewards(self, batch: Batch) -> Tensor:
        ratio = (step_logp(batch, "policy") - step_logp(batch, "reference")).detach()
        return self.beta * ratio

    def __call__(self, batch: Batch) -> Terms:
        ratio = step_logp(batch, "policy") - step_logp(batch, "reference").detach()
        inside = ratio.clamp(math.log1p(-self.epsilon), math.log1p(self.epsilon))
        pairs = batch.pairs
        logits = self.beta * (inside[pairs.chosen] - inside[pairs.rejected])
        beyond = (inside != ratio).to(ratio.dtype).detach()
        return Terms([Term("preference", -nn.functional.logsigmoid(logits), "pair")],
                     {"clipped": torch.cat([beyond[pairs.chosen], beyond[pairs.rejected]])})


@dataclass
class SPODiffusion(D3PO):
    """SPO, step-aware preference optimization: D3PO's loss on candidates that share x_t and are judged at that step (arXiv 2406.04314).

    g = log clip(pi(x_t-1 | x_t) / ref(x_t-1 | x_t), 1-epsilon, 1+epsilon)
    L = -log sigmoid(beta (g_w - g_l)), the mean over pairs of candidates whose scores differ by enough (trajectory.threshold)
    Rewards: beta log pi/ref of a transition, without the clip. Ranges: `clipped` is a share of transitions; the loss is in [0.126, 2.133]
    for beta 10 and epsilon 0.1, and its gradient is zero outside the band. When: a scorer for each step, trained here on the data's pairs.
    Limits: candidates differ in detail alone, so what a picture shows changes slowly; each step costs its candidates, foreseen and scored.
    """

    beta: float = 10.0

    paper: ClassVar = "2406.04314"


@dataclass
class GradSPO(SPODiffusion):
    """GradSPO: the noise prediction at a step is drawn towards what made its best candidate (Tee et al., NeurIPS 2025, no arXiv number).

    g = (z_best - z_worst) / 2, of the normal numbers that made best and worst candidate at x_t
    q_w = eps_avg(x_t) - grad_scale sigma_t g, q_l = eps_avg(x_t) + grad_scale sigma_t g, held constant; eps_avg draws the candidates
    l(q) = -mean (eps(x_t) - q)^2, over latent dims (`step_logp`); r(q) = log clip(exp(l(q) - l_ref(q)), 1-epsilon, 1+epsilon)
    L = -log sigmoid(beta [r(q_w) - r(q_l)]), the mean over pairs
    Inside the band the logit is -4 beta grad_scale sigma_t mean g (eps - eps_ref): eps_avg matters for the band alone. The model that draws
    is a moving average of the policy, eps_avg <- ema_decay eps_avg + (1 - ema_decay) eps after each step, in weights. Official code asks it
    anew at each step; here its prediction is kept with the round, which is the same where a round is one step.
    Rewards: beta (l - l_ref). Ranges: `clipped`, losses and gradient as spo_diffusion's. When: as spo_diffusion, with half as much noise in
    g and steps weighted by their noise alone. Limits: as spo_diffusion; of a flow nothing is learned at t = 1, where its noise is known.
    """

    grad_scale: float = 0.5
    ema_decay: float = 0.9

    paper: ClassVar = ""
    require: ClassVar = (*SPODiffusion.require, "grad_scale >= 0", "0 <= ema_decay < 1")
    golden: ClassVar = (  # D = 1, eps_avg = 0.2, grad_scale sigma g = 0.4, eps_ref = 0.1 and eps = 0.12 or 0.3
        ({"w": -0.1024, "rw": -0.09, "l": -0.2304, "rl": -0.25, "beta": 10, "epsilon": 0.1}, 0.865893),
        ({"w": -0.25, "rw": -0.09, "l": -0.09, "rl": -0.25, "beta": 10, "epsilon": 0.1}, 2.132838),
    )

    def averages(self) -> dict[str, float]:
        return {"writer": 1 - self.ema_decay}

    def pull(self) -> float:
        return self.grad_scale
