"""Objectives on groups of sampled completions, each with a reward: GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefopt.objectives.base import Batch, Groups, Objective, Term, Terms


def group_advantage(groups: Groups, dtype: torch.dtype, scale: bool) -> Tensor:
    """[S] reward less the mean of its group; divided by the group's standard deviation (n - 1) + 1e-4 if `scale`."""
    _, place, count = groups.group.unique(return_inverse=True, return_counts=True)
    reward, zero = groups.reward.to(dtype), torch.zeros(len(count), dtype=dtype, device=groups.reward.device)
    centred = reward - (zero.index_add(0, place, reward) / count)[place]
    if not scale:
        return centred
    variance = zero.index_add(0, place, centred**2) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt()[place] + 1e-4)


@dataclass
class GRPO(Objective):
    """Group Relative Policy Optimization: a clipped policy gradient whose baseline is the group's mean reward (arXiv 2402.03300).

    A = (R - mean(G)) / (std(G) + 1e-4), G the rewards of all replies to one prompt; rho_t = pi(y_t) / pi_old(y_t)
    kl_t = ref(y_t)/pi(y_t) - log(ref(y_t)/pi(y_t)) - 1, an estimate of KL(pi || ref) that is never negative
    L = -mean_t [min(rho_t A, clip(rho_t, 1-epsilon, 1+epsilon) A) - beta kl_t], mean over a reply's tokens, then over replies
    The gradient of kl_t is that of KL(ref || pi); `unbiased_kl` multiplies it by rho_t, which gives that of KL(pi || ref) (2512.02556).
    `scale_rewards=false` leaves the division out, as Dr. GRPO does (2503.20783). Log-ratios above 20 count as 20 inside exp.
    Rewards: log pi - log ref, nats. Ranges: the loss starts at 0 and says nothing, watch rollout/reward; `kl_to_reference` is at least 0
    nats per token, `clipped` a share of tokens. When: a reward that judges any reply, and time to sample.
    Limits: a group whose rewards are all equal teaches nothing; what the reward overlooks is exploited.
    """

    beta: float = 0.04
    epsilon: float = 0.2
    scale_rewards: bool = True
    unbiased_kl: bool = False

    view: ClassVar = "groups"
    quantities: ClassVar = {"policy": ("logp", "token_logp"), "reference": ("logp", "token_logp"), "previous": ("token_logp",)}
    paper: ClassVar = "2402.03300"
    require: ClassVar = ("beta >= 0", "0 < epsilon < 1")
    formula: ClassVar = {
        "policy_gradient": "-mean(min(exp(min(t-o, 20)) * A, max(min(exp(min(t-o, 20)), 1+epsilon), 1-epsilon) * A)"
        " - beta * (exp(min(t-o, 20)) if unbiased_kl else 1) * (exp(min(s-t, 20)) - (s-t) - 1)"
        " for A in [(R - mean(G)) / (std(G) + 0.0001) if scale_rewards else R - mean(G)] for t, o, s in tokens)"
    }
    golden: ClassVar = (
        ({"R": 1, "G": [1, 0], "tokens": [(-1, -1, -1)]}, -0.707007),
        ({"R": 1, "G": [1, 0], "tokens": [(-1, -1.5, -1)], "scale_rewards": False}, -0.6),
        ({"R": 0, "G": [1, 0], "tokens": [(-1, -1.5, -1), (-2, -2, -3)], "scale_rewards": False, "beta": 0.1}, 0.680574),
    )
    limits: ClassVar = (({"G": [2, 2], "R": 2, "beta": 0}, "0"), ({"tokens": [(-1, -1, -1)], "scale_rewards": False}, "mean(G) - R"))

    def __call__(self, batch: Batch) -> Terms:
        groups, token_logp = batch.groups, {name: s["token_logp"] for name, s in batch.scores.items()}
        policy, edge = token_logp["policy"], batch.token_edge
        advantage = torch.zeros(batch.lengths.shape, dtype=policy.dtype, device=policy.device)
        advantage = advantage.index_add(0, groups.edge, group_advantage(groups, policy.dtype, self.scale_rewards))[edge]
        ratio = (policy - token_logp["previous"].detach()).clamp(max=20).exp()
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        behind = token_logp["reference"].detach() - policy
        kl = behind.clamp(max=20).exp() - behind - 1
        penalty = self.beta * (ratio * kl if self.unbiased_kl else kl)
        values = _mean_per_edge(penalty - torch.minimum(ratio * advantage, clipped * advantage), batch)[groups.edge]
        metrics = {"kl_to_reference": kl, "clipped": (ratio != clipped).to(policy.dtype)}
        own = batch.tokens_of(groups.edge)
        return Terms([Term("policy_gradient", values, "completion")], {name: m.detach()[own] for name, m in metrics.items()})

    def rewards(self, batch: Batch) -> Tensor:
        return batch.log_ratio().detach()


def _mean_per_edge(values: Tensor, batch: Batch) -> Tensor:
    total = torch.zeros(batch.lengths.shape, dtype=values.dtype, device=values.device)
    return total.index_add(0, batch.token_edge, values) / batch.lengths
