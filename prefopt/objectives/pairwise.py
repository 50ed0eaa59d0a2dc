"""Objectives on pairs that compare the policy with a reference: DPO and IPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms


def logistic(logit: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of a Bradley-Terry logit against the probability `label` that the chosen side wins."""
    return -label * F.logsigmoid(logit) - (1 - label) * F.logsigmoid(-logit)


@dataclass
class DPO(Objective):
    """Direct Preference Optimization: a logistic loss on the difference of two log-ratios (arXiv 2305.18290).

    h = [log pi(yw) - log ref(yw)] - [log pi(yl) - log ref(yl)], sums over response tokens, nats
    L = -p log sigmoid(beta h - m) - (1-p) log sigmoid(-(beta h - m)),  p = 1 - label_smoothing, mean over pairs
    With a soft label q in the data p = q (1-e) + (1-q) e; m is the data's margin (ODPO, arXiv 2402.10571), 0 by default.
    Label smoothing is the conservative DPO of the same authors' code. Rewards: beta (log pi - log ref).
    Ranges: loss starts at ln 2, rewards at 0. When: pairs of replies that the reference could have written; the method to start with.
    Limits: the margin can grow while both likelihoods fall (watch logp/chosen), and on labels without doubt it grows without end.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    columns: ClassVar = ("weight", "label", "margin")
    paper: ClassVar = "2305.18290"
    require: ClassVar = ("beta > 0", "0 <= label_smoothing < 0.5")
    formula: ClassVar = {
        "preference": "-(p*(1-label_smoothing) + (1-p)*label_smoothing) * log(sigmoid(beta*h - m))"
        " - (p*label_smoothing + (1-p)*(1-label_smoothing)) * log(sigmoid(m - beta*h))"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "label_smoothing": 0}, 0.620957),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "label_smoothing": 0.1}, 0.635957),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9}, 0.693147),
    )
    limits: ClassVar = (({"rw": 0, "rl": 0, "label_smoothing": 0, "p": 1, "m": 0}, "log(1 + exp(-beta*(w-l)))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        label = pairs.label * (1 - self.label_smoothing) + (1 - pairs.label) * self.label_smoothing
        return Terms([Term("preference", logistic(self.beta * h - pairs.margin, label), "pair")])


@dataclass
class IPO(Objective):
    """Identity Preference Optimization: a squared loss that has a finite optimum even on noiseless labels (arXiv 2310.12036).

    L = p (h - 1/(2 tau))^2 + (1-p) (h + 1/(2 tau))^2, mean over pairs; h as in DPO, p the soft label (1 by default)
    The optimum on all pairs is pi proportional to pi_ref exp(P(y beats mu)/tau).
    The paper uses token sums. `length_normalize=true` divides each log-ratio by its number of tokens, the form that TRL uses
    and attributes to the authors. Rewards: tau times the log-ratio. Ranges: loss starts at 1/(4 tau^2); h tends to 1/(2 tau), so the
    margin of the rewards tends to 1/2. When: labels without doubt, where the margins of DPO would grow without end.
    Limits: pairs beyond the target are pulled back, and one outlier weighs as much as squares let it.
    """

    tau: float = 0.1
    length_normalize: bool = False

    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2310.12036"
    require: ClassVar = ("tau > 0",)
    formula: ClassVar = {
        "preference": "p * (((w-rw)/nw - (l-rl)/nl if length_normalize else h) - 1/(2*tau))**2"
        " + (1-p) * (((w-rw)/nw - (l-rl)/nl if length_normalize else h) + 1/(2*tau))**2"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "tau": 0.1}, 12.25),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9, "tau": 0.5}, 1.0),
    )
    limits: ClassVar = (
        ({"nw": 1, "nl": 1, "length_normalize": True, "p": 1}, "(h - 1/(2*tau))**2"),
        ({"length_normalize": False, "p": 0.5}, "h**2 + 1/(4*tau**2)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, self._ratio(batch)
        h, target = ratio[pairs.chosen] - ratio[pairs.rejected], 1 / (2 * self.tau)
        values = pairs.label * (h - target) ** 2 + (1 - pairs.label) * (h + target) ** 2
        return Terms([Term("preference", values, "pair")])

    def _ratio(self, batch: Batch) -> Tensor:
        return batch.log_ratio() / batch.lengths if self.length_normalize else batch.log_ratio()

    def rewards(self, batch: Batch) -> Tensor:
        return self.tau * self._ratio(batch).detach()
