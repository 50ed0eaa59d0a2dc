"""Token masks in DPO's logit: SparsePO, whose masks are learned, and MaPO, whose mask is read off the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.objectives.base import About, Batch, Objective, Term, Terms


class LearnedMask(nn.Module):
    """[N] m = Dropout(ReLU(sum_l a_l Dropout(ReLU(v_l . LayerNorm(h_l) + b_l)))), h_l [N, d] the hidden states of layer l.

    v, b and a are drawn as those of linear layers; a at its absolute value, because a mask whose a are all negative is 0 for good.
    """

    def __init__(self, about: About, dropout: float):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(about.hidden), nn.Dropout(dropout)
        wide, deep = about.hidden**-0.5, about.layers**-0.5
        self.weight = nn.Parameter(torch.empty(about.layers, about.hidden).uniform_(-wide, wide))
        self.bias = nn.Parameter(torch.empty(about.layers).uniform_(-wide, wide))
        self.mixer = nn.Parameter(torch.empty(about.layers).uniform_(0, deep))

    def forward(self, layers: Tensor) -> Tensor:
        found = torch.einsum("nld,ld->nl", self.norm(layers), self.weight) + self.bias
        return self.drop(F.relu(self.drop(F.relu(found)) @ self.mixer))


class LearnedMasks(nn.Module):
    """The mask of the rewards and that of the KLs: one `common` to both, or two."""

    def __init__(self, about: About, common: bool, dropout: float, weight_decay: float):
        super().__init__()
        self.weight_decay = weight_decay
        self.masks = nn.ModuleList(LearnedMask(about, dropout) for _ in range(1 if common else 2))

    def forward(self, layout: Batch, hidden: Tensor, layers: Tensor) -> dict[str, Tensor]:
        made = [mask(layers) for mask in self.masks]
        return {"mask_reward": made[0], "mask_kl": made[-1]}


class ActivationMask(nn.Module):
    """One mask without weights: the mean over a layer's units, brought to [0, 1] within each reply, and then the mean over layers."""

    def forward(self, layout: Batch, hidden: Tensor, layers: Tensor) -> dict[str, Tensor]:
        mean = layers.detach().mean(-1)  # [N, L]
        of = layout.token_edge[:, None].expand_as(mean)
        low, high = (mean.new_full((len(layout.lengths), mean.shape[1]), -way * math.inf).scatter_reduce(0, of, mean, name).gather(0, of)
                     for name, way in (("amin", -1), ("amax", 1)))
        same = high <= low  # a reply of one token, say: there is nothing to choose between
        mask = torch.where(same, 1, (mean - low) / torch.where(same, 1, high - low)).mean(-1)
        return {"mask_reward": mask, "mask_kl": mask}


@dataclass
class SparsePO(Objective):
    """SparsePO: DPO that learns which tokens' log-ratios and which tokens' divergences count (arXiv 2410.05102).

    U(y) = sum_t u_t (log pi - log ref)(y_t), D(y) = sum_t d_t KL_t, KL_t = KL(ref || pi) over the vocabulary at token t, nats
    L = -log sigmoid(beta ([U(yw) - U(yl)] - [D(yl) - D(yw)])) + l1_u (|u(yw)| + |u(yl)|) + l1_d (|d(yw)| + |d(yl)|), mean over pairs;
    |.| sums over tokens; nothing is held constant but the reference. Masks of 1 make it TDPO1, and without d it is DPO.
    `learned`: ReLU heads on the hidden states of all layers of the reference, left behind after training. `common`: u = d, and the L1
    weights are halved. `activations` (MaPO): no head; u = d is the mean activation of each layer, brought to [0, 1] within the reply (which
    undoes the z-score before it) and averaged over the layers' outputs; the code also reads states within layers. A reply of equal
    activations gets 1. Rewards: beta (U + D), whose margin is the logit (the code logs U - D). Ranges: preference starts at ln 2;
    `mask_zeros` is a share of tokens. When: few tokens of a reply carry what is preferred, as in sentiment or code.
    Limits: L1 can drive a mask to 0 everywhere, and then nothing is learnt any more (watch mask_zeros); without it, where
    pairs are easy, a mask may grow in place of the policy.
    """

    beta: float = 0.1
    mask: Literal["learned", "activations"] = "learned"
    common: bool = True
    l1_u: float = 0.001
    l1_d: float = 0.001
    dropout: float = 0.0
    weight_decay: float = 0.01

    quantities: ClassVar = {
        "policy": ("logp", "token_logp", "divergence", "mask_reward", "mask_kl"), "reference": ("logp", "token_logp", "layers"),
    }  # fmt: skip
    starts_level: ClassVar = False  # the L1 terms grow with the replies
    paper: ClassVar = "2410.05102"
    require: ClassVar = ("beta > 0", "mask in ('learned', 'activations')", "l1_u >= 0", "l1_d >= 0", "0 <= dropout < 1",
                         "weight_decay >= 0")  # fmt: skip
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*(sum(u*(t-s) + d*k for (t, s), k, (u, d) in zip(W, DW, MW))"
        " - sum(u*(t-s) + d*k for (t, s), k, (u, d) in zip(L, DL, ML)))))",
        "sparsity": "sum(l1_u*abs(u) + l1_d*abs(d) for u, d in [*MW, *ML]) / (2 if common else 1)",
    }
    golden: ClassVar = (
        ({"W": [(-1, -1.5), (-2, -1)], "L": [(-1, -2)], "DW": [0.2, 0.1], "DL": [0.4], "MW": [(1, 0.5), (0, 1)], "ML": [(0.5, 0.25)],
          "beta": 1.0, "l1_u": 0.1, "l1_d": 0.2, "common": False}, {"preference": 0.644397, "sparsity": 0.5}),
        ({"W": [(-1, -1.5), (-2, -1)], "L": [(-1, -2)], "DW": [0.2, 0.1], "DL": [0.4], "MW": [(1, 1), (1, 1)], "ML": [(1, 1)],
          "beta": 0.5, "l1_u": 0.1, "l1_d": 0.2, "common": True}, {"preference": 1.171101, "sparsity": 0.45}),
    )  # fmt: skip
    limits: ClassVar = (
        ({"W": [(-1, -2)], "L": [(-1, -1)], "DW": [0.5], "DL": [0.25], "MW": [(3, 3)], "ML": [(3, 3)], "l1_u": 0.0, "l1_d": 0.0},
         "log(1 + exp(-3*beta*1.25))"),
    )  # fmt: skip

    def build(self, about: About) -> nn.Module:
        return LearnedMasks(about, self.common, self.dropout, self.weight_decay) if self.mask == "learned" else ActivationMask()

    def __call__(self, batch: Batch) -> Terms:
        pairs, policy, share = batch.pairs, batch.scores["policy"], 0.5 if self.common else 1.0
        u, d, reward = policy["mask_reward"], policy["mask_kl"], self.beta * masked(batch)
        size = share * batch.edge_sum(self.l1_u * u.abs() + self.l1_d * d.abs())
        preference = -F.logsigmoid(reward[pairs.chosen] - reward[pairs.rejected])
        zeros = {f"mask_zeros/{name}": (m == 0).to(u.dtype) for name, m in (("reward", u.detach()), ("kl", d.detach()))}
        return Terms([Term("preference", preference, "pair"), Term("sparsity", size[pairs.chosen] + size[pairs.rejected], "pair")], zeros)

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * masked(batch).detach()


def masked(batch: Batch) -> Tensor:
    """[E] U + D: log-ratios and divergences of each edge's tokens, by their masks."""
    policy = batch.scores["policy"]
    ratio = policy["token_logp"] - batch.scores["reference"]["token_logp"].detach()
    return batch.edge_sum(policy["mask_reward"] * ratio + policy["mask_kl"] * policy["divergence"])
