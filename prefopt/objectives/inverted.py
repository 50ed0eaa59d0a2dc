"""Objectives on pictures that are scored where an inversion leads to: SmPO and Inversion-DPO (DDIM-InPO is DPO). See `noise.plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from prefopt.objectives.base import Batch, Objective, Term, Terms


@dataclass
class SmPO(Objective):
    """SmPO-Diffusion, smoothed preference optimization: DPO whose beta is scaled by how sure the preference is (arXiv 2506.02698).

    h as in DPO, p the soft label: the probability that the chosen picture wins
    L = -log sigmoid(beta gamma (2p - 1) h), mean over pairs; a tie (p = 1/2) has no gradient, p < 1/2 turns the pair round
    The paper's 2 alpha - gamma is gamma (2p - 1), for alpha = gamma p; its p is the sigmoid of the difference of two PickScores that were
    scaled to [0, 1] over the data, so at most 0.731 (transforms=win_probability makes it of any scores). Its noise is found by inversion
    (noise=renoise). A hard label is p = 1, where beta counts gamma times. Rewards: beta (log pi - log ref), without the pair's factor.
    Ranges: the loss starts at ln 2, rewards at 0; `sureness` is the mean of |2p - 1|. When: noisy labels, and a reward model to weigh them.
    Limits: what the reward model does not see is not learned.
    """

    beta: float = 2000 / 16384
    gamma: float = 10.0

    columns: ClassVar = ("weight", "label")
    pictures: ClassVar[bool] = True
    paper: ClassVar = "2506.02698"
    require: ClassVar = ("beta > 0", "gamma > 0")
    formula: ClassVar = {"preference": "-log(sigmoid(beta*gamma*(2*p - 1)*h))"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "gamma": 10, "p": 0.5}, 0.693147),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "gamma": 10, "p": 0.55}, 0.620957),  # DPO with the same beta
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "gamma": 10, "p": 0.2}, 1.241154),
    )
    limits: ClassVar = (({"p": 0.5}, "log(2)"), ({"p": 1, "gamma": 1}, "log(1 + exp(-beta*h))"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        sure = 2 * pairs.label - 1
        values = -F.logsigmoid(self.beta * self.gamma * sure * (ratio[pairs.chosen] - ratio[pairs.rejected]))
        return Terms([Term("preference", values, "pair")], {"sureness": sure.abs()})


@dataclass
class InversionDPO(Objective):
    """Inversion-DPO: DPO on states of the reference's own inversion, where the reference makes no error (arXiv 2507.11554).

    D(x) = mean over states i of w_i |pi(x_(i-1), t_i) - ref(x_(i-1), t_i)|^2, the mean over latent dims, w_i = 1 / (2 ab_i)
    L = -log sigmoid(-sign beta/2 [D(xw) - D(xl)]) = -log sigmoid(sign beta h), mean over pairs; h as in DPO, under noise=path
    sign = 1 is the derivation: the winner's path is to stay likely. The released code has -1, which rewards moving away from the reference
    on the winner's path. Rewards: sign beta (log pi - log ref). Ranges: the loss starts at ln 2, rewards at 0; at sign 1 never above.
    When: a policy that has been trained already and shall be drawn back on winners, moved on on losers. Limits: where the policy equals the
    reference both D are at their minimum and nothing has a gradient: start from an earlier run's adapter with reference.policy=base.
    """

    beta: float = 2000 / 16384
    sign: int = 1

    pictures: ClassVar[bool] = True
    paper: ClassVar = "2507.11554"
    require: ClassVar = ("beta > 0", "sign in (1, -1)")
    formula: ClassVar = {"preference": "log(1 + exp(-sign*beta*h))"}
    golden: ClassVar = (  # beta/2 [D(xw) - D(xl)] = 0.2 (0.5 - 1.5), with D = -2 log pi and log ref = 0
        ({"w": -0.25, "l": -0.75, "rw": 0, "rl": 0, "beta": 0.2, "sign": 1}, 0.644397),
        ({"w": -0.25, "l": -0.75, "rw": 0, "rl": 0, "beta": 0.2, "sign": -1}, 0.744397),
    )
    limits: ClassVar = (({"w": -3, "rw": -3, "l": -7, "rl": -7}, "log(2)"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        values = -F.logsigmoid(self.sign * self.beta * (ratio[pairs.chosen] - ratio[pairs.rejected]))
        return Terms([Term("preference", values, "pair")])

    def rewards(self, batch: Batch):
        return self.sign * self.beta * batch.log_ratio().detach()
