"""DPO with the data's margin: F-DPO, where it is a gap in factuality, and MADPO, where it is that of a reward model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms


@dataclass
class FactualityDPO(Objective):
    """F-DPO: DPO in which a factual reply has to beat a hallucinated one by an extra margin (arXiv 2601.03027).

    L = -log sigmoid(beta (h - lambda_ m)), mean over pairs; h as in DPO, nats; m = h_l - h_w in {0, 1}, where h_w and h_l are 1 for a
    hallucinated chosen and rejected reply: the data's margin, which the transform `factuality` makes after it has exchanged pairs whose
    chosen reply alone is hallucinated. So m is 0 (plain DPO) or 1, and the target is beta lambda_ in the logit: the margin is subtracted
    before beta multiplies, as in the official code. That code's README words m as a penalty on less factual winners; after the exchange
    there are none. Rewards: beta (log pi - log ref), 0 at the start, without the margin.
    Ranges: the loss starts at the mean of log(1 + exp(beta lambda_ m)), ln 2 where m = 0.
    When: pairs with a factuality label for both replies. Limits: a judge's labels are its opinion; held-out pairs keep m = 0.
    """

    beta: float = 0.1
    lambda_: float = 10.0

    columns: ClassVar = ("weight", "margin")
    paper: ClassVar = "2601.03027"
    require: ClassVar = ("beta > 0", "lambda_ >= 0")
    formula: ClassVar = {"preference": "log(1 + exp(-beta*(h - lambda_*m)))"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "m": 1, "lambda_": 10}, 1.205865),  # softplus(0.85)
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "m": 0, "lambda_": 10}, 0.620957),  # DPO's own
    )
    limits: ClassVar = (({"lambda_": 0}, "-log(sigmoid(beta*h))"), ({"m": 0}, "-log(sigmoid(beta*h))"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        return Terms([Term("preference", F.softplus(-self.beta * (h - self.lambda_ * pairs.margin)), "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * batch.log_ratio().detach()


@dataclass
class MADPO(Objective):
    """MADPO: DPO with each pair weighted by a smooth function of a reward model's margin on it (arXiv 2510.05342).

    g = r(yw) - r(yl) under a frozen reward model, in Bradley-Terry nats, negative where it disagrees: the data's margin
    c(|g|) = c_min + (c_max - c_min) / (1 + (c_max - 1)/(1 - c_min) exp(lambda_ (|g| - tau))), falling, c(tau) = 1
    w = sigmoid(c(|g|) g) / sigmoid(g) where g > -tau, else 1, a constant for the gradient
    L = w (-log sigmoid(beta h)), mean over pairs; h as in DPO
    The mean divides by the number of pairs, not by the sum of w. The paper's text has only amplifying and damping; this form is the
    official notebook's. Pairs with a small margin count as if it were wider, those beyond tau as if it were narrower.
    Rewards: beta (log pi - log ref), 0 at the start. Ranges: `margin_weight` near 1, 0.45 at g = -1, at most 1.21 at c_max 2;
    the loss starts at ln 2 times its mean. On held-out pairs too, as the transforms `score` and `margin` give them g.
    When: labels of mixed quality, and a reward model trained on them. Limits: it is no better than that model.
    """

    beta: float = 0.1
    c_max: float = 2.0
    c_min: float = 0.5
    lambda_: float = 1.0
    tau: float = 6.906755

    columns: ClassVar = ("weight", "margin")
    paper: ClassVar = "2510.05342"
    require: ClassVar = ("beta > 0", "c_max >= 1", "0 < c_min <= 1", "lambda_ > 0", "tau > 0")
    formula: ClassVar = {
        "preference": "(sigmoid(m*(c_min + (c_max - c_min)/(1 + (c_max - 1)/(1 - c_min)*exp(lambda_*(abs(m) - tau))))) / sigmoid(m)"
        " if m > -tau and c_max > 1 and c_min < 1 else 1) * log(1 + exp(-beta*h))"
    }
    golden: ClassVar = (
        ({"w": 0, "l": 0, "m": 1}, 0.834310),  # 1.203655 ln 2
        ({"w": 0, "l": 0, "m": -1}, 0.309427),  # 0.446409 ln 2
        ({"w": 0, "l": 0, "m": 10}, 0.689846),  # 0.995237 ln 2
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "m": 6.906755}, 0.620957),  # weight 1
    )
    limits: ClassVar = (({"c_max": 1}, "-log(sigmoid(beta*h))"), ({"c_min": 1}, "-log(sigmoid(beta*h))"),
                        ({"m": -1e4}, "-log(sigmoid(beta*h))"))  # fmt: skip

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio, weight = batch.pairs, batch.log_ratio(), self.weight(batch.pairs.margin.detach())
        values = weight * F.softplus(-self.beta * (ratio[pairs.chosen] - ratio[pairs.rejected]))
        return Terms([Term("preference", values, "pair")], {"margin_weight": weight})

    def weight(self, g: Tensor) -> Tensor:
        if self.c_max == 1 or self.c_min == 1:  # c is 1 everywhere; with both the quotient would be 0/0
            return torch.ones_like(g)
        shape = math.log((self.c_max - 1) / (1 - self.c_min))
        c = self.c_min + (self.c_max - self.c_min) * torch.sigmoid(-(shape + self.lambda_ * (g.abs() - self.tau)))
        return torch.where(g > -self.tau, (F.logsigmoid(c * g) - F.logsigmoid(g)).exp(), 1.0)

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * batch.log_ratio().detach()
