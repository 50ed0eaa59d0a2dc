"""Objectives on pairs with an added regulariser, margin or length term: RPO, DPOP, Cal-DPO, R-DPO, constrained CPO, alpha-DPO, AlphaPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class RegularizedPO(Objective):
    """RPO, regularized preference optimization: DPO and a little imitation of the chosen reply, a form of pessimism (arXiv 2405.16436).

    L = -log sigmoid(beta h) - eta beta log pi(yw), token sum, mean over pairs; h as in DPO
    Three forms go by this name, and their eta differ by orders of magnitude. `reduction=sum`: the paper's main form and its chat code.
    `mean`: log pi(yw) per token of the reply, its appendix and reasoning code. `token_mean`: mean over all chosen tokens of the batch,
    TRL's. The last two leave beta out: `times_beta=false`. Rewards: beta (log pi - log ref). Ranges: the loss starts at ln 2 plus
    eta beta times the chosen replies' negative log-likelihood, rewards at 0. When: DPO lowers the likelihood of chosen replies.
    Limits: with eta > 0 the optimum is no longer the tilted reference; it leans towards what the data holds.
    """

    beta: float = 0.01
    eta: float = 0.005
    reduction: Literal["sum", "mean", "token_mean"] = "sum"
    times_beta: bool = True

    quantities: ClassVar = {"policy": ("logp", "token_logp"), "reference": ("logp",)}
    starts_level: ClassVar = False  # the likelihood term differs from row to row
    paper: ClassVar = "2405.16436"
    require: ClassVar = ("beta > 0", "eta >= 0", "reduction in ('sum', 'mean', 'token_mean')")
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*h))",
        "nll": "-eta * (beta if times_beta else 1) * (t if reduction == 'token_mean' else w/nw if reduction == 'mean' else w)",
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "eta": 0.005}, {"preference": 0.620957, "nll": 0.005}),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "nw": 5, "beta": 0.1, "eta": 0.005, "reduction": "mean"}, 0.621957),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "nw": 5, "beta": 0.1, "eta": 0.2, "reduction": "token_mean",
          "times_beta": False}, {"preference": 0.620957, "nll": 0.4}),
    )  # fmt: skip
    limits: ClassVar = (({"eta": 0}, "log(1 + exp(-beta*h))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        preference = -F.logsigmoid(self.beta * (ratio[pairs.chosen] - ratio[pairs.rejected]))
        weight = self.eta * (self.beta if self.times_beta else 1)
        if self.reduction == "token_mean":
            nll = Term("nll", -batch.scores["policy"]["token_logp"][batch.tokens_of(pairs.chosen)], "token", weight)
        else:
            logp = batch.avg_logp() if self.reduction == "mean" else batch.logp()
            nll = Term("nll", -logp[pairs.chosen], "pair", weight)
        return Terms([Term("preference", preference, "pair"), nll])


@dataclass
class DPOP(Objective):
    """DPO-Positive (Smaug): DPO that pays for every nat by which a chosen reply falls below the reference (arXiv 2402.13228).

    L = -log sigmoid(beta (h - lambda_ max(0, log ref(yw) - log pi(yw)))), token sums, mean over pairs; h as in DPO
    With a soft label p the loss is the cross-entropy of that logit against p; it is the `chosen` column that is protected.
    Rewards: beta (log pi - log ref), without the penalty. Ranges: loss starts at ln 2, rewards at 0; `below_reference` is the share of
    chosen replies that the policy finds less likely than the reference does. When: pairs that differ in few tokens (mathematics),
    where DPO lowers both sides. Limits: a reply that is chosen in one pair and rejected in another hardly moves.
    """

    beta: float = 0.3
    lambda_: float = 50.0

    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2402.13228"
    require: ClassVar = ("beta > 0", "lambda_ >= 0")
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(beta*(h - lambda_*max(0, rw - w)))) - (1-p)*log(sigmoid(beta*(lambda_*max(0, rw - w) - h)))"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1}, 0.620957),
        ({"w": -10.1, "l": -15.9, "rw": -10, "rl": -12, "beta": 0.5, "lambda_": 50.0}, 1.037488),
    )
    limits: ClassVar = (
        ({"lambda_": 0, "p": 1}, "log(1 + exp(-beta*h))"),
        ({"w": 0, "p": 1}, "log(1 + exp(-beta*h))"),  # at least as likely as under the reference
        ({"l": -4, "rl": -4, "w": -3, "rw": -1, "p": 1}, "log(1 + exp(2*beta*(1 + lambda_)))"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        chosen = ratio[pairs.chosen]
        logit = self.beta * (chosen - ratio[pairs.rejected] - self.lambda_ * F.relu(-chosen))
        fallen = (chosen < 0).to(chosen.dtype)
        return Terms([Term("preference", logistic(logit, pairs.label), "pair")], {"below_reference": fallen})


@dataclass
class CalDPO(Objective):
    """Cal-DPO: DPO whose log-ratios are also pulled to fixed values, plus and minus 1/(2 beta) (arXiv 2412.14516).

    r(y) = log pi(y) - log ref(y), token sums
    L = -log sigmoid(r(yw) - r(yl)) + calibration [(r(yw) - 1/(2 beta))^2 + (r(yl) + 1/(2 beta))^2], mean over pairs
    There is no beta in the logistic part: beta only sets the targets, which stand for rewards of 1/2 and -1/2. The paper and its
    Pythia code have calibration 1, its Mistral code 1/2. Rewards: r. Ranges: the loss starts at ln 2 + calibration / (2 beta^2), which is
    500000 at beta 0.001, so clip gradients; rewards start at 0. When: DPO lets the likelihood of chosen replies fall.
    Limits: one target for all pairs, however clear; at a small beta the squares outweigh everything else.
    """

    beta: float = 0.001
    calibration: float = 1.0

    paper: ClassVar = "2412.14516"
    require: ClassVar = ("beta > 0", "calibration >= 0")
    formula: ClassVar = {
        "preference": "-log(sigmoid(h))",
        "calibration": "calibration * ((w-rw - 1/(2*beta))**2 + (l-rl + 1/(2*beta))**2)",
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.5}, {"preference": 0.201413, "calibration": 0.25}),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9, "beta": 0.5, "calibration": 0.5}, 1.693147),
    )
    limits: ClassVar = (
        ({"calibration": 0}, "log(1 + exp(-h))"),
        ({"w": -3, "rw": -3, "l": -5, "rl": -5}, "log(2) + calibration/(2*beta**2)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio, target = batch.pairs, batch.log_ratio(), 1 / (2 * self.beta)
        chosen, rejected = ratio[pairs.chosen], ratio[pairs.rejected]
        squares = (chosen - target) ** 2 + (rejected + target) ** 2
        preference = Term("preference", -F.logsigmoid(chosen - rejected), "pair")
        return Terms([preference, Term("calibration", squares, "pair", self.calibration)])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.log_ratio().detach()


@dataclass
class LengthRegularisedDPO(Objective):
    """R-DPO, length-regularised DPO: what a longer reply wins by its length is not learnt (arXiv 2403.19159).

    L = -log sigmoid(beta h + alpha (|yw| - |yl|)), mean over pairs; h as in DPO, |y| the number of trained tokens
    It follows from maximising r - alpha |y| - beta KL: the optimum on all pairs is pi proportional to ref exp((r - alpha |y|)/beta). So a
    chosen reply that is the longer one needs a smaller h: the sign is plus. This is not the robust DPO (rDPO) for noisy labels.
    With a soft label p the loss is the cross-entropy against p. Rewards: beta (log pi - log ref), the true reward less the penalty.
    Ranges: the loss starts at ln 2 where lengths are equal, rewards at 0. When: replies grow longer without growing better.
    Limits: one price for every token, whatever the prompt asks for; lengths depend on the tokenizer, and so does alpha.
    """

    beta: float = 0.1
    alpha: float = 0.01

    columns: ClassVar = ("weight", "label")
    starts_level: ClassVar = False  # lengths differ from row to row
    paper: ClassVar = "2403.19159"
    require: ClassVar = ("beta > 0", "alpha >= 0")
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(beta*h + alpha*(nw - nl))) - (1-p)*log(sigmoid(-beta*h - alpha*(nw - nl)))"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "nw": 3, "nl": 6, "beta": 0.1, "alpha": 0.05}, 0.693147),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "nw": 6, "nl": 3, "beta": 0.1, "alpha": 0.05}, 0.554355),
    )
    limits: ClassVar = (
        ({"alpha": 0, "p": 1}, "log(1 + exp(-beta*h))"), ({"nw": 4, "nl": 4, "p": 1}, "log(1 + exp(-beta*h))"),
    )  # fmt: skip

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        score = self.beta * ratio + self.alpha * batch.lengths.to(ratio.dtype)
        return Terms([Term("preference", logistic(score[pairs.chosen] - score[pairs.rejected], pairs.label), "pair")])


@dataclass
class ConstrainedPO(Objective):
    """Constrained preference optimization: DPO with a margin per pair, against pairs that stay misranked (arXiv 2605.20834).

    L = -log sigmoid(beta h - gamma (1/P(yw) + 1/P(yl))), P = exp(avg log ref), no gradient, 1/P at most `max_inverse`; mean over pairs
    It comes from adding gamma (log pi(yw) - log pi(yl)) to the RLHF objective. Inverse sequence probabilities are astronomical, so P is
    the reference's geometric mean per token, and 1/P the reply's perplexity. The released code has other margins, on averages per token
    (`length_normalize=true`): `softplus`, beta softplus(tau (gamma - d))/tau, d = log ref(yw) - log ref(yl), which moves the target from
    d to about max(d, gamma); and `inverse_logp`, log-probs in place of P, a negative margin. Rewards: beta (log pi - log ref).
    Ranges: every run on pairs logs `misranked`, the share with log pi(yw) < log pi(yl), and where it has a reference `undesirable`, the
    share of pairs that are misranked though past DPO's target d.
    When: many pairs start misranked by the reference. Limits: gamma is on the scale of perplexities, which differ from model to model.
    """

    beta: float = 0.1
    gamma: float = 0.05
    margin: Literal["inverse_prob", "softplus", "inverse_logp"] = "inverse_prob"
    tau: float = 2.0
    max_inverse: float = 100.0
    length_normalize: bool = False

    starts_level: ClassVar = False  # the margin differs from row to row
    paper: ClassVar = "2605.20834"
    require: ClassVar = (
        "beta > 0", "gamma >= 0", "tau > 0", "max_inverse > 0", "margin in ('inverse_prob', 'softplus', 'inverse_logp')",
    )  # fmt: skip
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*((w-rw)/nw - (l-rl)/nl if length_normalize else h)"
        " - (gamma*(min(exp(-rw/nw), max_inverse) + min(exp(-rl/nl), max_inverse)) if margin == 'inverse_prob'"
        " else -gamma*(1/max(-rw/nw, 1/max_inverse) + 1/max(-rl/nl, 1/max_inverse)) if margin == 'inverse_logp'"
        " else beta/tau * log(1 + exp(tau*(gamma - (rw/nw - rl/nl if length_normalize else rw - rl)))))))"
    }
    golden: ClassVar = (
        ({"w": -0.598139, "l": -0.798139, "rw": -0.913015, "rl": -0.513015, "beta": 0.5, "gamma": 0.02}, 0.590630),
        ({"w": -1, "l": -2, "rw": -2, "rl": -2, "beta": 1, "gamma": 0.5, "margin": "inverse_logp"}, 0.201413),
        ({"w": -2, "l": -1, "rw": -2, "rl": -1, "beta": 1, "gamma": 0, "tau": 1, "margin": "softplus"}, 1.551445),
    )
    limits: ClassVar = (
        ({"gamma": 0, "margin": "inverse_prob", "length_normalize": False}, "log(1 + exp(-beta*h))"),
        ({"rw": 0, "rl": 0, "margin": "inverse_prob", "length_normalize": False}, "log(1 + exp(2*gamma - beta*(w-l)))"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, average = batch.pairs, batch.avg_logp("reference").detach()
        policy, reference = (batch.avg_logp(s) if self.length_normalize else batch.logp(s) for s in ("policy", "reference"))
        d, target = (x[pairs.chosen] - x[pairs.rejected] for x in (policy, reference.detach()))
        if self.margin == "softplus":
            margin = self.beta / self.tau * F.softplus(self.tau * (self.gamma - target))
        else:
            inverse = (-average).exp().clamp(max=self.max_inverse)
            if self.margin == "inverse_logp":
                inverse = -(-average).clamp(min=1 / self.max_inverse).reciprocal()
            margin = self.gamma * (inverse[pairs.chosen] + inverse[pairs.rejected])
        return Terms([Term("preference", -F.logsigmoid(self.beta * (d - target) - margin), "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        ratio = batch.log_ratio().detach()
        return self.beta * (ratio / batch.lengths if self.length_normalize else ratio)


@dataclass
class AlphaDPO(Objective):
    """alpha-DPO: SimPO with a margin of its own for each pair, larger where the policy has already moved (arXiv 2410.10148).

    u = beta (avg(yw) - avg(yl)), avg = log-prob per token; M = [avg - avg_ref](yw) - [avg - avg_ref](yl)
    L = -log sigmoid(u - sg[gamma + alpha M*]), M* = (M - mean M)/(std M + 1e-4), mean over pairs; sg: no gradient
    Mean and standard deviation are over the pairs of the global batch, by weight; the authors' code keeps running averages of
    both. 1e-4 nats keep rounding from being blown up where all M are 0, at the start. The code writes beta (gamma_beta_ratio + alpha' M*):
    its alpha' is alpha / beta here. Rewards: beta avg(y), always negative. Ranges: `target_margin` is gamma on average. When: SimPO's one
    margin fits some pairs only. Limits: like SimPO, nothing ties the policy to where it started; the reference only shapes margins.
    """

    beta: float = 2.5
    gamma: float = 1.5
    alpha: float = 0.5

    coupling: ClassVar = "global"
    min_batch: ClassVar = 2
    starts_level: ClassVar = False  # it compares likelihoods, not ratios to the reference
    paper: ClassVar = "2410.10148"
    require: ClassVar = ("beta > 0", "gamma >= 0", "alpha >= 0")
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*(w/nw - l/nl) - sg(gamma + alpha*((w-rw)/nw - (l-rl)/nl - mu)/(sd + 0.0001))))"
    }
    golden: ClassVar = (({"w": -1.0, "l": -1.2, "beta": 2.0, "gamma": 1.0}, 1.037488),)  # a single pair has M* = 0
    limits: ClassVar = (({"alpha": 0}, "log(1 + exp(gamma - beta*(w/nw - l/nl)))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, avg = batch.pairs, batch.avg_logp()
        moved = batch.log_ratio().detach() / batch.lengths
        m, weight = moved[pairs.chosen] - moved[pairs.rejected], pairs.weight.to(moved.dtype)
        total = weight.sum().clamp(min=1e-12)
        centred = m - (weight * m).sum() / total
        spread = ((weight * centred**2).sum() / total).sqrt()
        margin = self.gamma + self.alpha * centred / (spread + 1e-4)
        logit = self.beta * (avg[pairs.chosen] - avg[pairs.rejected]) - margin
        return Terms([Term("preference", -F.logsigmoid(logit), "pair")], {"target_margin": margin})

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * batch.avg_logp().detach()


@dataclass
class AlphaPO(Objective):
    """AlphaPO: SimPO with a reward that is a power of the likelihood, not its logarithm (arXiv 2501.03884).

    P(y) = exp(avg(y)), avg = log-prob per token; r(y) = (1 - P(y)^(-alpha))/alpha, and avg(y) at alpha = 0, which is SimPO
    L = -log sigmoid(beta (r(yw) - r(yl)) - gamma), mean over pairs
    alpha > 0 makes r steeper where a reply is unlikely, so that a margin costs smaller falls of both; alpha < 0 the opposite. Beyond
    20 the exponent -alpha avg counts as 20, and such a reply has no gradient. Rewards: beta r(y), never positive. Ranges: the loss is
    log(1 + e^gamma) where both replies are as likely per token. When: SimPO lets the likelihood of both replies fall.
    Limits: no reference, so nothing else ties the policy to where it started.
    """

    beta: float = 2.5
    gamma: float = 0.1
    alpha: float = 0.25

    quantities: ClassVar = {"policy": ("logp",)}
    paper: ClassVar = "2501.03884"
    require: ClassVar = ("beta > 0", "gamma >= 0")
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*((w/nw if alpha == 0 else -expm1(min(-alpha*w/nw, 20))/alpha)"
        " - (l/nl if alpha == 0 else -expm1(min(-alpha*l/nl, 20))/alpha)) - gamma))"
    }
    golden: ClassVar = (
        ({"w": -1.0, "l": -1.2, "beta": 2.0, "gamma": 1.0, "alpha": 0}, 1.037488),
        ({"w": -0.693147180559945, "l": -1.38629436111989, "beta": 0.5, "gamma": 0.0, "alpha": 1}, 0.313262),  # r = -1 and -3
        ({"w": -0.693147180559945, "l": -1.38629436111989, "beta": 4.0, "gamma": 0.0, "alpha": -1}, 0.313262),  # r = -1/2 and -3/4
    )
    limits: ClassVar = (
        ({"alpha": 0}, "log(1 + exp(gamma - beta*(w/nw - l/nl)))"),
        ({"alpha": 1, "nw": 1, "nl": 1, "gamma": 0}, "log(1 + exp(beta*(exp(-w) - exp(-l))))"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, reward = batch.pairs, self._reward(batch.avg_logp())
        logit = self.beta * (reward[pairs.chosen] - reward[pairs.rejected]) - self.gamma
        return Terms([Term("preference", -F.logsigmoid(logit), "pair")])

    def _reward(self, avg: Tensor) -> Tensor:
        return avg if self.alpha == 0 else -torch.expm1((-self.alpha * avg).clamp(max=20)) / self.alpha

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * self._reward(batch.avg_logp().detach())
