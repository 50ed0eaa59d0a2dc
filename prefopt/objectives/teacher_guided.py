"""Objectives on pairs in which a frozen teacher says what each token is worth: TGDPO, TVKD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class TGDPO(Objective):
    """TGDPO: DPO in which an aligned model says which tokens count (arXiv 2506.14574).

    r_t = beta (log guide - log ref), u_t = log pi - log ref, of each response token, nats; r_t is constant in the gradient
    L = -log sigmoid(beta [sum_t (1 + alpha r_t) u_t over yw - sum_t (1 - alpha r_t) u_t over yl] - m), mean over pairs; m: data's margin
    The guide is a model that DPO or SimPO has trained from the same start: teacher.path. Tokens that it has made likelier count more in
    chosen replies and less in rejected ones. The official code knows this form only. Rewards: beta (log pi - log ref).
    Ranges: loss starts at ln 2, rewards at 0; guide/chosen and guide/rejected are the sums of r_t, which the policy does not change.
    When: a first run of DPO is at hand, as its second stage.
    Limits: where alpha |r_t| passes 1 a token's sign turns; a guide like the reference leaves plain DPO.
    """

    beta: float = 0.1
    alpha: float = 0.5

    quantities: ClassVar = {"policy": ("logp", "token_logp"), "reference": ("logp", "token_logp"), "teacher": ("token_logp",)}
    columns: ClassVar = ("weight", "margin")  # a soft label becomes two weighted pairs, since both sides are not treated alike
    paper: ClassVar = "2506.14574"
    require: ClassVar = ("beta > 0", "alpha >= 0")
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*(sum((1 + alpha*beta*(g-s))*(t-s) for (t, s), g in zip(W, TW))"
        " - sum((1 - alpha*beta*(g-s))*(t-s) for (t, s), g in zip(L, TL))) - m))"
    }
    golden: ClassVar = (
        ({"W": [(0.5, 0), (-0.2, 0)], "TW": [0.4, 0.1], "L": [(-0.3, 0), (0.2, 0)], "TL": [-0.1, -0.2], "beta": 0.1, "alpha": 0.5},
         0.672931),
        ({"W": [(0.5, 0), (-0.2, 0)], "TW": [0.4, 0.1], "L": [(-0.3, 0), (0.2, 0)], "TL": [-0.1, -0.2], "beta": 0.1, "alpha": 0.0},
         0.673347),
    )  # fmt: skip
    limits: ClassVar = (
        ({"alpha": 0.0, "m": 0}, "log(1 + exp(-beta*h))"),
        # A guide that is the reference guides nobody.
        ({"W": [(-1, -2), (-3, -3.5)], "TW": [-2, -3.5], "L": [(-2, -1)], "TL": [-1], "m": 0}, "log(1 + exp(-2.5*beta))"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs = batch.pairs
        policy, reference, guide = (batch.scores[scorer]["token_logp"] for scorer in ("policy", "reference", "teacher"))
        ratio, reward = policy - reference.detach(), self.beta * (guide - reference).detach()
        chosen = batch.edge_sum((1 + self.alpha * reward) * ratio)[pairs.chosen]
        rejected = batch.edge_sum((1 - self.alpha * reward) * ratio)[pairs.rejected]
        guided = batch.edge_sum(reward)
        seen = {f"guide/{side}": guided[edges] for side, edges in (("chosen", pairs.chosen), ("rejected", pairs.rejected))}
        return Terms([Term("preference", -F.logsigmoid(self.beta * (chosen - rejected) - pairs.margin), "pair")], seen)


@dataclass
class TVKD(Objective):
    """TVKD: a small model learns from pairs and from how a larger, DPO-trained teacher values the states on the way (arXiv 2509.16965).

    V(s) = temperature log sum_v p_teacher(v | s)^(alpha / temperature), nats; V after the last response token is 0
    score(y) = sum_t [log pi(y_t | s_t) - gamma V(s_{t+1})] over response tokens, V constant in the gradient
    L = -q log sigmoid(x) - (1-q) log sigmoid(-x), x = score(yw) - score(yl) - m, mean over pairs; q, m: soft label and margin of the data
    V is the form with the teacher's values alone; the student's own share in it, 0 by default in the code, is not offered. The released
    recipe puts the entropy of the student in V's place, which is another method. There is no beta: sums of log-probs make steep logits.
    V is computed once, over all words, and kept as one number per token. From the teacher's 50 likeliest words and the rest as one, as
    compressed outputs would have it, it is far too small (0.72 for 1.26 nats with SmolLM2-135M on plain text), so that is not offered.
    Rewards: score. Ranges: V is above 0 for alpha below temperature (the more, the less sure the teacher is) and 0 where they are equal.
    When: a student far smaller than its teacher, with one vocabulary. Limits: no reference holds the policy; the state after a response
    token is taken to be that before the next one, also where text that is not trained lies between.
    """

    alpha: float = 0.7
    gamma: float = 1.0
    temperature: float = 1.0

    quantities: ClassVar = {"policy": ("logp",), "teacher": ("value",)}
    columns: ClassVar = ("weight", "label", "margin")
    paper: ClassVar = "2509.16965"
    require: ClassVar = ("alpha >= 0", "gamma >= 0", "temperature > 0")
    formula: ClassVar = {
        "preference": "sum(-p*log(sigmoid(x)) - (1-p)*log(sigmoid(-x)) for x in [w - l - gamma*(sum(VW[1:]) - sum(VL[1:])) - m])"
    }
    golden: ClassVar = (({"w": -3, "l": -4, "nw": 3, "nl": 2, "VW": [0.1, 0.2, 0.3], "VL": [0.4, 0.25], "gamma": 1.0}, 0.386871),)
    limits: ClassVar = (
        ({"gamma": 0.0, "p": 1, "m": 0}, "log(1 + exp(l-w))"),
        ({"nw": 2, "nl": 2, "VW": [0, 0], "VL": [0, 0], "p": 1, "m": 0}, "log(1 + exp(l-w))"),  # as alpha = temperature makes them
    )

    def soft_value(self) -> tuple[float, float]:
        """(weight, temperature) of the teacher's value."""
        return self.alpha, self.temperature

    def _score(self, batch: Batch) -> Tensor:
        """[E] score(y). V before an edge's first token follows none of its tokens."""
        value, places = batch.scores["teacher"]["value"].detach(), torch.arange(len(batch.token_edge), device=batch.token_edge.device)
        first = (batch.lengths.cumsum(0) - batch.lengths)[batch.token_edge] == places
        return batch.logp() - self.gamma * batch.edge_sum(torch.where(first, 0, value))

    def __call__(self, batch: Batch) -> Terms:
        pairs, score = batch.pairs, self._score(batch)
        return Terms([Term("preference", logistic(score[pairs.chosen] - score[pairs.rejected] - pairs.margin, pairs.label), "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return self._score(batch).detach()


@dataclass
class TVKDWithKL(TVKD):
    """TVKD with plain distillation beside it: the student also imitates the teacher's distributions along both replies (arXiv 2509.16965).

    L = TVKD's + kd_weight (mean_t KL(teacher || pi) over yw + the same over yl), all words, nats, mean over pairs
    The released recipe sets kd_weight to 1e-4, and its code leaves weights below 1e-3 out. Rewards: TVKD's score.
    Ranges: preference as in TVKD; distillation is at or above 0, and 0 where the policy is the teacher.
    When: the teacher's wording shall be kept as well as its preferences. Limits: both heads work twice, and one vocabulary is needed.
    """

    kd_weight: float = 0.1

    quantities: ClassVar = {"policy": ("logp", "divergence"), "teacher": ("value",)}
    divergence_from: ClassVar = ("forward", "teacher")
    require: ClassVar = ("alpha >= 0", "gamma >= 0", "temperature > 0", "kd_weight >= 0")
    formula: ClassVar = TVKD.formula | {"distillation": "kd_weight * (sum(DW)/nw + sum(DL)/nl)"}
    golden: ClassVar = (
        ({"w": -3, "l": -4, "nw": 3, "nl": 2, "VW": [0.1, 0.2, 0.3], "VL": [0.4, 0.25], "gamma": 1.0, "DW": [0.2, 0.1, 0.3],
          "DL": [0.5, 0.1], "kd_weight": 0.1}, {"preference": 0.386871, "distillation": 0.05}),
    )  # fmt: skip
    limits: ClassVar = (({"gamma": 0.0, "kd_weight": 0.0, "p": 1, "m": 0}, "log(1 + exp(l-w))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, made = batch.pairs, super().__call__(batch)
        drift = batch.edge_sum(batch.scores["policy"]["divergence"]) / batch.lengths
        made.terms.append(Term("distillation", drift[pairs.chosen] + drift[pairs.rejected], "pair", self.kd_weight))
        return made
