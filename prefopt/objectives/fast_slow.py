"""DPO that chases a slower copy of itself: OFS-DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class FastSlowDPO(Objective):
    """OFS-DPO: DPO whose preference probability is to lead that of a slower copy of the policy by a margin (arXiv 2406.05534).

    p(h) = sigmoid(beta h); h_F, h_S as DPO's h, of the policy (fast) and of the slow copy, against the same reference
    L = -log p(h_F) + alpha (p(h_F) - p(h_S) - margin)^2, mean over pairs; no gradient reaches the slow copy
    The paper's regulariser keeps a moving gap between two LoRA modules of different speed, so that gradients do not die out as DPO's do.
    Its exact form, and how its modules change roles, we could not check: the square, the margin and the slow module as a moving
    average of the fast one (share eta after each step) are our reading. The chase pushes on where the lead is below the margin and
    holds back where it is above. At eta 1 the slow copy is the policy of one step before; at alpha 0 this is DPO. With a soft label q both
    terms are q times themselves plus 1-q times those of the swapped pair.
    Rewards: beta (log pi - log ref). Ranges: the loss starts at ln 2 + alpha margin^2; the log's `lead` is p(h_F) - p(h_S), in (-1, 1).
    When: preferences come in a stream of domains; the runs of several domains are combined with prefopt merge (COFS-DPO).
    Limits: once both probabilities are near 1 the lead cannot reach the margin, and the chase ends. The weights of a merge are yours to
    give; the paper's choice of them on a memory of past data is not built.
    """

    beta: float = 0.1
    alpha: float = 1.0
    margin: float = 0.1
    eta: float = 0.01

    quantities: ClassVar = {"policy": ("logp",), "reference": ("logp",), "slow": ("logp",)}
    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2406.05534"
    require: ClassVar = ("beta > 0", "alpha >= 0", "0 <= margin < 1", "0 < eta <= 1")
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(beta*h)) - (1-p)*log(sigmoid(-beta*h))",
        "chase": "alpha * sum(p * (lead - margin)**2 + (1-p) * (lead + margin)**2"
        " for lead in [sigmoid(beta*h) - sigmoid(beta*((sw-rw) - (sl-rl)))])",
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "sw": -11, "sl": -11.5, "beta": 0.1, "alpha": 1.0, "margin": 0.1},
         {"preference": 0.620957, "chase": 0.003915}),  # (0.537430 - 0.5 - 0.1)^2
        ({"w": -7, "l": -9, "rw": -7, "rl": -9, "sw": -7, "sl": -9, "margin": 0.5, "alpha": 2.0}, 1.193147),  # ln 2 + 2 / 4
    )  # fmt: skip
    limits: ClassVar = (({"alpha": 0, "p": 1}, "log(1 + exp(-beta*h))"),)

    def averages(self) -> dict[str, float]:
        return {"slow": self.eta}

    def __call__(self, batch: Batch) -> Terms:
        pairs, fast, slow = batch.pairs, batch.log_ratio(), batch.log_ratio("slow").detach()
        h, slow_h = fast[pairs.chosen] - fast[pairs.rejected], slow[pairs.chosen] - slow[pairs.rejected]
        lead = torch.sigmoid(self.beta * h) - torch.sigmoid(self.beta * slow_h)
        chase = pairs.label * (lead - self.margin) ** 2 + (1 - pairs.label) * (lead + self.margin) ** 2
        preference = logistic(self.beta * h, pairs.label)
        return Terms([Term("preference", preference, "pair"), Term("chase", chase, "pair", self.alpha)], {"lead": lead.detach()})
