"""Objectives that compare next-token distributions over the whole vocabulary: TDPO, AlignDistil."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms


@dataclass
class TDPO(Objective):
    """TDPO: DPO token by token, which also holds down how far the policy drifts along the rejected reply (arXiv 2404.11999).

    D(y) = sum over response tokens of KL(ref(. | s_t) || pi(. | s_t)) over all words, nats; h as in DPO
    L = -log sigmoid(beta (h - alpha (D(yl) - sg(D(yw)))) - m), mean over pairs; sg: constant in the gradient; m: the data's margin
    This is the second version, TDPO2. `stop_gradient=false` with alpha 1 is the first one, TDPO1: the same values, but the policy may
    also drift along chosen replies to win. The authors' config ships with the first one, although their function's default is the second.
    Rewards: beta (log pi - log ref + D). Ranges: loss starts at ln 2, rewards at 0; D, logged as drift/chosen and drift/rejected, starts at
    0 and is never negative. When: DPO drifts too far from its reference; the first version for low learning rates, the second for high.
    Limits: the reference runs along, since stored log-probs do not tell its distributions, and both heads work twice.
    """

    beta: float = 0.1
    alpha: float = 0.5
    stop_gradient: bool = True

    quantities: ClassVar = {"policy": ("logp", "divergence"), "reference": ("logp",)}
    divergence_from: ClassVar = ("forward", "reference")
    columns: ClassVar = ("weight", "margin")  # a soft label becomes two weighted pairs, since both sides are not treated alike
    paper: ClassVar = "2404.11999"
    require: ClassVar = ("beta > 0", "alpha >= 0")
    formula: ClassVar = {
        "preference": "-log(sigmoid(beta*(h - alpha*(sum(DL) - sg(stop_gradient*sum(DW)) - (1-stop_gradient)*sum(DW))) - m))"
    }
    golden: ClassVar = (
        ({"w": 0.8, "l": -0.4, "DW": [0.3], "DL": [0.5], "beta": 0.1, "alpha": 1.0, "stop_gradient": False}, 0.644397),
        ({"w": 0.8, "l": -0.4, "DW": [0.3], "DL": [0.5], "beta": 0.1, "alpha": 1.0, "stop_gradient": True}, 0.644397),
        ({"w": 0.8, "l": -0.4, "DW": [0.3], "DL": [0.5], "beta": 0.1, "alpha": 0.5, "stop_gradient": True}, 0.639659),
    )
    limits: ClassVar = (({"alpha": 0.0, "m": 0}, "log(1 + exp(-beta*h))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio, drift = batch.pairs, batch.log_ratio(), batch.edge_sum(batch.scores["policy"]["divergence"])
        along_chosen = drift[pairs.chosen].detach() if self.stop_gradient else drift[pairs.chosen]
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        logit = self.beta * (h - self.alpha * (drift[pairs.rejected] - along_chosen)) - pairs.margin
        seen = {f"drift/{side}": drift[edges].detach() for side, edges in (("chosen", pairs.chosen), ("rejected", pairs.rejected))}
        return Terms([Term("preference", -F.logsigmoid(logit), "pair")], seen)

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * (batch.log_ratio() + batch.edge_sum(batch.scores["policy"]["divergence"])).detach()


@dataclass
class AlignDistil(Objective):
    """AlignDistil: RLHF as distillation, token by token, from what lies beyond a DPO model (arXiv 2503.02832).

    d_t = sum |p - p'| in [0, 2], w_t = beta2 d_t + 0.001; p, p': next-token distributions of a frozen DPO model (teacher.path) and of one
    trained on swapped pairs (teacher.reverse; the code's ref_model), z, z' their logits
    L = mean over the tokens of yw of (beta / w_t) KL(pi || softmax((z + w_t (z - z')) / temperature)), all words, nats, mean over pairs
    Only pi gets a gradient; rejected replies are not read. Without `reward_len_norm` the tokens' sum. Other forms of the code, v = beta /
    beta2: `theorem1_contrast` has v in the place of w_t, and beta2 KL; `theorem1` that with the logits v z + (1-v) z' of an SFT model z';
    `theorem1_adaptive` w_t z + (1-w_t) z' and beta / w_t. On-policy training, on a sample of pi in the place of yw, is not built.
    Rewards: log pi. Ranges: at or above 0, and 0 at the teacher; beta / w_t is up to 1000 beta where both models agree; `extrapolation` is
    the mean of what multiplies z - z'.
    When: two DPO runs are at hand, or worth their while: the rewards of DPO shall count token by token.
    Limits: two more models run along, which must share the policy's vocabulary and not cap their logits; it is as good as they are.
    """

    beta: float = 0.1
    beta2: float = 10.0
    form: Literal["aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive"] = "aligndistil"
    temperature: float = 1.0
    reward_len_norm: bool = True

    quantities: ClassVar = {"policy": ("logp", "divergence"), "teacher": ("distance",)}
    divergence_from: ClassVar = ("reverse", "teacher")
    first_step: ClassVar = "astray"  # it follows the teacher, whatever pairs say
    paper: ClassVar = "2503.02832"
    require: ClassVar = ("beta > 0", "beta2 > 0", "temperature > 0",
                         "form in ('aligndistil', 'theorem1', 'theorem1_contrast', 'theorem1_adaptive')")  # fmt: skip
    formula: ClassVar = {
        "distillation": "sum((beta2 if form in ('theorem1', 'theorem1_contrast') else beta/(beta2*x + 0.001))*k for k, x in zip(DW, DIST))"
        " / (nw if reward_len_norm else 1)"
    }
    golden: ClassVar = (
        ({"nw": 2, "DW": [0.02, 0.01], "DIST": [0.0, 0.6], "beta": 0.1, "beta2": 10.0}, 1.000083),
        ({"nw": 2, "DW": [0.02, 0.01], "DIST": [0.0, 0.6], "beta": 0.1, "beta2": 10.0, "reward_len_norm": False}, 2.000167),
        ({"nw": 2, "DW": [0.3, 0.1], "DIST": [0.0, 0.6], "beta2": 2.0, "form": "theorem1"}, 0.4),
    )
    limits: ClassVar = (({"nw": 1, "DW": [0.5], "DIST": [0.0], "form": "theorem1_adaptive"}, "500*beta"),)

    def extrapolation(self, distance: Tensor) -> tuple[Tensor, float]:
        """(x [N], T): the teacher's logits are (z + x (z - z')) / T, at places where both models are `distance` [N] apart."""
        adaptive = self.form in ("aligndistil", "theorem1_adaptive")
        strength = self.beta2 * distance + 1e-3 if adaptive else torch.full_like(distance, self.beta / self.beta2)
        return strength - 1 if self.form in ("theorem1", "theorem1_adaptive") else strength, self.temperature

    def __call__(self, batch: Batch) -> Terms:
        chosen, distance = batch.pairs.chosen, batch.scores["teacher"]["distance"].detach()
        factor = self.beta2 if self.form in ("theorem1", "theorem1_contrast") else self.beta / (self.beta2 * distance + 1e-3)
        loss = batch.edge_sum(factor * batch.scores["policy"]["divergence"])
        loss = loss / batch.lengths if self.reward_len_norm else loss
        beyond = batch.edge_sum(self.extrapolation(distance)[0]) / batch.lengths
        return Terms([Term("distillation", loss[chosen], "pair")], {"extrapolation": beyond[chosen]})

    def rewards(self, batch: Batch) -> Tensor:
        return batch.logp().detach()
