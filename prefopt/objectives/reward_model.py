"""The objective of a reward model: no policy, no reference, only rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class BradleyTerry(Objective):
    """Reward model: logistic regression on the difference of two rewards, the Bradley-Terry likelihood (arXiv 2203.02155).

    L = -p log sigmoid(a - b - m) - (1-p) log sigmoid(-(a - b - m)) + centring (a + b)^2, mean over pairs
    a, b are the rewards of the chosen and the rejected reply, p the soft label (1 by default), m the data's margin, 0 by default
    (Llama 2, arXiv 2307.09288: larger where the preference is stronger). Of a ranking all pairs count, together as one row.
    Pairs say nothing of a reward's level; `centring` pulls it to 0 (arXiv 2312.09244 uses 0.01) and makes rewards of different
    prompts comparable. Rewards: a and b, in nats of Bradley-Terry. Ranges: loss near ln 2 at the start; with labels drawn from
    Bradley-Terry it cannot fall below their entropy, nor accuracy rise above the mean of max(p, 1-p). When: a judge of replies is
    needed, for rounds of sampling or to label data. Limits: it writes nothing, and knows little of replies unlike those it has seen.
    """

    centring: float = 0.0

    quantities: ClassVar = {"policy": ("reward",)}
    columns: ClassVar = ("weight", "label", "margin")
    paper: ClassVar = "2203.02155"
    require: ClassVar = ("centring >= 0",)
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(a - b - m)) - (1-p)*log(sigmoid(m - (a-b)))",
        "centring": "centring * (a + b)**2",
    }
    golden: ClassVar = (
        ({"a": 1.5, "b": 0.5}, 0.313262),
        ({"a": 1.5, "b": 0.5, "m": 1}, 0.693147),
        ({"a": 1.5, "b": 0.5, "p": 0.75, "centring": 0.01}, {"preference": 0.563262, "centring": 0.04}),
    )
    limits: ClassVar = (
        ({"p": 1, "m": 0, "centring": 0}, "log(1 + exp(b - a))"),
        ({"p": 0.5, "m": 0, "a": 0, "b": 0}, "log(2)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        pairs, reward = batch.pairs, batch.scores["policy"]["reward"]
        chosen, rejected = reward[pairs.chosen], reward[pairs.rejected]
        return Terms([
            Term("preference", logistic(chosen - rejected - pairs.margin, pairs.label), "pair"),
            Term("centring", (chosen + rejected) ** 2, "pair", self.centring),
        ])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.scores["policy"]["reward"].detach()
