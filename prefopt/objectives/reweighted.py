"""Pairwise objectives whose pairs weigh as much as the policy would produce them: IS-DAA and WPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class ISDAA(Objective):
    """IS-DAA: DPO or IPO with each pair weighted by how likely it still is under the policy that is trained (arXiv 2506.08681).

    W = sg[exp(min(r(yw) + r(yl), 2 eps))], r(y) = log pi(y) - log mu(y), token sums; mu: the policy that wrote the data
    L = W (-log sigmoid(beta h)) with base=dpo, W (h - 1/(2 beta))^2 with base=ipo, mean over pairs; sg: no gradient
    mu's log-probs are columns of the data (data.columns.chosen_logp, rejected_logp); the reference's are taken for rows without them.
    The mean divides by the number of pairs, not by the sum of W. The paper has both; its released script trains the IPO one. A soft
    label p mixes both orders as in DPO and IPO. Rewards: beta (log pi - log ref). Ranges: `importance_weight` is at most e^(2 eps), 7.4
    at eps 1; where mu is the reference it starts at 1, and the loss at that of its base. When: small beta and long training, where the
    policy leaves the data behind. Limits: W falls towards 0 wherever both likelihoods fall, and such a pair no longer teaches; sums make
    W noisy.
    """

    base: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.05
    eps: float = 1.0

    columns: ClassVar = ("weight", "label", "logp")
    paper: ClassVar = "2506.08681"
    require: ClassVar = ("beta > 0", "eps >= 0", "base in ('dpo', 'ipo')")
    formula: ClassVar = {
        "preference": "sg(exp(min((w-rw) + (l-rl), 2*eps))) * (-p*log(sigmoid(beta*h)) - (1-p)*log(sigmoid(-beta*h))"
        " if base == 'dpo' else p*(h - 1/(2*beta))**2 + (1-p)*(h + 1/(2*beta))**2)"
    }
    golden: ClassVar = (
        ({"w": -3, "l": -4, "rw": -4.2, "rl": -4.5, "beta": 0.5, "base": "ipo"}, 0.492655),  # 5.473947 (0.7 - 1)^2
        ({"w": -3, "l": -4, "rw": -6, "rl": -5, "beta": 0.5}, 2.314708),  # 7.389056 softplus(-1)
    )
    limits: ClassVar = (
        ({"w": -3, "rw": -3, "l": -5, "rl": -5, "base": "dpo"}, "log(2)"),
        ({"w": -3, "rw": -4, "l": -5, "rl": -4, "base": "dpo", "p": 1}, "log(1 + exp(-beta*h))"),  # the pair is as likely as it was
        ({"eps": 0, "w": 0, "l": 0, "base": "ipo", "p": 1}, "(h - 1/(2*beta))**2"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        chosen, rejected = ratio[pairs.chosen], ratio[pairs.rejected]
        h, moved = chosen - rejected, self._moved(batch)
        weight = (moved[pairs.chosen] + moved[pairs.rejected]).clamp(max=2 * self.eps).exp()
        if self.base == "dpo":
            values = logistic(self.beta * h, pairs.label)
        else:
            target = 1 / (2 * self.beta)
            values = pairs.label * (h - target) ** 2 + (1 - pairs.label) * (h + target) ** 2
        return Terms([Term("preference", weight * values, "pair")], {"importance_weight": weight})

    def _moved(self, batch: Batch) -> Tensor:
        """[E] log pi - log mu, without gradient."""
        mu = batch.logp("reference")
        if "writer" in batch.scores:
            mu = torch.where(batch.logp("writer").isnan(), mu, batch.logp("writer"))
        return (batch.logp() - mu).detach()


@dataclass
class WPO(Objective):
    """WPO: DPO with each pair weighted by the policy's own likelihood of both replies, per token (arXiv 2406.11827).

    W = sg[exp(avg(yw)) exp(avg(yl))], avg = log-prob per token under the policy that is trained
    L = W (-log sigmoid(beta h)), mean over pairs; h as in DPO; sg: no gradient; not divided by the sum of W
    This is the paper's plain weight. Its best results divide each token's probability by what the policy expects of its own
    samples (`sampled` alignment, sum over the vocabulary of p^2) or by its largest (`greedy`); both need the whole vocabulary and are
    not built. So W is a good deal below 1 everywhere: a higher learning rate makes up for it. A soft label p mixes both orders as in DPO.
    Rewards: beta (log pi - log ref), 0 at the start. Ranges: `policy_weight` in (0, 1]; the loss starts at ln 2 times its mean.
    When: pairs that another model wrote. Limits: pairs that the policy finds unlikely are nearly ignored, however informative.
    """

    beta: float = 0.01

    columns: ClassVar = ("weight", "label")
    starts_level: ClassVar = False  # likely pairs weigh more
    paper: ClassVar = "2406.11827"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": "sg(exp(w/nw + l/nl)) * (-p*log(sigmoid(beta*h)) - (1-p)*log(sigmoid(-beta*h)))"}
    golden: ClassVar = (
        ({"w": -0.693147180559945, "l": -2.77258872223978, "nl": 2, "rw": -1.69314718055995, "rl": -2.27258872223978,
          "beta": 0.1}, 0.077620),  # 1/2 1/4 softplus(-0.15)
    )  # fmt: skip
    limits: ClassVar = (({"w": 0, "l": 0, "p": 1}, "log(1 + exp(-beta*h))"), ({"w": -2, "rw": -2, "l": 0, "rl": 0}, "log(2)*exp(-2/nw)"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio, avg = batch.pairs, batch.log_ratio(), batch.avg_logp().detach()
        weight = (avg[pairs.chosen] + avg[pairs.rejected]).exp()
        values = weight * logistic(self.beta * (ratio[pairs.chosen] - ratio[pairs.rejected]), pairs.label)
        return Terms([Term("preference", values, "pair")], {"policy_weight": weight})
