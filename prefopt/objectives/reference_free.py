"""Objectives on pairs that need no reference: SimPO, CPO, ORPO, SLiC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class SimPO(Objective):
    """SimPO: the average log-prob per token is the reward, and the chosen reply must win by a margin (arXiv 2405.14734).

    L = -log sigmoid(beta (avg(yw) - avg(yl)) - gamma), mean over pairs; avg = log-prob per response token, end of turn included
    `gamma` is the paper's symbol: the official code's gamma_beta_ratio is gamma / beta. A data margin is added to gamma.
    Options of the official code: label smoothing e, (1-e) on this term and e on its mirror image; `link=hinge`, max(0, 1 - logit) in place
    of -log sigmoid(logit); its sft_weight is a part beside it: algo=mpo "algo.parts=[{algo: simpo}, {algo: sft, weight: SFT_WEIGHT}]".
    Rewards: beta avg(y), always negative. Ranges: loss is log(1 + e^gamma) where both replies are as likely per token, 1 + gamma with the
    hinge. When: no memory for a reference, and length should not decide. Limits: the likelihood of both replies may fall freely; nothing
    ties the policy to where it started.
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    link: Literal["logistic", "hinge"] = "logistic"

    quantities: ClassVar = {"policy": ("logp",)}
    columns: ClassVar = ("weight", "label", "margin")
    paper: ClassVar = "2405.14734"
    require: ClassVar = ("beta > 0", "gamma >= 0", "0 <= label_smoothing < 0.5", "link in ('logistic', 'hinge')")
    formula: ClassVar = {
        "preference": "(p*(1-label_smoothing) + (1-p)*label_smoothing) * (max(0, 1 + gamma + m - beta*(w/nw - l/nl)) if link == 'hinge'"
        " else log(1 + exp(gamma + m - beta*(w/nw - l/nl)))) + (p*label_smoothing + (1-p)*(1-label_smoothing))"
        " * (max(0, 1 - gamma - m + beta*(w/nw - l/nl)) if link == 'hinge' else log(1 + exp(beta*(w/nw - l/nl) - gamma - m)))"
    }
    golden: ClassVar = (
        ({"w": -1.0, "l": -1.2, "nw": 1, "nl": 1, "beta": 2.0, "gamma": 1.0, "link": "logistic"}, 1.037488),
        ({"w": -1.0, "l": -1.2, "nw": 1, "nl": 1, "beta": 2.0, "gamma": 1.0, "link": "hinge"}, 1.6),
        ({"w": -2.0, "l": -6.0, "nw": 2, "nl": 2, "beta": 2.0, "gamma": 1.0, "link": "hinge"}, 0.0),
    )
    limits: ClassVar = (
        ({"nw": 1, "nl": 1, "gamma": 0, "label_smoothing": 0, "p": 1, "m": 0, "link": "logistic"}, "log(1 + exp(-beta*(w-l)))"),
        ({"nw": 1, "nl": 1, "gamma": 0, "label_smoothing": 0, "p": 1, "m": 0, "link": "hinge"}, "max(0, 1 - beta*(w-l))"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, avg = batch.pairs, batch.avg_logp()
        logit = self.beta * (avg[pairs.chosen] - avg[pairs.rejected]) - self.gamma - pairs.margin
        label = pairs.label * (1 - self.label_smoothing) + (1 - pairs.label) * self.label_smoothing
        if self.link == "hinge":
            return Terms([Term("preference", label * F.relu(1 - logit) + (1 - label) * F.relu(1 + logit), "pair")])
        return Terms([Term("preference", logistic(logit, label), "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * batch.avg_logp().detach()


@dataclass
class CPO(Objective):
    """Contrastive Preference Optimization: DPO with a uniform reference, plus the likelihood of the chosen (arXiv 2401.08417).

    L = -log sigmoid(beta (log pi(yw) - log pi(yl))) - alpha log pi(yw), token sums, mean over pairs
    The authors' code takes the second term as a mean over all chosen tokens of the batch: `nll_token_mean=true`.
    Rewards: beta log pi(y), never positive. Ranges: the first term is ln 2 where both replies are equally likely, the second the
    negative log-likelihood of whole replies, often hundreds of nats. When: chosen replies deserve to be imitated, as in translation.
    Limits: token sums favour short replies; nothing but the second term ties the policy to where it started.
    """

    beta: float = 0.1
    alpha: float = 1.0
    nll_token_mean: bool = False

    quantities: ClassVar = {"policy": ("logp", "token_logp")}
    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2401.08417"
    require: ClassVar = ("beta > 0", "alpha >= 0")
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(beta*(w-l))) - (1-p)*log(sigmoid(beta*(l-w)))",
        "nll": "-alpha*t if nll_token_mean else -alpha*w",
    }
    golden: ClassVar = (({"w": -2.0, "l": -4.0, "beta": 0.5, "alpha": 0.0}, 0.313262),)
    limits: ClassVar = (({"alpha": 0, "p": 1}, "log(1 + exp(-beta*(w-l)))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, logp = batch.pairs, batch.logp()
        preference = logistic(self.beta * (logp[pairs.chosen] - logp[pairs.rejected]), pairs.label)
        if self.nll_token_mean:
            chosen = batch.tokens_of(pairs.chosen)
            nll = Term("nll", -batch.scores["policy"]["token_logp"][chosen], "token", self.alpha)
        else:
            nll = Term("nll", -logp[pairs.chosen], "pair", self.alpha)
        return Terms([Term("preference", preference, "pair"), nll])

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * batch.logp().detach()


@dataclass
class ORPO(Objective):
    """ORPO: supervised fine-tuning with a penalty on the odds of the rejected reply (arXiv 2403.07691).

    P(y) = exp(avg(y)), avg = log-prob per response token; odds(y) = P / (1 - P)
    L = -avg(yw) - lambda_ log sigmoid(log odds(yw) - log odds(yl)), mean over pairs
    The paper's likelihood term is a mean over each reply's tokens; TRL's is a mean over the batch's tokens, prompts included.
    Rewards: lambda_ avg(y), never positive. Ranges: the first term is the chosen reply's negative log-likelihood per token, the second
    lambda_ ln 2 where both replies are as likely per token. When: to align a base model in one stage, without a reference.
    Limits: it needs a likelihood below one, so it is refused on diffusion models; with a small lambda_ it is little more than imitation.
    """

    lambda_: float = 0.1

    quantities: ClassVar = {"policy": ("logp",)}
    proper_likelihood: ClassVar = True
    paper: ClassVar = "2403.07691"
    require: ClassVar = ("lambda_ >= 0",)
    formula: ClassVar = {
        "nll": "-w/nw",
        "odds_ratio": "lambda_ * log(1 + exp((l/nl - log(-expm1(l/nl))) - (w/nw - log(-expm1(w/nw)))))",
    }
    golden: ClassVar = (
        ({"w": -0.5, "l": -1.0, "nw": 1, "nl": 1, "lambda_": 1.0}, {"nll": 0.5, "odds_ratio": 0.320300}),
    )
    limits: ClassVar = (({"lambda_": 0}, "-w/nw"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, avg = batch.pairs, batch.avg_logp()
        log_odds = avg - log1mexp(avg)
        ratio = log_odds[pairs.chosen] - log_odds[pairs.rejected]
        return Terms(
            [Term("nll", -avg[pairs.chosen], "pair"), Term("odds_ratio", -F.logsigmoid(ratio), "pair", self.lambda_)]
        )

    def rewards(self, batch: Batch) -> Tensor:
        return self.lambda_ * batch.avg_logp().detach()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, finite and differentiable up to x = 0 (clamped one ulp-sized step below)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    # Each branch is accurate on its side; the inner clamps keep the unused branch's gradient finite.
    near = torch.log(-torch.expm1(x.clamp(min=-0.7)))
    far = torch.log1p(-torch.exp(x.clamp(max=-0.6)))
    return torch.where(x > -0.693147, near, far)


@dataclass
class SLiC(Objective):
    """SLiC-HF: a hinge on sequence log-probs with a likelihood regulariser (arXiv 2305.10425).

    L = max(0, delta - log pi(yw) + log pi(yl)) - lambda_ log pi(yw), token sums, mean over pairs
    The regulariser's target is the chosen reply (the paper also allows the SFT target). Rewards: log pi(y), never positive.
    Ranges: the hinge is delta where both replies are equally likely, and 0 from a margin of delta nats on. When: clean pairs, a bounded
    margin, and no reference at hand. Limits: token sums favour short replies; only the regulariser ties the policy to its start.
    """

    delta: float = 1.0
    lambda_: float = 0.1

    quantities: ClassVar = {"policy": ("logp",)}
    paper: ClassVar = "2305.10425"
    require: ClassVar = ("delta > 0", "lambda_ >= 0")
    formula: ClassVar = {"hinge": "max(0, delta - w + l)", "nll": "-lambda_*w"}
    golden: ClassVar = (
        ({"w": -2.0, "l": -2.5, "delta": 1.0, "lambda_": 0.1}, {"hinge": 0.5, "nll": 0.2}),
        ({"w": -2.0, "l": -9.0, "delta": 1.0, "lambda_": 0.0}, 0.0),
    )
    limits: ClassVar = (({"lambda_": 0, "l": -60}, "0"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, logp = batch.pairs, batch.logp()
        hinge = F.relu(self.delta - logp[pairs.chosen] + logp[pairs.rejected])
        return Terms([Term("hinge", hinge, "pair"), Term("nll", -logp[pairs.chosen], "pair", self.lambda_)])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.logp().detach()
