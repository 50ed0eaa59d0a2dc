"""Objectives on pictures that no objective on texts already is: MaPO, DSPO, ABC, TDPO on captions, SUDO, reward-weighted regression.

A picture's log-prob is -1/2 of the squared error of the network's prediction, summed over its D latent dims and averaged over draws of time
and noise (`policies/diffusion.py`), so the mean squared error of papers is e = -scale log pi with scale = 2/D, written so in `conf/algo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.listwise import logsumexp, per_list
from prefopt.objectives.pairwise import logistic


def bernoulli(x: Tensor) -> Tensor:
    """x / (exp(x) - 1), which falls from 1 at 0 to 0; by its series near 0, where the quotient and its slope lose their digits."""
    near = x.abs() < 0.03
    far = torch.where(near, torch.ones_like(x), x)
    series = 1 - x / 2 + x**2 / 12 - x**4 / 720
    return torch.where(near, series, far * torch.exp(-far) / -torch.expm1(-far))


@dataclass
class MarginAwarePO(Objective):
    """MaPO, margin-aware preference optimization: the margin of a bounded likelihood and imitation, no reference (arXiv 2406.06424).

    e(x) = -scale log pi(x), the mean squared error of the prediction (scale = 2/D); f(u) = u / (exp(u) - 1), from 1 at no error to 0
    L = e(xw) - beta log sigmoid(times [f(snr e(xw)) - f(snr e(xl))]), mean over pairs
    That is the official code; its snr is the constant 1/2, its `times` the length of the process. Where the weights of times are
    not constant, e is the weighted error. Rewards: times f(snr e), at most `times`. Ranges: the loss starts at the error of the chosen
    pictures plus about beta ln 2. When: the data is far from the model (a new style), so that a reference would hold it back.
    Limits: nothing ties the policy to its start; pictures that are good throughout teach best, for they are imitated.
    """

    beta: float = 0.1
    snr: float = 0.5
    times: float = 1000.0
    scale: float = 2 / 16384

    quantities: ClassVar = {"policy": ("logp",)}
    pictures: ClassVar[bool] = True
    paper: ClassVar = "2406.06424"
    require: ClassVar = ("beta >= 0", "snr > 0", "times > 0", "scale > 0")
    formula: ClassVar = {
        "error": "-scale*w",
        "preference": "beta * log(1 + exp(times*snr*scale * (w/expm1(-snr*scale*w) - l/expm1(-snr*scale*l))))",
    }
    golden: ClassVar = (  # errors of 0.2 and 0.4: f(0.1) = 0.950833, f(0.2) = 0.903331
        ({"w": -0.1, "l": -0.2, "beta": 0.1, "snr": 0.5, "times": 10, "scale": 2}, {"error": 0.2, "preference": 0.048358}),
        ({"w": -0.1, "l": -0.1, "beta": 0.1, "snr": 0.5, "times": 10, "scale": 2}, {"error": 0.2, "preference": 0.069315}),
    )
    limits: ClassVar = (({"beta": 0}, "-scale*w"), ({"w": -0.3, "l": -0.3}, "0.3*scale + beta*log(2)"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, reward = batch.pairs, self._reward(batch)
        preference = -F.logsigmoid(reward[pairs.chosen] - reward[pairs.rejected])
        error = -self.scale * batch.logp()[pairs.chosen]
        return Terms([Term("error", error, "pair"), Term("preference", preference, "pair", self.beta)])

    def _reward(self, batch: Batch) -> Tensor:
        return self.times * bernoulli(-self.snr * self.scale * batch.logp())

    def rewards(self, batch: Batch) -> Tensor:
        return self._reward(batch).detach()


@dataclass
class DSPO(Objective):
    """Direct Score Preference Optimization: the score of the tilted distribution is regressed on the winner (ICLR 2025, no arXiv number).

    k = beta sigmoid(-beta scale h / 2), h as in DPO; eps the noise, pi and ref the predictions of both models on the noised winner
    L = mean over latent dims of (pi - eps - k (pi - ref))^2 = (1-k) e(xw) + k e_ref(xw) - k (1-k) scale KL(xw), mean over pairs
    e = -scale log pi is the mean squared error (scale = 2/D), KL that of the two Gaussians of a draw, 1/2 of the summed squared distance
    of their predictions. Gradients pass through k as well. This is the official code for SD1.5 (that for SDXL drops eps from the loss).
    Rewards: beta scale/2 (log pi - log ref). Ranges: the loss starts at the error of the chosen pictures, rewards at 0.
    When: winners that deserve to be imitated. Limits: at the code's beta of 0.001 k is near 0.0005, which is next to plain imitation of
    winners; losers act through k only.
    """

    beta: float = 0.001
    scale: float = 2 / 16384

    quantities: ClassVar = {"policy": ("logp", "divergence"), "reference": ("logp", "states")}
    pictures: ClassVar[bool] = True
    starts_level: ClassVar = False  # errors differ from picture to picture
    first_step: ClassVar = "gap"  # where policy = reference, losers have no gradient yet
    require: ClassVar = ("beta > 0", "scale > 0")
    formula: ClassVar = {
        "regression": "scale * (-w + beta*sigmoid(-beta*scale*h/2)*(w-rw)"
        " - beta*sigmoid(-beta*scale*h/2)*(1 - beta*sigmoid(-beta*scale*h/2))*sum(DW))"
    }
    golden: ClassVar = (  # D = 1, pi - eps = 0.4, ref - eps = 0.1: (0.4 - 0.254687 * 0.3)^2
        ({"w": -0.08, "rw": -0.005, "l": -0.02, "rl": -0.02, "DW": [0.045], "beta": 0.5, "scale": 2}, 0.104713),
        ({"w": -0.08, "rw": -0.08, "l": -0.02, "rl": -0.02, "DW": [0], "beta": 0.5, "scale": 2}, 0.16),
    )
    limits: ClassVar = (({"w": -3, "rw": -3, "nw": 1, "DW": [0]}, "3*scale"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        h = ratio[pairs.chosen] - ratio[pairs.rejected]
        k = self.beta * torch.sigmoid(-self.beta * self.scale / 2 * h)
        apart = batch.edge_sum(batch.scores["policy"]["divergence"])[pairs.chosen]
        values = -batch.logp()[pairs.chosen] + k * ratio[pairs.chosen] - k * (1 - k) * apart
        return Terms([Term("regression", values, "pair", self.scale)])

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * self.scale / 2 * batch.log_ratio().detach()


@dataclass
class ABC(Objective):
    """ABC, alignment by classification: winners fit the caption, losers a caption of less liked pictures (NeurIPS 2025, no arXiv number).

    y+ is the caption, y- the caption with a suffix that says the picture is less liked; s(x, y) = -scale log pi(x | y), the mean squared
    error (scale = 2/D)
    i(x', x, y) = s(x, y)^2 + (s(x', y) - sg[s(x, y)] - delta)^2, of a picture x that fits y and one x' that does not
    L = log(1 + exp(i(xl, xw, y+))) + log(1 + exp(i(xw, xl, y-))), mean over pairs; time and noise are shared by all four errors
    No reference and no beta: delta alone says how far a picture is pushed from a caption that it does not fit, and no further. With a soft
    label p it is the mean of both orders. Rewards: -s(x, y+), never positive. Ranges: about 2 ln 2 plus the sum of i/2 where errors are
    small. When: no memory for a reference. Limits: four passes with gradients per pair; the loss hardly moves, for errors are far below 1.
    """

    delta: float = 0.025
    scale: float = 2 / 16384

    quantities: ClassVar = {"policy": ("logp",)}
    columns: ClassVar = ("weight", "label")
    pictures: ClassVar[bool] = True
    extra: ClassVar = ("chosen_less_liked", "rejected_less_liked")
    extra_scorers: ClassVar = ("policy",)
    require: ClassVar = ("delta >= 0", "scale > 0")
    formula: ClassVar = {
        "classification": "p*log(1 + exp((scale*w)**2 + (scale*l - sg(scale*w) + delta)**2))"
        " + p*log(1 + exp((scale*XS[1][0])**2 + (scale*XS[0][0] - sg(scale*XS[1][0]) + delta)**2))"
        " + (1-p)*log(1 + exp((scale*l)**2 + (scale*w - sg(scale*l) + delta)**2))"
        " + (1-p)*log(1 + exp((scale*XS[0][0])**2 + (scale*XS[1][0] - sg(scale*XS[0][0]) + delta)**2))"
    }
    golden: ClassVar = (
        ({"w": -0.1, "l": -0.1, "XS": [(-0.1, 0, 1), (-0.1, 0, 1)], "delta": 0.025, "scale": 1}, 1.396948),
        ({"w": -0.1, "l": -0.125, "XS": [(-0.125, 0, 1), (-0.1, 0, 1)], "delta": 0.025, "scale": 1}, 1.396319),
    )
    limits: ClassVar = (({"w": -1, "l": -1, "XS": [(-1, 0, 1), (-1, 0, 1)], "p": 1}, "2*log(1 + exp(scale**2 + delta**2))"),)

    def __call__(self, batch: Batch) -> Terms:
        pairs, s = batch.pairs, -self.scale * batch.logp()
        liked, less = (s[pairs.chosen], s[pairs.rejected]), (s[pairs.extra[:, 0]], s[pairs.extra[:, 1]])

        def fits(fitting: Tensor, other: Tensor) -> Tensor:
            return -F.logsigmoid(-(fitting**2) - (other - fitting.detach() - self.delta) ** 2)

        values = pairs.label * (fits(*liked) + fits(*less[::-1])) + (1 - pairs.label) * (fits(*liked[::-1]) + fits(*less))
        return Terms([Term("classification", values, "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return self.scale * batch.logp().detach()


@dataclass
class CaptionDPO(Objective):
    """TDPO: DPO between a right and a wrong caption of one picture, with a bound on the push away from the wrong one (arXiv 2509.25771).

    r(c) = beta [log pi(x | c) - log ref(x | c)], of the same picture x at the same times and noises
    L = -log sigmoid(r(cw) - max(r(cl), -clip)), mean over pairs
    The paper clips the wrong caption's term; how is not known to us: here it stops counting once its reward has fallen to -clip, in units
    of the logit. A large clip is DPO on captions. With a soft label p the loss is the mean of both orders, each with its own wrong caption.
    Rewards: r. Ranges: the loss starts at ln 2, rewards at 0; `clipped` is the share of wrong captions beyond the bound.
    When: captioned pictures without preferences (transforms=wrong_captions). Limits: what no caption says, such as beauty, is not learned.
    """

    beta: float = 5000 / 16384
    clip: float = 5.0

    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2509.25771"
    require: ClassVar = ("beta > 0", "clip > 0")
    formula: ClassVar = {
        "preference": "-p*log(sigmoid(beta*(w-rw) - max(beta*(l-rl), -clip))) - (1-p)*log(sigmoid(beta*(l-rl) - max(beta*(w-rw), -clip)))"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "clip": 5}, 0.620957),
        ({"w": -10, "l": -19, "rw": -11, "rl": -9, "beta": 0.5, "clip": 1}, 0.201413),
    )
    limits: ClassVar = (({"w": -3, "rw": -3, "l": -7, "rl": -7}, "log(2)"), ({"clip": 1e9, "p": 1}, "log(1 + exp(-beta*h))"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, reward = batch.pairs, self.beta * batch.log_ratio()
        chosen, rejected = reward[pairs.chosen], reward[pairs.rejected]
        one = torch.ones_like(pairs.label)
        right, wrong = (logistic(a - b.clamp_min(-self.clip), one) for a, b in ((chosen, rejected), (rejected, chosen)))
        metrics = {"clipped": (rejected < -self.clip).to(rejected.dtype).detach()}
        return Terms([Term("preference", pairs.label * right + (1 - pairs.label) * wrong, "pair")], metrics)


@dataclass
class SUDO(Objective):
    """SUDO, self-supervised DPO: DPO against losers that are made of the winners, and imitation of these (arXiv 2504.14534).

    e(xw) = -scale log pi(xw), the mean squared error (scale = 2/D); h as in DPO
    L = -(1 - mix) log sigmoid(beta h) + mix e(xw), mean over pairs
    mix is 1/2. Losers are damaged winners (transform damaged_pictures), as the paper has it; its code takes another row's picture
    (transform other_pictures). mix = 0 is Diffusion-DPO. Rewards: beta (log pi - log ref). Ranges: the loss starts at (1 - mix) ln 2 plus
    mix times the error of the chosen pictures, rewards at 0. When: captioned pictures that deserve to be imitated, and no preferences.
    Limits: it learns what the damage is, not what people like; an undamaged loser teaches nothing.
    """

    beta: float = 5000 / 16384
    mix: float = 0.5
    scale: float = 2 / 16384

    starts_level: ClassVar = False  # errors differ from picture to picture
    paper: ClassVar = "2504.14534"
    require: ClassVar = ("beta > 0", "0 <= mix <= 1", "scale > 0")
    formula: ClassVar = {"preference": "(1-mix) * log(1 + exp(-beta*h))", "error": "-mix*scale*w"}
    golden: ClassVar = (
        ({"w": -0.1, "l": -0.2, "rw": -0.25, "rl": -0.2, "beta": 10, "scale": 2}, {"preference": 0.100707, "error": 0.1}),
        ({"w": -0.1, "l": -0.2, "rw": -0.1, "rl": -0.2, "beta": 10, "scale": 2}, {"preference": 0.346574, "error": 0.1}),
    )
    limits: ClassVar = (({"mix": 0}, "log(1 + exp(-beta*h))"), ({"mix": 1}, "-scale*w"))

    def __call__(self, batch: Batch) -> Terms:
        pairs, ratio = batch.pairs, batch.log_ratio()
        preference = -F.logsigmoid(self.beta * (ratio[pairs.chosen] - ratio[pairs.rejected]))
        error = -self.scale * batch.logp()[pairs.chosen]
        return Terms([Term("preference", preference, "pair", 1 - self.mix), Term("error", error, "pair", self.mix)])


@dataclass
class RewardWeightedRegression(Objective):
    """Flow-RWR, reward-weighted regression: pictures are imitated, each weighted by the exponential of its score (arXiv 2501.13918).

    v the data's score of a picture, e = -scale log pi its mean squared error (scale = 2/D), n pictures in the row
    L = 1/n sum_i exp(min(v_i / temperature, 20)) e_i, mean over prompts
    With `weights=softmax` they are the softmax of v / temperature over the row instead, as in comparisons with online methods. The paper's
    form is `exp` at temperature 1. A pair counts as a row with the scores 1 and 0.
    Without a reference. Rewards: -e, never positive. Ranges: the loss starts at the mean error times the mean weight. When: scored samples,
    flow and diffusion models alike. Limits: bad pictures are imitated less and never pushed away; exp of a score on another scale than
    about one nat lets one picture decide, so choose the temperature by the spread of the scores.
    """

    temperature: float = 1.0
    weights: Literal["exp", "softmax"] = "exp"
    scale: float = 2 / 16384

    view: ClassVar = "ranking"
    quantities: ClassVar = {"policy": ("logp",)}
    first_step: ClassVar = "gap"  # the worse picture is imitated too
    paper: ClassVar = "2501.13918"
    require: ClassVar = ("temperature > 0", "scale > 0", "weights in ('exp', 'softmax')")
    formula: ClassVar = {
        "regression": "-scale * (sum(exp(min(v/temperature, 20))*y for y, r, n, v in S)/len(S) if weights == 'exp'"
        " else sum(exp(v/temperature)*y for y, r, n, v in S) / sum(exp(v/temperature) for y, r, n, v in S))"
    }
    golden: ClassVar = (
        ({"S": [(-0.1, None, 1, 1), (-0.2, None, 1, 0)], "temperature": 1, "scale": 2}, 0.471828),
        ({"S": [(-0.1, None, 1, 1), (-0.2, None, 1, 0)], "temperature": 1, "scale": 2, "weights": "softmax"}, 0.253788),
    )
    limits: ClassVar = (({"S": [(-1, None, 1, 0), (-3, None, 1, 0)]}, "2*scale"),)

    def __call__(self, batch: Batch) -> Terms:
        ranking = batch.ranking
        logit = ranking.score.to(batch.logp().dtype) / self.temperature
        if self.weights == "exp":
            weight = logit.clamp(max=20).exp() / ranking.sizes[ranking.list]
        else:
            weight = (logit - logsumexp(logit, ranking.list, len(ranking.weight))[ranking.list]).exp()
        values = per_list(-weight * batch.logp()[ranking.edge], slice(None), ranking)
        return Terms([Term("regression", values, "prompt", self.scale)])

    def rewards(self, batch: Batch) -> Tensor:
        return self.scale * batch.logp().detach()
