"""Objectives that judge replies one by one (ASFT, BCO), or all chosen ones against all rejected ones (AOT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms, Unary, double
from prefopt.objectives.reference_free import log1mexp


@dataclass
class ASFT(Objective):
    """Aligned Supervised Fine-Tuning: raises the odds of each chosen reply and lowers those of each rejected one (arXiv 2409.10571).

    p(y) = exp(avg(y)), avg = log-prob per response token; o(y) = log(p(y) / (1 - p(y)))
    L = -avg(yw) - lambda_ (log sigmoid(o(yw)) + log sigmoid(-o(yl))), mean over pairs
    As sigmoid(o(y)) is p(y), this is -(1 + lambda_) avg(yw) - lambda_ log(1 - p(yl)), the form that is computed. No reply is compared
    with its partner. Not to be confused with Anchored SFT, which shares the name. Rewards: o(y). Ranges: loss >= 0, rewards any number.
    When: to align a base model in one stage, without a reference, as ORPO does. Limits: it needs a likelihood below one, so it is refused
    on diffusion models; rejected replies that are unlikely already still weigh on the loss, with a gradient near 0.
    """

    lambda_: float = 0.1

    quantities: ClassVar = {"policy": ("logp",)}
    proper_likelihood: ClassVar = True
    paper: ClassVar = "2409.10571"
    require: ClassVar = ("lambda_ >= 0",)
    formula: ClassVar = {"nll": "-w/nw", "alignment": "lambda_ * (-w/nw - log(-expm1(l/nl)))"}
    golden: ClassVar = (({"w": -1.0, "l": -1.2, "nw": 1, "nl": 1, "lambda_": 1.0}, {"nll": 1.0, "alignment": 1.358382}),)
    limits: ClassVar = (({"lambda_": 0.0}, "-w/nw"), ({"l": -1e4}, "-(1 + lambda_) * w/nw"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, avg = batch.pairs, batch.avg_logp()
        alignment = -avg[pairs.chosen] - log1mexp(avg[pairs.rejected])
        return Terms([Term("nll", -avg[pairs.chosen], "pair"), Term("alignment", alignment, "pair", self.lambda_)])

    def rewards(self, batch: Batch) -> Tensor:
        avg = batch.avg_logp().detach()
        return avg - log1mexp(avg)


def class_midpoint(values: Tensor, unary: Unary) -> Tensor:
    """Middle between the mean of `values` [U] over desirable completions and that over undesirable ones, rows weighted as in the loss.

    Where a class is missing, the mean of the other; 0 where both are.
    """
    means, found = [], []
    for which in (unary.desirable, ~unary.desirable):
        weight = unary.weight.to(values.dtype) * which
        total = weight.sum()
        found.append(total > 0)
        means.append((weight * values).sum() / torch.where(total > 0, total, 1))  # a missing class has a sum of 0
    return sum(means) / sum(found).clamp(min=1)


@dataclass
class BCO(Objective):
    """Binary Classifier Optimization: a classifier of good and bad replies whose logit is DPO's reward (arXiv 2404.04656).

    r(y) = beta (log pi(y) - log ref(y)), sums, nats; delta = (mean of r over desirable + mean of r over undesirable) / 2, no gradient
    L = -log sigmoid(r - delta) if desirable, else -log sigmoid(delta - r), mean over completions
    On the two replies of a pair the sum of both is never below DPO's loss. delta is taken over the global batch, as the paper's
    expectations are; TRL's BCO trainer keeps a mean over all steps so far, and its `bco_pair` loss has no delta. The paper's density
    ratio between prompts of good and of bad replies (TRL's prompt_sample_size, min_ and max_density_ratio, embedding_func) is the data
    transform transforms=density_ratio, which writes row weights; they count in delta too, and divide by their sum.
    Rewards: r. Ranges: loss starts at ln 2. When: thumbs-up and thumbs-down of different prompts, no pairs. Limits: with small batches
    delta is noisy; in a batch of one class it is that class's mean.
    """

    beta: float = 0.01

    view: ClassVar = "unary"
    coupling: ClassVar = "global"
    paper: ClassVar = "2404.04656"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": "-log(sigmoid((1 if d else -1) * beta * (y - r - sg(mid))))"}
    golden: ClassVar = (
        ({"y": -10, "r": -11, "mid": 0.25, "d": 1, "beta": 1.0}, 0.386871),
        ({"y": -11.5, "r": -11, "mid": 0.25, "d": 0, "beta": 1.0}, 0.386871),
    )
    limits: ClassVar = (
        ({"y": -3, "r": -3, "mid": 0, "d": 1}, "log(2)"),
        ({"y": -3, "r": -4, "mid": 1, "d": 0}, "log(2)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        unary, ratio = batch.unary, batch.log_ratio()[batch.unary.edge]
        mid = class_midpoint(ratio.detach(), unary)
        logit = self.beta * torch.where(unary.desirable, ratio - mid, mid - ratio)
        return Terms([Term("preference", -F.logsigmoid(logit), "completion")], {"delta": self.beta * mid})


def quantile_coupling(left: Tensor, right: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matches two samples of P numbers in sorted order: `left[i]` with `right[j]` by a `share` of i's weight, all three [2P].

    Both are weighted by `weight` [P]: the optimal transport of two weighted samples on a line. The shares of each i add up to 1; with equal
    weights the k-th smallest meet, and every other share is 0.
    """
    orders = [values.sort(stable=True).indices for values in (left, right)]
    ends = [double(weight)[order].cumsum(0) for order in orders]
    cuts = torch.cat(ends).sort().values  # between two of them, one number of each side is concerned
    starts = torch.cat([cuts.new_zeros(1), cuts])[:-1]
    i, j = (
        order[torch.searchsorted(end, (starts + cuts) / 2).clamp(max=len(end) - 1)] for order, end in zip(orders, ends, strict=True)
    )
    mass = cuts - starts
    whole = torch.zeros_like(ends[0]).index_add(0, i, mass)
    return i, j, (mass / whole[i].clamp(min=1e-30)).to(left.dtype)


@dataclass
class AOT(Objective):
    """Alignment via Optimal Transport: chosen replies' rewards dominate rejected ones', quantile by quantile (arXiv 2406.05882).

    u_i, v_i = log pi(yw_i) - log pi(yl_i), log ref(yw_i) - log ref(yl_i), if paired
    u_i, v_i = log pi(yw_i) - log ref(yw_i), log pi(yl_i) - log ref(yl_i), if not
    L = -log sigmoid(beta (u_(k) - v_(k))), mean over ranks k; u_(k) and v_(k) are the k-th smallest of the global batch
    Rows of unequal weight are matched by their quantiles. TRL sorts within a micro-batch (`aot` is paired, `aot_unpaired` is not); here
    the batch is the whole step, however it is split. The paper's other convex costs (hinge, squares) are not here. With one pair it is DPO.
    Rewards: beta (log pi - log ref). Ranges: loss starts at ln 2. When: the partners of a pair matter less than that good replies rank
    above bad ones throughout. Limits: a step of few pairs has few quantiles.
    """

    beta: float = 0.1
    paired: bool = True

    coupling: ClassVar = "global"
    paper: ClassVar = "2406.05882"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": "sum(-c*log(sigmoid(beta*g)) for c, g in Q)"}
    golden: ClassVar = (({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1}, 0.620957),)
    limits: ClassVar = (({"beta": 0.5}, "log(1 + exp(-beta*h))"),)

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = batch.pairs.chosen, batch.pairs.rejected
        policy, reference = batch.logp(), batch.logp("reference").detach()
        if self.paired:
            u, v = policy[chosen] - policy[rejected], reference[chosen] - reference[rejected]
        else:
            u, v = policy[chosen] - reference[chosen], policy[rejected] - reference[rejected]
        i, j, share = quantile_coupling(u.detach(), v.detach(), batch.pairs.weight)
        values = torch.zeros_like(u).index_add(0, i, share * -F.logsigmoid(self.beta * (u[i] - v[j])))
        return Terms([Term("preference", values, "pair")])
