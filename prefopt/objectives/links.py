"""Objectives on pairs that put another loss on DPO's log-ratios: robust, hinge, exact, contrastive, anchored, squared and others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.pairwise import logistic


def sides(batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-ratios log pi - log ref, nats, of the chosen and of the rejected replies, [P] each. Their difference is DPO's h."""
    ratio = batch.log_ratio()
    return ratio[batch.pairs.chosen], ratio[batch.pairs.rejected]


@dataclass
class RobustDPO(Objective):
    """Robust DPO (rDPO): DPO without bias where a known share of the labels is flipped (arXiv 2403.00409).

    L = [-(1-eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps), mean over pairs; h as in DPO
    eps is the probability that a label is wrong. Averaged over such flips the loss is exactly DPO's on the clean labels, whereas
    cDPO (`label_smoothing`) adds the second term instead of subtracting it and learns flatter margins. A soft label p of the data
    counts as the mean over its two hard labels. Other methods are called rDPO or R-DPO too (length penalty, rationales).
    Rewards: beta (log pi - log ref). Ranges: loss starts at ln 2 and may turn negative; for eps > 0 its slope in h never vanishes.
    When: eps is known, from annotator agreement say. Limits: an eps above the true share over-corrects, and the margin of a pair that
    has a single label grows without end.
    """

    beta: float = 0.1
    eps: float = 0.1

    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2403.00409"
    require: ClassVar = ("beta > 0", "0 <= eps < 0.5")
    formula: ClassVar = {"preference": "((p-eps) * log(1 + exp(-beta*h)) + (1-p-eps) * log(1 + exp(beta*h))) / (1 - 2*eps)"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "eps": 0.1}, 0.602207),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "eps": 0.1, "p": 0.9}, 0.620957),
    )
    limits: ClassVar = (
        ({"eps": 0, "p": 1}, "log(1 + exp(-beta*h))"),
        ({"eps": 0.3, "p": 0.7}, "log(1 + exp(-beta*h))"),  # the average over labels flipped with probability 0.3
    )

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        clean = (batch.pairs.label - self.eps) / (1 - 2 * self.eps)
        return Terms([Term("preference", logistic(self.beta * (chosen - rejected), clean), "pair")])


@dataclass
class Hinge(Objective):
    """Hinge on the log-ratios: pushes a pair apart until its margin is 1, then lets it be (arXiv 2309.06657).

    L = max(0, 1 - beta h), mean over pairs; h as in DPO
    RSO calls it hinge-norm: SLiC's hinge with the log-probs normalised by the reference. RSO's symbol for beta is gamma (its beta is
    the temperature of the rejection sampler that makes the pairs). Rewards: beta (log pi - log ref).
    Ranges: loss starts at 1 and reaches 0; margins beyond 1 are not rewarded. When: labels are clean, and a bounded margin is wanted.
    Limits: margins carry no probability; with soft labels each pair goes to 1 or -1, whichever is likelier.
    """

    beta: float = 0.05

    paper: ClassVar = "2309.06657"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": "max(0, 1 - beta*h)"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1}, 0.85),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 1.0}, 0.0),
    )
    limits: ClassVar = (({"w": -5, "rw": -5, "l": -3, "rl": -3}, "1"), ({"w": -1, "rw": -1, "l": -1e4, "rl": -1}, "0"))

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        return Terms([Term("preference", F.relu(1 - self.beta * (chosen - rejected)), "pair")])


@dataclass
class EXO(Objective):
    """Efficient Exact Optimization (EXO): DPO's cross-entropy turned round, a reverse KL to the smoothed label (arXiv 2402.00856).

    q = sigmoid(beta h), h as in DPO; P = p (1-eps) + (1-p) eps, p the soft label (1 by default: P = 1 - eps)
    L = q [log q - log P] + (1-q) [log(1-q) - log(1-P)], mean over pairs
    That is KL(q || P), where DPO with smoothing has KL(P || q) up to a constant: both are least at q = P, but EXO seeks a mode.
    The paper's beta_pi is beta. Its reward-model form for two replies is a soft label with eps near 0. The authors' code takes the
    pair (0, -10) for the logarithms of P and 1-P; eps = exp(-10) gives that to within 5e-5.
    Rewards: beta (log pi - log ref). Ranges: loss starts at -ln 2 - ln(eps (1-eps)) / 2 and falls to 0, where the margin is
    log((1-eps)/eps). When: the policy should keep to the best replies, as RLHF does, where DPO would cover all that are preferred.
    Limits: a pair that is far on the wrong side has almost no gradient.
    """

    beta: float = 0.5
    eps: float = 0.001

    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2402.00856"
    require: ClassVar = ("beta > 0", "0 < eps < 0.5")
    formula: ClassVar = {
        "preference": "sigmoid(beta*h) * (log(sigmoid(beta*h)) - log(p*(1-eps) + (1-p)*eps))"
        " + sigmoid(-beta*h) * (log(sigmoid(-beta*h)) - log(p*eps + (1-p)*(1-eps)))"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "eps": 0.001}, 2.505517),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9, "eps": 0.001}, 2.761231),
    )
    limits: ClassVar = (
        ({"p": 0.5, "w": -7, "l": -9, "rw": -7, "rl": -9}, "0"),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9, "p": 1}, "-log(2) - log(eps*(1-eps))/2"),
    )

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        logit, label = self.beta * (chosen - rejected), batch.pairs.label
        win = label * (1 - self.eps) + (1 - label) * self.eps
        lose = label * self.eps + (1 - label) * (1 - self.eps)  # not 1 - win, which would round to 0
        first = torch.sigmoid(logit) * (F.logsigmoid(logit) - win.log())
        return Terms([Term("preference", first + torch.sigmoid(-logit) * (F.logsigmoid(-logit) - lose.log()), "pair")])


@dataclass
class NCA(Objective):
    """Noise Contrastive Alignment (NCA): classifies each reply alone, so that the chosen one's likelihood rises (arXiv 2402.05369).

    R(y) = beta (log pi(y) - log ref(y)), token sums, nats
    L = -log sigmoid(R(yw)) - [log sigmoid(-R(yw)) + log sigmoid(-R(yl))] / 2, mean over pairs
    This is the paper's NCA for two replies of which one is preferred for certain. Rewards: R. Ranges: loss starts at 2 ln 2; the
    chosen reward tends to ln 2 and no further, the rejected one falls without end. When: DPO lowers the likelihood of chosen replies
    and that hurts, as in reasoning and code. Limits: replies are not compared with each other, only with the reference.
    """

    beta: float = 0.01

    paper: ClassVar = "2402.05369"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {
        "preference": "log(1 + exp(-beta*(w-rw))) + (log(1 + exp(beta*(w-rw))) + log(1 + exp(beta*(l-rl)))) / 2"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1}, 1.350825),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9}, 1.386294),
    )
    limits: ClassVar = (({"w": -5, "rw": -5}, "3*log(2)/2 + log(1 + exp(beta*(l-rl)))/2"),)

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = (self.beta * side for side in sides(batch))
        values = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
        return Terms([Term("preference", values, "pair")])


@dataclass
class APOZero(Objective):
    """Anchored Preference Optimization, zero: raises the chosen reply and lowers the rejected one (arXiv 2408.06266).

    L = 1 - sigmoid(beta (log pi(yw) - log ref(yw))) + sigmoid(beta (log pi(yl) - log ref(yl))), token sums, mean over pairs
    Each reply is anchored to the reference by itself; a term's slope is largest at the reference and dies out far from it.
    Accelerated preference optimisation goes by the same three letters and is another method.
    Rewards: beta (log pi - log ref). Ranges: loss starts at 1 and lies in (0, 2). When: the chosen replies are better than what the
    model would write; if they are worse, use apo_down. Limits: replies far from the reference have no gradient, however wrong.
    """

    beta: float = 0.1

    paper: ClassVar = "2408.06266"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": "1 - sigmoid(beta*(w-rw)) + sigmoid(beta*(l-rl))"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1}, 0.962523),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9}, 1.0),
    )
    limits: ClassVar = (({"w": -5, "rw": -5}, "0.5 + sigmoid(beta*(l-rl))"), ({"l": -5, "rl": -5}, "1.5 - sigmoid(beta*(w-rw))"))

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        return Terms([Term("preference", torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected), "pair")])


@dataclass
class APODown(Objective):
    """Anchored Preference Optimization, down: lowers both replies, the rejected one more (arXiv 2408.06266).

    L = sigmoid(beta (log pi(yw) - log ref(yw))) + 1 - sigmoid(beta h), mean over pairs; h as in DPO
    Accelerated preference optimisation goes by the same three letters and is another method.
    Rewards: beta (log pi - log ref). Ranges: loss starts at 1 and lies in (0, 2). When: even the chosen replies are worse than what
    the model would write, so that only their difference teaches. Limits: at the start the chosen reply has no gradient at all: the two
    terms cancel, and only the rejected reply moves.
    """

    beta: float = 0.1

    first_step: ClassVar = "gap"
    paper: ClassVar = "2408.06266"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": "sigmoid(beta*(w-rw)) + 1 - sigmoid(beta*h)"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1}, 0.987549),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9}, 1.0),
    )
    limits: ClassVar = (({"w": -5, "rw": -5}, "0.5 + sigmoid(beta*(l-rl))"), ({"l": -5, "rl": -5}, "1"))

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        values = torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))
        return Terms([Term("preference", values, "pair")])


@dataclass
class SPPOHard(Objective):
    """Self-Play Preference Optimization on pairs: each log-ratio is drawn to eta times its reply's surplus of wins (arXiv 2405.00675).

    r(y) = log pi(y) - log ref(y), token sums, nats; ref is the policy that the round started from
    L = [(r(yw) - eta (p - 1/2))^2 + (r(yl) + eta (p - 1/2))^2] / 2, mean over pairs
    Without soft labels p is 1 and the targets are eta/2 and -eta/2: the hard-label form. TRL has it without the division by 2, its
    beta is 1/eta. The paper's p is the mean of a judge's win probabilities over several samples of the policy.
    Rewards: r / eta. Ranges: loss starts at eta^2 / 4; rewards tend to 1/2 and -1/2. When: in rounds of self-play. Limits: on
    given pairs it is a loss and no more, without the paper's guarantee, and eta is far from what one step can reach.
    """

    eta: float = 1000.0

    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2405.00675"
    require: ClassVar = ("eta > 0",)
    formula: ClassVar = {"preference": "((w-rw - eta*(p-0.5))**2 + (l-rl + eta*(p-0.5))**2) / 2"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "eta": 10.0}, 18.125),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "eta": 10.0, "p": 0.75}, 3.125),
    )
    limits: ClassVar = (
        ({"p": 0.5}, "((w-rw)**2 + (l-rl)**2) / 2"),
        ({"w": -5, "rw": -5, "l": -5, "rl": -5, "p": 1}, "eta**2 / 4"),
    )

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        target = self.eta * (batch.pairs.label - 0.5)
        return Terms([Term("preference", ((chosen - target) ** 2 + (rejected + target) ** 2) / 2, "pair")])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.log_ratio().detach() / self.eta


@dataclass
class DiscoPOP(Objective):
    """DiscoPOP: a loss found by a language model, logistic for wrong pairs and exponential for right ones (arXiv 2406.08414).

    g = sigmoid(beta h / tau), h as in DPO
    L = (1 - g) log(1 + exp(-beta h)) + g exp(-beta h), mean over pairs
    The authors' code has beta = tau, so that g = sigmoid(h). The loss is not convex: below tau = (1 - ln 2)/3 = 0.102 its slope at
    the start has the wrong sign. At the defaults pairs with h between -2.37 and 1.44 nats are drawn to -2.37. In the paper the noise of
    training carries pairs over the hump; it reports failures for beta <= 0.01 and >= 2.5. tau above 1 is refused: there a wrong pair
    would weigh exponentially. Rewards: beta (log pi - log ref). Ranges: loss starts at (1 + ln 2)/2.
    When: many noisy pairs, as in the chat data that it was found on. Limits: on few, clean pairs and full batches it may stay in its
    local minimum; raise tau above 0.102, or use DPO.
    """

    beta: float = 0.05
    tau: float = 0.05

    first_step: ClassVar = "astray"
    paper: ClassVar = "2406.08414"
    require: ClassVar = ("beta > 0", "0 < tau <= 1")
    formula: ClassVar = {
        "preference": "(1 - sigmoid(beta*h/tau)) * log(1 + exp(-beta*h)) + sigmoid(beta*h/tau) * exp(-beta*h)"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "tau": 0.05}, 0.849338),
        ({"w": -7, "l": -9, "rw": -7, "rl": -9}, 0.846574),
    )
    limits: ClassVar = (({"w": -7, "l": -9, "rw": -7, "rl": -9}, "(1 + log(2)) / 2"),)

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        logit = self.beta * (chosen - rejected)
        # The gate goes into the exponent, which then has an upper bound: exp(-logit) alone has none.
        exponential = torch.exp(F.logsigmoid(logit / self.tau) - logit)
        return Terms([Term("preference", exponential - torch.sigmoid(-logit / self.tau) * F.logsigmoid(logit), "pair")])


def steady_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued beyond x = 30 along its tangent, so that neither it nor the norm of its gradient overflows in float32."""
    return torch.expm1(x.clamp(max=30)) + math.exp(30) * F.relu(x - 30)


@dataclass
class FDivergenceDPO(Objective):
    """f-DPO: DPO where another divergence than the reverse KL holds the policy to its reference (arXiv 2309.16240).

    s(y) = f'(u) - f'(1), u = pi(y)/ref(y), token sums
    s(y) = log u (reverse_kl), 1 - 1/u (forward_kl), log(2u/(1+u)) (js_divergence), (1 - u^-alpha)/alpha (alpha_divergence)
    L = -log sigmoid(beta (s(yw) - s(yl))), mean over pairs
    alpha -> 0 is the reverse KL, alpha = 1 the forward KL. `alpha` is the paper's; TRL's f_alpha_divergence_coef is 1 - alpha. The
    constants of f' cancel, s(1) = 0 here as in TRL. Powers of 1/u are continued along the tangent above e^30 (TRL clamps at e^80).
    Rewards: beta s. Ranges: loss starts at ln 2. Forward-KL rewards are below beta, Jensen-Shannon rewards below beta ln 2.
    When: more diversity than DPO leaves is wanted. Limits: u is that of whole replies, so the forward KL and large alpha care almost
    only for the replies whose likelihood fell most; clip gradients.
    """

    beta: float = 0.1
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "js_divergence"
    alpha: float = 0.5

    paper: ClassVar = "2309.16240"
    require: ClassVar = (
        "beta > 0", "divergence in ('reverse_kl', 'forward_kl', 'js_divergence', 'alpha_divergence')", "0 < alpha <= 1",
    )
    formula: ClassVar = {
        "preference": "log(1 + exp(-beta*h)) if divergence == 'reverse_kl'"
        " else log(1 + exp(beta * (log(sigmoid(l-rl)) - log(sigmoid(w-rw))))) if divergence == 'js_divergence'"
        " else log(1 + exp(beta * (exp(min(rw-w, 30)) * max(1, rw-w - 29) - exp(min(rl-l, 30)) * max(1, rl-l - 29))))"
        " if divergence == 'forward_kl' else log(1 + exp(beta/alpha * (exp(min(alpha*(rw-w), 30)) * max(1, alpha*(rw-w) - 29)"
        " - exp(min(alpha*(rl-l), 30)) * max(1, alpha*(rl-l) - 29))))"
    }
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "divergence": "reverse_kl"}, 0.620957),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "divergence": "forward_kl"}, 0.631154),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "divergence": "js_divergence"}, 0.660652),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "divergence": "alpha_divergence"}, 0.627691),
    )
    limits: ClassVar = (
        ({"divergence": "reverse_kl"}, "log(1 + exp(-beta*h))"),
        ({"divergence": "alpha_divergence", "alpha": 1, "l": -5, "rl": -5}, "log(1 + exp(beta*expm1(rw-w)))"),
        ({"divergence": "js_divergence", "l": -5, "rl": -5}, "log(1 + (1/2 + exp(rw-w)/2)**beta)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = (self._score(side) for side in sides(batch))
        return Terms([Term("preference", -F.logsigmoid(self.beta * (chosen - rejected)), "pair")])

    def _score(self, ratio: Tensor) -> Tensor:
        if self.divergence == "reverse_kl":
            return ratio
        if self.divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(ratio)
        alpha = self.alpha if self.divergence == "alpha_divergence" else 1.0
        return -steady_expm1(-alpha * ratio) / alpha

    def rewards(self, batch: Batch) -> Tensor:
        return self.beta * self._score(batch.log_ratio().detach())


@dataclass
class IREPO(Objective):
    """iREPO: regresses a pair's margin on the log-odds of its empirical preference, instead of classifying it (arXiv 2405.15230).

    q = the data's soft label (share of annotators who prefer the first reply), clipped to [eps, 1-eps]
    L = (beta h - log(q / (1-q)))^2, mean over pairs; h as in DPO, against the policy that the round started from
    Least where sigmoid(beta h) = q for every pair, which is where DPO on the same soft labels is least too. IPO is this loss with the
    constant target 1/2, divided by beta^2. The scale of the target is our reading of the paper: to put 1/beta on it instead
    divides the loss by beta^2 and has the same minimum. Labels without doubt are clipped: margins then tend to log((1-eps)/eps).
    Rewards: beta (log pi - log ref). Ranges: loss at the start is the mean squared log-odds. When: several annotators, or a judge's
    probabilities. Limits: as sensitive to a wrong extreme label as squares are.
    """

    beta: float = 0.1
    eps: float = 0.01

    columns: ClassVar = ("weight", "label")
    paper: ClassVar = "2405.15230"
    require: ClassVar = ("beta > 0", "0 < eps < 0.5")
    formula: ClassVar = {"preference": "(beta*h - log(min(max(p, eps), 1-eps) / (1 - min(max(p, eps), 1-eps))))**2"}
    golden: ClassVar = (
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "p": 0.8}, 1.528424),
        ({"w": -10, "l": -12, "rw": -11, "rl": -11.5, "beta": 0.1, "eps": 0.01}, 19.759090),
    )
    limits: ClassVar = (
        ({"p": 0.5}, "(beta*h)**2"),
        ({"p": 0.6224593312018546}, "beta**2 * (h - 1/(2*beta))**2"),  # sigmoid(1/2): IPO's loss with tau = beta, times beta^2
    )

    def __call__(self, batch: Batch) -> Terms:
        chosen, rejected = sides(batch)
        odds = torch.logit(batch.pairs.label.clamp(self.eps, 1 - self.eps))
        return Terms([Term("preference", (self.beta * (chosen - rejected) - odds) ** 2, "pair")])
