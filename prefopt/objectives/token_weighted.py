"""Objectives on pairs that do not treat all tokens of a reply alike: LD-DPO, TAB-PO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class LDDPO(Objective):
    """LD-DPO: DPO in which the tokens that a reply has beyond the length of the other count less (arXiv 2409.06411).

    k = min(|yw|, |yl|) in response tokens; s(y) = sum of log pi - log ref over the first k tokens + alpha times the sum over the rest
    L = -p log sigmoid(x) - (1-p) log sigmoid(-x), x = beta (s(yw) - s(yl)) - m, mean over pairs; p, m as in DPO
    Policy and reference are cut alike, as in TRL; LLaMA-Factory leaves the reference whole, so its margin is not 0 at the start.
    Rewards: beta s(y), the mean over its pairs for a reply that stands in several. Ranges: loss starts at ln 2, rewards at 0.
    When: chosen replies are the longer ones and replies grow in training. Limits: the common length is counted in tokens, whatever
    they say; what a long reply says last hardly counts.
    """

    beta: float = 0.1
    alpha: float = 0.5

    quantities: ClassVar = {"policy": ("logp", "token_logp"), "reference": ("logp", "token_logp")}
    columns: ClassVar = ("weight", "label", "margin")
    paper: ClassVar = "2409.06411"
    require: ClassVar = ("beta > 0", "0 <= alpha <= 1")
    formula: ClassVar = {
        "preference": "sum(-p*log(sigmoid(x)) - (1-p)*log(sigmoid(-x)) for x in [beta*(alpha*h"
        " + (1-alpha)*(sum(t-s for t, s in W[:len(L)]) - sum(t-s for t, s in L[:len(W)]))) - m])"
    }
    golden: ClassVar = (
        ({"W": [(-1, 0), (-2, 0), (-3, 0), (-4, 0)], "L": [(-1.5, 0), (-2.5, 0)], "alpha": 0.5, "beta": 1.0}, 2.578890),
        ({"W": [(-1, -1.5), (-2, -1)], "L": [(-1, -2), (-2, -2), (-3, -1)], "alpha": 0.25, "beta": 1.0}, 1.313262),
    )
    limits: ClassVar = (
        ({"alpha": 1.0, "p": 1, "m": 0}, "log(1 + exp(-beta*h))"),
        ({"nw": 3, "nl": 3, "p": 1, "m": 0}, "log(1 + exp(-beta*h))"),
        ({"w": -7, "rw": -7, "l": -9, "rl": -9, "p": 1, "m": 0}, "log(2)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = self._ratios(batch)
        values = logistic(self.beta * (chosen - rejected) - batch.pairs.margin, batch.pairs.label)
        return Terms([Term("preference", values, "pair")])

    def _ratios(self, batch: Batch) -> list[Tensor]:
        """[P] s(yw) and [P] s(yl)."""
        pairs, ratio = batch.pairs, batch.log_ratio()
        common = torch.minimum(batch.lengths[pairs.chosen], batch.lengths[pairs.rejected])
        sides = []
        for edges in (pairs.chosen, pairs.rejected):
            first = batch.prefix_sum(edges, common) - batch.prefix_sum(edges, common, "reference").detach()
            sides.append(self.alpha * ratio[edges] + (1 - self.alpha) * first)
        return sides

    def rewards(self, batch: Batch) -> Tensor:
        values, whole = torch.cat(self._ratios(batch)).detach(), batch.log_ratio().detach()
        edges = torch.cat([batch.pairs.chosen, batch.pairs.rejected])
        times = torch.zeros_like(whole).index_add(0, edges, torch.ones_like(values))
        mean = torch.zeros_like(whole).index_add(0, edges, values) / times.clamp(min=1)
        return self.beta * torch.where(times > 0, mean, whole)


@dataclass
class TABPO(Objective):
    """TAB-PO: DPO, and the likelihood of those chosen tokens that the policy still finds unlikely (arXiv 2603.00025).

    g_t = 1 if pi(yw_t) < tau else 0, no gradient; h as in DPO, sums over all tokens alike (the paper's later version)
    L = -log sigmoid(beta h - m) + lambda_ (sum_t g_t (-log pi(yw_t))) / max(1, sum_t g_t), mean over pairs
    With tau 0 there is no barrier; above 1 it is the likelihood of the chosen reply, per token. The paper's first version also weighs
    tokens by their meaning (labels above JSON scaffolding); data has no column for such weights, so here every token weighs 1.
    Rewards: beta (log pi - log ref). Ranges: preference starts at ln 2; the barrier is 0, or above -log tau; `barrier_share` is the
    share of chosen tokens below tau. When: chosen and rejected differ in a few tokens that matter, as in structured output; the reference
    is the SFT model. Limits: every unlikely chosen token is held up, whether it matters or not.
    """

    beta: float = 0.1
    lambda_: float = 0.1
    tau: float = 0.5

    quantities: ClassVar = {"policy": ("logp", "token_logp"), "reference": ("logp",)}
    columns: ClassVar = ("weight", "margin")  # a soft label becomes two weighted pairs, and so the barrier acts on either side
    starts_level: ClassVar = False  # the barrier differs from row to row
    paper: ClassVar = "2603.00025"
    require: ClassVar = ("beta > 0", "lambda_ >= 0", "tau >= 0")
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*h - m))",
        "barrier": "lambda_ * sum(-t for t, s in W if exp(t) < tau) / max(1, sum(1 for t, s in W if exp(t) < tau))",
    }
    golden: ClassVar = (
        (
            {"W": [(-0.1053605, -0.1053605), (-1.6094379, -1.6094379), (-0.5108256, -0.5108256), (-2.9957323, -2.9957323)],
             "L": [(-1, -1)], "tau": 0.5, "lambda_": 1.0},
            {"preference": 0.693147, "barrier": 2.302585},
        ),
    )
    limits: ClassVar = (
        ({"lambda_": 0.0, "m": 0}, "log(1 + exp(-beta*h))"),
        ({"tau": 0.0, "m": 0}, "log(1 + exp(-beta*h))"),
        ({"tau": 1.5, "m": 0}, "log(1 + exp(-beta*h)) - lambda_*w/nw"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio, token = batch.pairs, batch.log_ratio(), batch.scores["policy"]["token_logp"]
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        gate = (token.detach().exp() < self.tau).to(token.dtype)
        per_edge = torch.zeros_like(ratio)
        missing, gated = (per_edge.index_add(0, batch.token_edge, x)[pairs.chosen] for x in (-gate * token, gate))
        barrier = missing / gated.clamp(min=1)
        return Terms(
            [Term("preference", -F.logsigmoid(self.beta * h - pairs.margin), "pair"), Term("barrier", barrier, "pair", self.lambda_)],
            {"barrier_share": gated / batch.lengths[pairs.chosen]},
        )
