"""Objectives that also train the policy to say why the chosen reply is better: preference learning with rationales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic
from prefopt.objectives.reference_free import log1mexp


@dataclass
class RationaleDPO(Objective):
    """Rationale DPO: DPO that also learns to write why the chosen reply is better (arXiv 2407.14477).

    R = sum over its tokens of log pi(rationale | question, both replies), nats: without a reference, the chosen reply shown first
    h = [log pi(yw) - log ref(yw)] - [log pi(yl) - log ref(yl)], token sums, nats; p the soft label, m the data's margin
    L = -p log sigmoid(beta h - m) - (1-p) log sigmoid(m - beta h) - gamma R, mean over pairs
    The authors' code (RDPO) takes -log sigmoid(gamma R) for -gamma R: `rationale_link=logsigmoid`. Its slope is gamma/2 near R = 0 and
    gamma for unlikely rationales, and it adds ln 2. A rationale counts as the row has it, whatever the label.
    Rewards: beta (log pi - log ref). Ranges: preference starts at ln 2; rationale is gamma times some nats per token, and falls.
    When: the data has rationales (data.columns.rationale), say written by a model, and pairs are few. Limits: the replies keep their places
    in the rationale's prompt (chosen first), so which is better can be told from there; only the reasons are learnt.
    """

    beta: float = 0.1
    gamma: float = 0.001
    rationale_link: Literal["linear", "logsigmoid"] = "linear"

    columns: ClassVar = ("weight", "label", "margin")
    extra: ClassVar = ("rationale",)
    extra_scorers: ClassVar = ("policy",)
    starts_level: ClassVar = False  # rationales differ from row to row
    paper: ClassVar = "2407.14477"
    require: ClassVar = ("beta > 0", "gamma >= 0", "rationale_link in ('linear', 'logsigmoid')")
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(beta*h - m)) - (1-p)*log(sigmoid(m - beta*h))",
        "rationale": "-gamma*XS[0][0] if rationale_link == 'linear' else -log(sigmoid(gamma*XS[0][0]))",
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "XS": [(-200, 0, 4)], "beta": 0.1, "gamma": 0.001, "rationale_link": "linear"},
         0.820957),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "XS": [(-200, 0, 4)], "beta": 0.1, "gamma": 0.001, "rationale_link": "logsigmoid"},
         {"preference": 0.620957, "rationale": 0.798139}),
    )  # fmt: skip
    limits: ClassVar = (
        ({"gamma": 0, "rationale_link": "linear", "p": 1, "m": 0}, "log(1 + exp(-beta*h))"),
        ({"gamma": 0, "rationale_link": "logsigmoid", "p": 1, "m": 0}, "log(1 + exp(-beta*h)) + log(2)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        logit = self.beta * (ratio[pairs.chosen] - ratio[pairs.rejected]) - pairs.margin
        said = batch.logp()[pairs.extra[:, 0]]
        values = -self.gamma * said if self.rationale_link == "linear" else -F.logsigmoid(self.gamma * said)
        return Terms([Term("preference", logistic(logit, pairs.label), "pair"), Term("rationale", values, "pair")])


_ODDS = "((w/nw - log(-expm1(w/nw))) - (l/nl - log(-expm1(l/nl))))"


@dataclass
class RationaleORPO(Objective):
    """Rationale ORPO: ORPO that also learns to write why the chosen reply is better, all by means over tokens (arXiv 2407.14477).

    avg(y) = log-prob per token, odds(y) = P / (1 - P) of P = exp(avg(y)); r the rationale under a prompt with question and both replies
    L = -avg(yw) - lambda_ log sigmoid(log odds(yw) - log odds(yl)) - gamma avg(r), mean over pairs; no reference
    A soft label p mixes this with the same of the pair turned round, of weight 1 - p, except for the rationale. The authors' code calls
    lambda_ beta. Rewards: lambda_ avg(y), always negative. Ranges: nll and rationale are gamma or 1 times some nats per token.
    When: as rationale_po, from a base model in one stage. Limits: as rationale_po; refused on diffusion models.
    """

    lambda_: float = 0.1
    gamma: float = 1.0

    quantities: ClassVar = {"policy": ("logp",)}
    columns: ClassVar = ("weight", "label")
    extra: ClassVar = ("rationale",)
    extra_scorers: ClassVar = ("policy",)
    proper_likelihood: ClassVar = True
    paper: ClassVar = "2407.14477"
    require: ClassVar = ("lambda_ >= 0", "gamma >= 0")
    formula: ClassVar = {
        "nll": "-p*w/nw - (1-p)*l/nl",
        "odds_ratio": f"lambda_ * (p*log(1 + exp(-{_ODDS})) + (1-p)*log(1 + exp({_ODDS})))",
        "rationale": "-gamma*XS[0][0]/XS[0][2]",
    }
    golden: ClassVar = (
        ({"w": -0.5, "l": -1.0, "XS": [(-3, 0, 2)], "lambda_": 1.0, "gamma": 0.5}, {"nll": 0.5, "odds_ratio": 0.3203, "rationale": 0.75}),
    )
    limits: ClassVar = (({"lambda_": 0, "gamma": 0, "p": 1}, "-w/nw"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, avg = batch.pairs, batch.avg_logp()
        log_odds, p = avg - log1mexp(avg), pairs.label
        ratio = log_odds[pairs.chosen] - log_odds[pairs.rejected]
        nll = Term("nll", -p * avg[pairs.chosen] - (1 - p) * avg[pairs.rejected], "pair")
        said = Term("rationale", -avg[pairs.extra[:, 0]], "pair", self.gamma)
        return Terms([nll, Term("odds_ratio", logistic(ratio, p), "pair", self.lambda_), said])

    def rewards(self, batch: Batch) -> Tensor:
        return self.lambda_ * batch.avg_logp().detach()


@dataclass
class RationaleNLL(Objective):
    """Rationale NLL: the policy learns to write why the chosen reply is better; a part for any other objective (arXiv 2407.14477).

    R = sum over its tokens of log pi(rationale | question, both replies), nats; `length_normalize`: their mean
    L = -R, mean over pairs; no reference
    The paper adds it to a preference loss: algo=mpo "algo.parts=[{algo: simpo}, {algo: rationale_nll, weight: 0.001}]". The loss that it is
    added to must handle soft labels, because a rationale speaks for its pair as the row has it.
    Rewards: log pi(y), which this loss leaves alone. Ranges: some nats per token, and falls.
    When: rationale_po is wanted on another loss than DPO or ORPO. Limits: alone it teaches to judge, not to answer.
    """

    length_normalize: bool = False

    quantities: ClassVar = {"policy": ("logp",)}
    columns: ClassVar = ("weight", "label", "margin")
    extra: ClassVar = ("rationale",)
    extra_scorers: ClassVar = ("policy",)
    first_step: ClassVar = "astray"  # it does not read the replies
    paper: ClassVar = "2407.14477"
    formula: ClassVar = {"rationale": "-XS[0][0]/XS[0][2] if length_normalize else -XS[0][0]"}
    golden: ClassVar = (
        ({"XS": [(-3, 0, 2)], "length_normalize": True}, 1.5),
        ({"w": -1, "l": -2, "XS": [(-3, 0, 2)], "length_normalize": False}, 3.0),
    )

    def __call__(self, batch: Batch) -> Terms:
        said = batch.avg_logp() if self.length_normalize else batch.logp()
        return Terms([Term("rationale", -said[batch.pairs.extra[:, 0]], "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.logp().detach()
