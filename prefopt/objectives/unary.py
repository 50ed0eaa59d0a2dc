"""Objectives on single completions: KTO on thumbs-up and thumbs-down, its form for pictures, and plain supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms


@dataclass
class KTO(Objective):
    """Kahneman-Tversky Optimization: learns from desirable and undesirable replies, no pairs (arXiv 2402.01306).

    r(y) = log pi(y) - log ref(y), sums, nats; z = max(0, mean of r over mismatched prompt-reply edges), no gradient
    L = lambda_D (1 - sigmoid(beta (r - z))) if desirable, else lambda_U (1 - sigmoid(beta (z - r))), mean over completions
    z estimates KL(pi || ref) over the global batch; each row's mismatched reply is fixed by a seeded derangement of the data.
    From pairs, the chosen reply is desirable and the rejected one undesirable. Set the lambdas so that
    lambda_D n_D / (lambda_U n_U) lies between 1 and 4/3 when the classes are unbalanced. A batch holds two rows or more.
    Rewards: beta r. Ranges: loss starts at lambda/2 and lies in (0, lambda); `kl_estimate` is z, at least 0 nats.
    When: thumbs-up and thumbs-down of single replies, many more of one kind than of the other, or pairs with noisy labels.
    Limits: z is noisy where batches are small, and replies far from the reference, on either side, hardly teach.
    """

    beta: float = 0.1
    lambda_D: float = 1.0
    lambda_U: float = 1.0

    view: ClassVar = "unary"
    coupling: ClassVar = "global"
    mismatched: ClassVar = True
    min_batch: ClassVar = 2
    paper: ClassVar = "2402.01306"
    require: ClassVar = ("beta > 0", "lambda_D >= 0", "lambda_U >= 0")
    formula: ClassVar = {
        "preference": "lambda_D*(1 - sigmoid(beta*(y - r - z))) if d else lambda_U*(1 - sigmoid(beta*(z - y + r)))"
    }
    golden: ClassVar = (
        ({"y": -10, "r": -11, "z": 0.5, "d": 1, "beta": 0.1}, 0.487503),
        ({"y": -10, "r": -11, "z": 0.5, "d": 0, "beta": 0.1}, 0.512497),
    )
    limits: ClassVar = (({"y": -3, "r": -3, "z": 0, "d": 1}, "lambda_D/2"), ({"y": -3, "r": -3, "z": 0, "d": 0}, "lambda_U/2"))

    def __call__(self, batch: Batch) -> Terms:
        unary, ratio = batch.unary, batch.log_ratio()
        z = ratio[unary.mismatched].detach().sum().div(max(unary.mismatched.numel(), 1)).clamp(min=0)
        gain = self.beta * (ratio[unary.edge] - z)
        values = torch.where(
            unary.desirable, self.lambda_D * (1 - torch.sigmoid(gain)), self.lambda_U * (1 - torch.sigmoid(-gain))
        )
        return Terms([Term("preference", values, "completion")], {"kl_estimate": z})


@dataclass
class DiffusionKTO(Objective):
    """Diffusion-KTO: KTO whose point of comparison is the batch's own mean log-ratio, not mismatched replies (arXiv 2404.04465).

    g(y) = log pi(y) - log ref(y), nats; z = max(0, mean of g over the completions of the global batch, by their weights), no gradient
    L = lambda_D (1 - sigmoid(beta (g - z))) if desirable, else lambda_U (1 - sigmoid(beta (z - g))), mean over completions
    The official code with its sigmoid utility, the paper's choice. Its beta belongs to the mean squared error without a factor one half, so
    beta B there is 2B/D here. From pairs, the chosen side is desirable and the rejected one undesirable. Rewards: beta g.
    Ranges: loss starts at lambda/2 and lies in (0, lambda); `kl_estimate` is z, at least 0 nats. When: single pictures with a thumbs-up or
    thumbs-down. Limits: z moves with whatever the batch holds: with desirable pictures alone it rises with them, and they teach less.
    """

    beta: float = 2000 / 16384
    lambda_D: float = 1.0
    lambda_U: float = 1.0

    view: ClassVar = "unary"
    coupling: ClassVar = "global"
    min_batch: ClassVar = 2
    paper: ClassVar = "2404.04465"
    require: ClassVar = ("beta > 0", "lambda_D >= 0", "lambda_U >= 0")
    formula: ClassVar = {
        "preference": "lambda_D*(1 - sigmoid(beta*(y - r - sg(zb)))) if d else lambda_U*(1 - sigmoid(beta*(sg(zb) - y + r)))"
    }
    golden: ClassVar = (
        ({"y": -10, "r": -11, "d": 1, "beta": 0.1}, 0.5),
        ({"y": -11.5, "r": -11, "d": 1, "beta": 0.1}, 0.512497),
        ({"y": -11.5, "r": -11, "d": 0, "beta": 0.1}, 0.487503),
    )
    limits: ClassVar = (({"y": -3, "r": -4, "d": 1}, "lambda_D/2"), ({"y": -3, "r": -3, "d": 0}, "lambda_U/2"))

    def __call__(self, batch: Batch) -> Terms:
        unary, gain = batch.unary, batch.log_ratio()[batch.unary.edge]
        weight = unary.weight.to(gain.dtype)
        z = ((weight * gain).sum() / weight.sum().clamp_min(1e-12)).detach().clamp(min=0)
        good, bad = (1 - torch.sigmoid(sign * self.beta * (gain - z)) for sign in (1, -1))
        return Terms([Term("preference", torch.where(unary.desirable, self.lambda_D * good, self.lambda_U * bad), "completion")],
                     {"kl_estimate": z})


@dataclass
class SFT(Objective):
    """Supervised fine-tuning on demonstrations, or on the chosen side of pairs.

    L = -sum_y log pi(y) / sum_y |y| over all replies y of the global batch: the mean over all their trained tokens, nats per token
    A picture counts as one token, whatever its number of draws: the plain denoising loss (or flow matching), D/2 times the mean squared
    error of D latent dims. Rewards: log pi(y), never positive. Ranges: of texts between 0 and about the logarithm of the size of the
    vocabulary. When: before a preference method, on replies that deserve to be imitated. Limits: no reply is ever pushed down.
    """

    view: ClassVar = "demonstrations"
    quantities: ClassVar = {"policy": ("logp",)}
    formula: ClassVar = {"nll": "-y/n"}
    golden: ClassVar = (({"y": -5, "n": 4}, 1.25),)

    def __call__(self, batch: Batch) -> Terms:
        trained = batch.tokens_of(batch.demonstrations.edge)  # each stands for the mean of its reply's: the sum over them is the same
        return Terms([Term("nll", -batch.avg_logp()[batch.token_edge[trained]], "token")])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.logp().detach()
