"""Objectives on a given picture and one that a model of the run has drawn: Diffusion-DRO, SePPO, RPO for subjects, Self-NPO.

A picture's log-prob is -1/2 of the squared error of the network's prediction, summed over its D latent dims (`policies/diffusion.py`), so
the mean squared error of papers is e = -scale log pi with scale = 2/D, written so in `conf/algo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


@dataclass
class DiffusionDRO(Objective):
    """Diffusion-DRO: a hinge that has experts' pictures denoised better, and the model's own drawing steps worse, than by the reference
    (arXiv 2510.18353).

    e(x) = -scale log pi(x), the mean squared error of the prediction (scale = 2/D); w the expert's picture, l the model's own
    L = max(0, margin + [e(w) - e_ref(w)] - [e(l) - e_ref(l)]), mean over pairs
    Under noise=states the own side stands at states that it was drawn through, and its target is what was predicted there; the expert's
    picture is noised to the same time. Rewards: scale (log pi - log ref). Ranges: the loss starts at the margin; a pair that has it
    teaches nothing more. When: a few hundred good pictures and no losers. Limits: nothing but the margin holds the policy near its start.
    """

    margin: float = 0.001
    scale: float = 2 / 16384

    pictures: ClassVar[bool] = True
    paper: ClassVar = "2510.18353"
    require: ClassVar = ("margin > 0", "scale > 0")
    formula: ClassVar = {"ranking": "max(0, margin - scale*h)"}
    golden: ClassVar = (
        ({"w": -0.5, "rw": -0.6, "l": -0.7, "rl": -0.75, "margin": 0.5, "scale": 2}, 0.4),
        ({"w": -0.5, "rw": -0.9, "l": -0.7, "rl": -0.7, "margin": 0.5, "scale": 2}, 0.0),
    )
    limits: ClassVar = (({"w": -3, "rw": -3, "l": -2, "rl": -2}, "margin"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        return Terms([Term("ranking", F.relu(self.margin - self.scale * h), "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return self.scale * batch.log_ratio().detach()


@dataclass
class SePPO(Objective):
    """SePPO, semi-policy preference optimization: DPO against own samples, which turn into winners where they seem good (arXiv 2410.05255).

    g = log pi - log ref, nats, of a given picture w and of a sample l that the reference has drawn; s = 1 if g(w) >= 0, else -1
    L = -log sigmoid(beta [g(w) - s g(l)]), mean over pairs; no gradient passes through s
    Where the reference denoises the given picture better than the policy does, its own sample is taken for a good one, too, and both are
    learned from. A factor B on the paper's mean errors is beta = 2B/D here. Rewards: beta g. Ranges: the loss starts at ln 2.
    When: good pictures without losers; the reference is one of the run's own past states (reference=past). Limits: the gate looks at a
    single draw of time and noise; `sample_is_loser` is the share of pairs in which it says that the sample is the worse one.
    """

    beta: float = 2000 / 16384

    pictures: ClassVar[bool] = True
    paper: ClassVar = "2410.05255"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": "log(1 + exp(-beta*((w-rw) - (l-rl) if w >= rw else (w-rw) + (l-rl))))"}
    golden: ClassVar = (
        ({"w": -10, "rw": -11, "l": -12, "rl": -11.5, "beta": 0.1}, 0.620957),  # s = 1: DPO
        ({"w": -11, "rw": -10, "l": -12, "rl": -11.5, "beta": 0.1}, 0.770957),  # s = -1: both are pulled up
    )
    limits: ClassVar = (({"w": -3, "rw": -3, "l": -2, "rl": -2}, "log(2)"), ({"w": -3, "rw": -4}, "log(1 + exp(-beta*h))"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        given, own = ratio[pairs.chosen], ratio[pairs.rejected]
        sign = torch.where(given.detach() >= 0, 1.0, -1.0).to(own.dtype)
        terms = Terms([Term("preference", -F.logsigmoid(self.beta * (given - sign * own)), "pair")])
        terms.metrics["sample_is_loser"] = (sign > 0).to(own.dtype)
        return terms


@dataclass
class SubjectRPO(Objective):
    """RPO for subject-driven generation: a reference photo against a picture of the base model, and imitation of the photo (2407.12164).

    L = imitation e(xw) - p log sigmoid(beta h) - (1-p) log sigmoid(-beta h), mean over pairs; h as in DPO, p the label
    e(x) = -scale log pi(x), the mean squared error (scale = 2/D). The label says which is better by the reward, drawn anew in every round;
    the photo is imitated either way. The paper's margin k is one of mean errors, so its beta B is 2B/D here. Rewards: beta (log pi - log
    ref). Ranges: the loss starts at ln 2 plus the error of the photos. When: three to six photos of one subject. Limits: rewards in [0, 1]
    give labels that are nearly coins.
    """

    beta: float = 2 / 16384
    imitation: float = 1.0
    scale: float = 2 / 16384

    columns: ClassVar = ("weight", "label")
    pictures: ClassVar[bool] = True
    starts_level: ClassVar = False  # errors differ from picture to picture
    paper: ClassVar = "2407.12164"
    require: ClassVar = ("beta >= 0", "imitation >= 0", "scale > 0")
    formula: ClassVar = {"error": "-imitation*scale*w", "preference": "p*log(1 + exp(-beta*h)) + (1-p)*log(1 + exp(beta*h))"}
    golden: ClassVar = (
        ({"w": -10, "rw": -11, "l": -12, "rl": -11.5, "p": 1, "beta": 0.1, "imitation": 1.0, "scale": 0.02},
         {"error": 0.2, "preference": 0.620957}),
        ({"w": -10, "rw": -11, "l": -12, "rl": -11.5, "p": 0, "beta": 0.1, "imitation": 0.0, "scale": 0.02}, 0.770957),
    )
    limits: ClassVar = (({"beta": 0}, "log(2) - imitation*scale*w"), ({"imitation": 0, "p": 1}, "log(1 + exp(-beta*h))"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        preference = logistic(self.beta * (ratio[pairs.chosen] - ratio[pairs.rejected]), pairs.label)
        error = -self.scale * batch.logp()[pairs.chosen]
        return Terms([Term("error", error, "pair", self.imitation), Term("preference", preference, "pair")])


@dataclass
class SelfNPO(Objective):
    """Self-NPO: a worse model, made by imitating pictures that a slow copy of it foresees early and badly guided (arXiv 2505.11777).

    y = x0_slow(x_s, s, guidance w + 1), x_s = where five of 25 sampling steps of the slow copy lead from noise, guided alike
    x_r = alpha_r / alpha_s x_s + sqrt(sigma_r^2 - (alpha_r / alpha_s)^2 sigma_s^2) z at a later, uniform time r (noise=truncated)
    L = scale sum_d (sqrt((x0(x_r, r) - y)_d^2 + huber^2) - huber) = -scale log pi, the mean over pictures; scale = 1/D
    eps = eps_pi(x_t, nothing) + guidance (eps_start(x_t, c) - eps_pi(x_t, nothing)), which draws pictures (sampler=negative)
    What is trained predicts without the caption, and the model that the run starts from with it; the trained one alone draws worse.
    Official code begins at noised pictures of the data, at any step (noise.truncation_start=picture; the paper: with noise), and tells the
    learning model the caption (noise.truncation_caption=true), which it is not told when it draws.
    Rewards: log pi(x), never positive. Ranges: the loss is near the mean absolute error of foreseen pictures. When: guidance, and neither
    preferences nor a reward. Limits: how much worse is for samples to say; too much of it spoils them.
    """

    scale: float = 1 / 16384

    view: ClassVar = "demonstrations"
    quantities: ClassVar = {"policy": ("logp",), "reference": ()}
    pictures: ClassVar[bool] = True
    starts_level: ClassVar = False  # errors differ from picture to picture
    paper: ClassVar = "2505.11777"
    require: ClassVar = ("scale > 0",)
    formula: ClassVar = {"regression": "-scale*y"}
    golden: ClassVar = (({"y": -8, "n": 1, "scale": 0.25}, 2),)

    def __call__(self, batch: Batch) -> Terms:
        trained = batch.tokens_of(batch.demonstrations.edge)  # a picture's draws, each of which stands for their mean
        return Terms([Term("regression", -batch.logp()[batch.token_edge[trained]], "token", self.scale)])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.logp().detach()
