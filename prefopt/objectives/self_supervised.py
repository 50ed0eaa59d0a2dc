"""Objectives that learn from what was done to a reply: SPO, which tells how much of it was taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prefopt.objectives.base import About, Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic

DEGREES = 3  # a whole reply, one without a third of its key phrases, one without two thirds


class DegreeHeads(nn.Module):
    """[E, 2, 3] logits of the degrees of degradation, from the mean of an edge's hidden states, by the head of chosen and that of rejected
    replies."""

    def __init__(self, about: About):
        super().__init__()
        wide = about.hidden
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, DEGREES)) for _ in range(2))

    def forward(self, layout: Batch, hidden: Tensor, layers: Tensor | None) -> dict[str, Tensor]:
        pooled = layout.edge_sum(hidden) / layout.lengths.clamp(min=1)[:, None]
        return {"degree_logits": torch.stack([head(pooled) for head in self.heads], 1)}


@dataclass
class SelfSupervisedPO(Objective):
    """SPO: DPO, and the policy must tell how much of a reply's content was removed (arXiv 2409.17791).

    y^0 = y, y^1, y^2: the reply without a third and without two thirds of its key phrases; z(y) = MLP(mean of pi's last hidden states over
    the places that predict the tokens of y), [3], a head for chosen and one for rejected replies, left behind after training
    L = -p log sigmoid(x) - (1-p) log sigmoid(-x) + gamma mean_{y in yw, yl; k} (log sum_j exp z_j(y^k) - z_k(y^k)), mean over pairs;
    x = beta h - m, h, p and m as in DPO. Gradients of the second term reach the policy and the heads; gamma 0 is DPO.
    No code was released, and the number of degrees, gamma, key phrases and the two heads are a reading of the paper's text. Rewards:
    beta (log pi - log ref). Ranges: preference starts at ln 2, degree near ln 3; degree_accuracy is 1/3 by chance.
    When: summaries and other replies that are as good as what they contain. Limits: length gives a degree away; what is learnt about it
    need not be about quality.
    """

    beta: float = 0.1
    gamma: float = 0.1

    quantities: ClassVar = {"policy": ("logp", "degree_logits"), "reference": ("logp",)}
    columns: ClassVar = ("weight", "label", "margin")
    extra: ClassVar = ("chosen_degraded_1", "chosen_degraded_2", "rejected_degraded_1", "rejected_degraded_2")
    extra_scorers: ClassVar = ("policy",)
    starts_level: ClassVar = False  # the degrees are guessed from each reply
    paper: ClassVar = "2409.17791"
    require: ClassVar = ("beta > 0", "gamma >= 0")
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(beta*h - m)) - (1-p)*log(sigmoid(m - beta*h))",
        "degree": "gamma * mean([log(sum(exp(z) for z in Z)) - Z[k] for side in (ZW, ZL) for k, Z in enumerate(side)])",
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "gamma": 1.0, "ZW": [(0, 0, 0)] * 3, "ZL": [(5, 5, 5)] * 3},
         {"preference": 0.620957, "degree": 1.098612}),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9, "gamma": 0.5, "ZW": [(2, 0, 0), (0, 2, 0), (0, 0, 2)], "ZL": [(1, 1, 1)] * 3},
         {"preference": 0.693147, "degree": 0.334539}),
    )  # fmt: skip
    limits: ClassVar = (({"gamma": 0.0, "p": 1, "m": 0}, "log(1 + exp(-beta*h))"),)

    def build(self, about: About) -> nn.Module:
        return DegreeHeads(about)

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        logits = batch.scores["policy"]["degree_logits"].log_softmax(-1)
        versions = torch.cat([pairs.chosen[:, None], pairs.extra[:, :2], pairs.rejected[:, None], pairs.extra[:, 2:]], 1)  # [P, 6]
        places = torch.arange(2 * DEGREES, device=versions.device)
        head, degree = places // DEGREES, places % DEGREES
        found = logits[versions, head]  # [P, 6, 3]
        missed = -found.gather(2, degree.expand_as(versions)[..., None]).squeeze(2).mean(1)
        right = (found.argmax(-1) == degree).to(ratio.dtype).mean(1)
        preference = logistic(self.beta * h - pairs.margin, pairs.label)
        return Terms([Term("preference", preference, "pair"), Term("degree", missed, "pair", self.gamma)], {"degree_accuracy": right})
