"""Objectives that train one model to answer and to improve an answer that it is shown: SRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prefopt.objectives.base import Batch, Objective, Term, Terms


@dataclass
class SRPO(Objective):
    """SRPO: one model learns to answer and to improve the answer it is shown, by two squared errors (arXiv 2406.01660).

    v(b) = log pi(b | x) - log ref(b | x), u(b|a) the same where x is followed by answer a and a request to revise it; token sums, nats
    L_gen = (P - 1/2 - beta/2 [u(yw|yl) - u(yl|yw) + v(yw) - v(yl)])^2, P the probability that yw is better (the soft label)
    L_imp = mean over (b, a) = (yw, yl) and (yl, yw) of (P(b > a) - 1/2 - beta [u(b|a) - u(a|a)])^2, P(yl > yw) = 1 - P
    L = (1-alpha) L_gen + alpha L_imp, mean over pairs; nothing but the reference is held constant
    Both errors are 0 where the game between generator and improver has its solution, whatever P. Without any effect of the answer that is
    shown L is (P - 1/2 - beta h)^2, IPO's loss times beta^2. No code of the authors is public: templates (prefopt/data/extra.py) and
    the weights of the two means are ours. Policy and reference each score six sequences per pair.
    Rewards: beta v. Ranges: the loss starts at 1/4 for hard labels, generator at (1-alpha)/4 and improver at alpha/4.
    When: replies shall be revised by the model itself at inference: prefopt sample run=RUN revise=N. Limits: three prompts per pair instead
    of one; the first reply alone is not the goal, so judge it after revision.
    """

    beta: float = 0.1
    alpha: float = 0.5

    columns: ClassVar = ("weight", "label")
    # Sequences under the same prompt stand together, so that it is computed once.
    extra: ClassVar = ("chosen_from_rejected", "rejected_from_rejected", "rejected_from_chosen", "chosen_from_chosen")
    paper: ClassVar = "2406.01660"
    require: ClassVar = ("beta > 0", "0 <= alpha <= 1")
    formula: ClassVar = {
        "generator": "(1-alpha) * (p - 1/2 - beta/2 * ((XS[0][0]-XS[0][1]) - (XS[2][0]-XS[2][1]) + h))**2",
        "improver": "alpha/2 * ((p - 1/2 - beta*((XS[0][0]-XS[0][1]) - (XS[1][0]-XS[1][1])))**2"
        " + (1/2 - p - beta*((XS[2][0]-XS[2][1]) - (XS[3][0]-XS[3][1])))**2)",
    }
    golden: ClassVar = (
        ({"w": -7, "l": -9, "rw": -7, "rl": -9, "XS": [(-8, -8, 1), (-7, -7, 1), (-6, -6, 1), (-9, -9, 1)], "alpha": 0.5}, 0.25),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "XS": [(-8, -9, 2), (-7, -7.5, 1), (-6, -5, 3), (-9, -9, 1)],
          "beta": 0.1, "alpha": 0.25}, {"generator": 0.079219, "improver": 0.045313}),
    )  # fmt: skip
    limits: ClassVar = (
        ({"w": -3, "rw": -2, "l": -4, "rl": -5, "nw": 1, "nl": 1, "XS": [(-3, -2, 1), (-4, -5, 1), (-4, -5, 1), (-3, -2, 1)]},
         "(p - 1/2 - beta*h)**2"),
    )  # fmt: skip

    def __call__(self, batch: Batch) -> Terms:
        pairs, v = batch.pairs, batch.log_ratio()
        better, same_l, worse, same_w = v[pairs.extra.t()]
        target, h = pairs.label - 0.5, v[pairs.chosen] - v[pairs.rejected]
        generator = (target - self.beta / 2 * (better - worse + h)) ** 2
        improver = ((target - self.beta * (better - same_l)) ** 2 + (-target - self.beta * (worse - same_w)) ** 2) / 2
        return Terms([Term("generator", generator, "pair", 1 - self.alpha), Term("improver", improver, "pair", self.alpha)])
