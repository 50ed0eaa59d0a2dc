"""Objectives with rewards for single tokens that the reference gives under two opposite requests: T-REG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic

_LOGIT = "(beta*h - m if base == 'dpo' else beta*(w/nw - l/nl) - gamma - m)"


@dataclass
class TREG(Objective):
    """T-REG: DPO or SimPO with a token reward from the reference, asked to make the reply better and worse (arXiv 2412.02685).

    rhat_t = sigmoid(log ref(y_t | x_better) - log ref(y_t | x_worse)) - 1/2, constant; both prompts show y and ask to revise it
    L_REG(y) = -sum over tokens of beta rhat_t log pi(y_t | x)
    w = sigmoid(-z), constant, z the base's logit: beta h - m, or beta (avg(yw) - avg(yl)) - gamma - m for `base=simpo`
    L = -log sigmoid(z) + alpha w [L_REG(yw) + L_REG(yl)], mean over pairs; with a soft label p, p of this and 1 - p of the same at -z
    No code of the authors could be read: L_REG as a sum (a mean would shrink it with length, next to a base made of sums), w held constant
    (it is the gradient weight of DPO, not a loss), and the templates (prefopt/data/extra.py) are our reading.
    Rewards: beta (log pi - log ref), or beta avg. Ranges: preference starts at ln 2 (dpo); regulariser may have either sign.
    When: credit should go to tokens, without a token reward model. Limits: a weak reference tells better from worse badly, and then rhat is
    noise; four sequences more for the reference, once if they are stored.
    """

    beta: float = 0.1
    alpha: float = 0.25
    base: Literal["dpo", "simpo"] = "dpo"
    gamma: float = 1.0

    quantities: ClassVar = {"policy": ("logp", "token_logp"), "reference": ("logp", "token_logp")}
    columns: ClassVar = ("weight", "label", "margin")
    extra: ClassVar = ("chosen_if_better", "chosen_if_worse", "rejected_if_better", "rejected_if_worse")
    extra_scorers: ClassVar = ("reference",)
    starts_level: ClassVar = False  # the regulariser grows with the replies
    paper: ClassVar = "2412.02685"
    require: ClassVar = ("beta > 0", "alpha >= 0", "base in ('dpo', 'simpo')", "gamma >= 0")
    formula: ClassVar = {
        "preference": f"p*log(1 + exp(-{_LOGIT})) + (1-p)*log(1 + exp({_LOGIT}))",
        "regulariser": f"-alpha*beta*sg(p*sigmoid(-{_LOGIT}) + (1-p)*sigmoid({_LOGIT}))"
        " * (sum((sigmoid(X[0][i][1]-X[1][i][1]) - 1/2)*t for i, (t, s) in enumerate(W))"
        " + sum((sigmoid(X[2][i][1]-X[3][i][1]) - 1/2)*t for i, (t, s) in enumerate(L)))",
    }
    golden: ClassVar = (
        ({"W": [(-1, -1.2), (-0.5, -0.4)], "L": [(-2, -1.5)], "X": [[(0, -0.5), (0, -1)], [(0, -1.5), (0, -1)], [(0, -2)], [(0, -1)]],
          "beta": 1.0, "alpha": 0.5, "base": "dpo"}, {"preference": 0.437488, "regulariser": -0.040937}),
    )  # fmt: skip
    limits: ClassVar = (
        ({"alpha": 0, "base": "dpo", "p": 1, "m": 0}, "log(1 + exp(-beta*h))"),
        ({"alpha": 0, "base": "simpo", "p": 1, "m": 0}, "log(1 + exp(gamma - beta*(w/nw - l/nl)))"),
        ({"nw": 1, "nl": 1, "X": [[(0, -1)], [(0, -1)], [(0, -2)], [(0, -2)]], "base": "dpo", "p": 1, "m": 0}, "log(1 + exp(-beta*h))"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, score = batch.pairs, self._score(batch)
        z = self.beta * (score[pairs.chosen] - score[pairs.rejected]) - (self.gamma if self.base == "simpo" else 0) - pairs.margin
        weight = (pairs.label * torch.sigmoid(-z) + (1 - pairs.label) * torch.sigmoid(z)).detach()
        regulariser = weight * (token_rewarded(batch, pairs.chosen, 0) + token_rewarded(batch, pairs.rejected, 2))
        return Terms([Term("preference", logistic(z, pairs.label), "pair"),
                      Term("regulariser", -self.beta * regulariser, "pair", self.alpha)])  # fmt: skip

    def _score(self, batch: Batch) -> Tensor:
        return batch.log_ratio() if self.base == "dpo" else batch.avg_logp()

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * self._score(batch).detach()


def token_rewarded(batch: Batch, edges: Tensor, first: int) -> Tensor:
    """[P] sum over the tokens of `edges` of rhat_t log pi(y_t); extra sequences `first` and the one after it hold y under both requests."""
    counts, reference = batch.lengths[edges], batch.scores["reference"]["token_logp"].detach()
    own, which = batch.token_places(edges, counts)
    better, worse = (reference[batch.token_places(batch.pairs.extra[:, first + i], counts)[0]] for i in (0, 1))
    values = (torch.sigmoid(better - worse) - 0.5) * batch.scores["policy"]["token_logp"][own]
    return values.new_zeros(edges.shape).index_add(0, which, values)
