"""Objectives on pairs compiled from logic: any statement about "the policy predicts yw" and "the policy predicts yl" is a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.reference_free import log1mexp

# For formulas: (bit, probability) of each world, where i, j are the log-probs that the policy predicts yw and yl; and counts of worlds.
_WORLDS = "((8, exp(i+j)), (4, -exp(i)*expm1(j)), (2, -expm1(i)*exp(j)), (1, expm1(i)*expm1(j)))"
_N = f"sum(x * (P_C//k%2) * max(P//k%2, P_A//k%2) for k, x in {_WORLDS})"
_D = f"sum(x * (P_C//k%2) * max(1 - P//k%2, P_A//k%2) for k, x in {_WORLDS})"
_PROBABILITIES = "for i, j in [(w/nw, l/nl) if length_normalize else (w, l)]"


def world_ratio(chosen: Tensor, rejected: Tensor, P: int, P_C: int, P_A: int) -> Tensor:
    """[P] log N/D of a preference structure at log-probs `chosen`, `rejected` <= 0 (arXiv 2412.17696, semantics of its losses).

    Tables are sums of worlds: 8 both predicted, 4 only yw, 2 only yl, 1 neither. N counts the worlds of (P or P_A) and P_C by their
    probability, D those of (not P or P_A) and P_C; neither may be empty.
    """
    not_chosen, not_rejected = log1mexp(chosen), log1mexp(rejected)
    worlds = torch.stack([chosen + rejected, chosen + not_rejected, not_chosen + rejected, not_chosen + not_rejected])

    def log_count(table: int) -> Tensor:
        return torch.logsumexp(worlds[[place for place in range(4) if table >> (3 - place) & 1]], 0)

    return log_count((P | P_A) & P_C) - log_count((~P | P_A) & P_C)


@dataclass
class SemanticLoss(Objective):
    """Semantic loss: a statement in propositional logic about the two replies, made into a loss (arXiv 2412.17696).

    "The policy predicts y" holds with probability p(y) = exp(avg log pi(y)), or exp(log pi(y)) with length_normalize=false
    N, D = probability that (P or P_A) and P_C holds, that (not P or P_A) and P_C holds; the two replies are independent
    L = -log sigmoid(beta log(N/D) - m), mean over pairs; m the data's margin, 0 by default
    P is what should hold, P_C what is taken for granted, P_A what counts for both sides. Each is a truth table, the sum of the worlds
    in which it holds: 8 both replies are predicted, 4 only yw, 2 only yl, 1 neither. "l implies w" is 13 = 8 + 4 + 1, "w" is 12.
    The tables (13, 14, 8) for P, P_C, P_A are CPO: N/D is p_w/p_l. (13, 6, 0) is ORPO's odds ratio, (12, 15, 0) cross-entropy, (4, 15, 0)
    unlikelihood, (13, 15, 0) CPO without its constraint. A structure for which N or D is empty, or N = D whatever the policy, is refused.
    Rewards: beta log p(y). Ranges: loss >= 0. When: to try what a statement makes for a loss. Limits: with p of whole sequences p_l is
    about 0, and most structures lose their force.
    """

    beta: float = 1.0
    P: int = 13
    P_C: int = 6
    P_A: int = 0
    length_normalize: bool = True

    quantities: ClassVar = {"policy": ("logp",)}
    columns: ClassVar = ("weight", "margin")
    proper_likelihood: ClassVar = True
    paper: ClassVar = "2412.17696"
    require: ClassVar = (
        "beta > 0", "0 <= P <= 15 and 0 <= P_C <= 15 and 0 <= P_A <= 15",
        "(P | P_A) & P_C != 0", "(~P | P_A) & P_C != 0", "P_C & ~P_A != 0",
    )
    formula: ClassVar = {"preference": f"sum(log(1 + exp(m - beta*log({_N} / {_D}))) {_PROBABILITIES})"}
    golden: ClassVar = (  # p_w = 0.3, p_l = 0.2
        ({"w": -1.2039728, "l": -1.6094379, "P": 13, "P_C": 14, "P_A": 8, "beta": 1.0}, 0.510826),
        ({"w": -1.2039728, "l": -1.6094379, "P": 13, "P_C": 6, "P_A": 0, "beta": 1.0}, 0.459532),
        ({"w": -1.2039728, "l": -1.6094379, "P": 12, "P_C": 15, "P_A": 0, "beta": 1.0}, 1.203973),
        ({"w": -1.2039728, "l": -1.6094379, "P": 4, "P_C": 15, "P_A": 0, "beta": 1.0}, 1.427116),
        ({"w": -1.2039728, "l": -1.6094379, "P": 13, "P_C": 15, "P_A": 0, "beta": 1.0}, 0.150823),
    )
    limits: ClassVar = (
        ({"P": 13, "P_C": 6, "P_A": 0, "length_normalize": True, "beta": 1.0, "m": 0},
         "log(1 + exp((l/nl - log(-expm1(l/nl))) - (w/nw - log(-expm1(w/nw)))))"),
        ({"P": 13, "P_C": 14, "P_A": 8, "length_normalize": False, "m": 0}, "log(1 + exp(-beta*(w-l)))"),
    )

    def __call__(self, batch: Batch) -> Terms:
        logp = batch.avg_logp() if self.length_normalize else batch.logp()
        ratio = world_ratio(logp[batch.pairs.chosen], logp[batch.pairs.rejected], self.P, self.P_C, self.P_A)
        return Terms([Term("preference", -F.logsigmoid(self.beta * ratio - batch.pairs.margin), "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * (batch.avg_logp() if self.length_normalize else batch.logp()).detach()


@dataclass
class ReferencedSemanticLoss(SemanticLoss):
    """Semantic loss with a reference: the ratio of the worlds is multiplied by that of the replies under it (arXiv 2412.17696).

    N, D, p and the three tables as in logic_dpa; p_ref(y) is p(y) under the reference
    L = -log sigmoid(beta (log(N/D) + log p_ref(yl) - log p_ref(yw)) - m), mean over pairs
    CPO's structure (13, 14, 8) with length_normalize=false is DPO. Elsewhere N/D is more than p_w/p_l, so at the start the loss differs
    from row to row. Rewards: beta (log p - log p_ref), which start at 0. Ranges: loss >= 0. When: a structure of logic_dpa should be
    measured against a reference, as DPO does with CPO's. Limits: those of logic_dpa.
    """

    quantities: ClassVar = {"policy": ("logp",), "reference": ("logp",)}
    starts_level: ClassVar = False
    formula: ClassVar = {
        "preference": f"sum(log(1 + exp(m - beta*(log({_N} / {_D}) + (rl/nl - rw/nw if length_normalize else rl - rw))))"
        f" {_PROBABILITIES})"
    }
    golden: ClassVar = (
        (
            {"w": -10, "l": -12, "rw": -11, "rl": -11.5, "P": 13, "P_C": 14, "P_A": 8, "length_normalize": False, "beta": 0.1},
            0.620957,
        ),
    )
    limits: ClassVar = (({"P": 13, "P_C": 14, "P_A": 8, "length_normalize": False, "m": 0}, "log(1 + exp(-beta*h))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs = batch.pairs
        logp, reference = (batch.avg_logp(s) if self.length_normalize else batch.logp(s) for s in ("policy", "reference"))
        ratio = world_ratio(logp[pairs.chosen], logp[pairs.rejected], self.P, self.P_C, self.P_A)
        anchored = ratio + (reference[pairs.rejected] - reference[pairs.chosen]).detach()
        return Terms([Term("preference", -F.logsigmoid(self.beta * anchored - pairs.margin), "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        ratio = batch.log_ratio().detach()
        return self.beta * (ratio / batch.lengths if self.length_normalize else ratio)
