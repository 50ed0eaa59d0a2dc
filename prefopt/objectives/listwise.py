"""Objectives on lists of ranked completions: PRO, LiPO, DPO under Plackett-Luce, RRHF, RankDPO.

Completions with equal scores are not compared. A pair is a list of two with the scores 1 and 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Rankings, Term, Terms

PLACKETT_LUCE = "sum(log(1 + sum(exp(beta*((x-q) - (y-r))) for x, q, k, u in S if u < v)) for y, r, n, v in S)"
PSI = ("(win_rate(i, S) if psi == 'win_rate' else v)", "(win_rate(j, S) if psi == 'win_rate' else u)")
EACH = "for i, (y, r, n, v) in enumerate(S)"


def per_list(values: Tensor, places: Tensor | slice, ranking: Rankings) -> Tensor:
    """[R] sum over each list of `values` [C], which belong to the entries at `places` [C]."""
    return values.new_zeros(len(ranking.weight)).index_add(0, ranking.list[places], values)


def logsumexp(values: Tensor, group: Tensor, count: int) -> Tensor:
    """[count] log of the sum of exp over the values [C] of each group [C]; no group may be empty."""
    top = values.new_full((count,), -math.inf).scatter_reduce(0, group, values.detach(), "amax")
    return top + values.new_zeros(count).index_add(0, group, (values - top[group]).exp()).log()


def choices(ahead: Tensor, better: Tensor, ranking: Rankings) -> Tensor:
    """[R] minus the log-likelihood of Plackett-Luce: each entry is chosen among itself and all that are worse.

    `ahead` [C]: logit of the worse entry less that of the better one, for each of the comparisons, whose better places are sorted.
    """
    entry, group = better.unique_consecutive(return_inverse=True)
    return per_list(-F.logsigmoid(-logsumexp(ahead, group, len(entry))), entry, ranking)


@dataclass
class PlackettLuceDPO(Objective):
    """DPO on whole rankings: the likelihood of the order under Plackett-Luce with DPO's implicit reward (arXiv 2305.18290).

    s_i = beta [log pi(y_i) - log ref(y_i)], sums over response tokens, nats
    L = -sum_k log( exp(s_k) / sum_{i>=k} exp(s_i) ), k from the best to the last but one, mean over prompts
    With equal scores only what is certain counts: y_k is chosen among itself and all with a lower score. A list of two is DPO.
    On orders drawn from Plackett-Luce with reward r the optimum is pi_ref exp(r / beta). A soft label p of a pair counts as two lists, in
    both orders, of weight p and 1-p. Rewards: s. Ranges: the loss of a list of n starts at ln n!, rewards at 0.
    When: rankings by annotators who ordered all replies, or samples scored by a reward model that is trusted throughout.
    Limits: a list must be in full order to be worth more than its pairs; near-ties at the end count as much as the choice of the best.
    """

    beta: float = 0.1

    view: ClassVar = "ranking"
    paper: ClassVar = "2305.18290"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {"preference": PLACKETT_LUCE}
    golden: ClassVar = (
        ({"S": [(-10, -11, 3, 1), (-12, -11.5, 2, 0)], "beta": 0.1}, 0.620957),
        ({"S": [(-5, -6, 2, 9), (-6, -6, 3, 4), (-7, -6, 1, -2)], "beta": 1.0}, 0.720868),
        ({"S": [(-5, -5, 1, 2), (-6, -6, 3, 1), (-7, -7, 2, 0)]}, 1.791759),
        ({"S": [(-5, -5, 1, 2), (-6, -6, 3, 1), (-7, -7, 2, 1)]}, 1.098612),
    )
    limits: ClassVar = (({"S": [(-10, -11, 3, 1), (-12, -11.5, 2, 0)]}, "log(1 + exp(-1.5*beta))"),)

    def __call__(self, batch: Batch) -> Terms:
        ranking = batch.ranking
        better, worse = ranking.compared()
        s = self.beta * batch.log_ratio()[ranking.edge]
        return Terms([Term("preference", choices(s[worse] - s[better], better, ranking), "prompt")])


@dataclass
class PRO(Objective):
    """Preference Ranking Optimization: each answer is contrasted with all that are worse, by log-prob per token (arXiv 2306.17492).

    s_i = log pi(y_i) / number of response tokens; v_1 >= ... >= v_n the scores; T_ki = v_k - v_i, T_kk = v_k - v_n
    L = -sum_k log( exp(T_kk s_k) / (exp(T_kk s_k) + sum_{i>k} exp(T_ki s_i)) ) - sft_weight (n-1)^2 log pi(y_1), mean over prompts
    T are the inverse temperatures of the paper and of its code; `reward_temperatures=false` sets them to 1, for lists without scores that
    mean anything. The second term is a token sum, the contrast uses token means, as in the code, which leaves out each answer's first
    token; here it counts. Answers with equal scores are not contrasted; in the code they add constants. Rewards: s, always negative.
    Ranges: with temperatures of 1 the first term of a list of n is ln n! where all answers are as likely per token.
    When: scored lists whose best answers deserve to be imitated, without a reference at hand.
    Limits: no reference ties the policy; the second term grows with the length of the answer and the square of the list's.
    """

    sft_weight: float = 0.05
    reward_temperatures: bool = True

    view: ClassVar = "ranking"
    quantities: ClassVar = {"policy": ("logp",)}
    paper: ClassVar = "2306.17492"
    require: ClassVar = ("sft_weight >= 0",)
    formula: ClassVar = {
        "ranking": "sum(log(1 + sum(exp((v-u)*x/k - (v-S[-1][3])*y/n if reward_temperatures else x/k - y/n)"
        " for x, q, k, u in S if u < v)) for y, r, n, v in S)",
        "nll": "-sft_weight * (len(S)-1)**2 * S[0][0]",
    }
    golden: ClassVar = (
        ({"S": [(-2, None, 2, 2), (-1.5, None, 1, 1), (-8, None, 4, 0)], "sft_weight": 0.0}, 1.497986),
        ({"S": [(-2, None, 2, 2), (-1.5, None, 1, 1), (-8, None, 4, 0)]}, {"ranking": 1.497986, "nll": 0.4}),
        ({"S": [(-2, None, 2, 2), (-1.5, None, 1, 1), (-8, None, 4, 0)], "sft_weight": 0.0, "reward_temperatures": False}, 1.154347),
    )
    limits: ClassVar = (
        ({"S": [(-4, None, 2, 3), (-9, None, 3, 2)], "sft_weight": 0}, "log(1 + exp(-1))"),
        ({"S": [(-4, None, 2, 3), (-9, None, 3, 3)]}, "4*sft_weight"),
    )

    def __call__(self, batch: Batch) -> Terms:
        ranking, s = batch.ranking, batch.avg_logp()[batch.ranking.edge]
        better, worse = ranking.compared()
        ahead = s[worse] - s[better]
        if self.reward_temperatures:
            score = ranking.score.to(s.dtype)
            most = score - score[ranking.worst][ranking.list]
            ahead = (score[better] - score[worse]) * s[worse] - most[better] * s[better]
        nll = -((ranking.sizes - 1) ** 2) * batch.logp()[ranking.edge[ranking.best]]
        return Terms([Term("ranking", choices(ahead, better, ranking), "prompt"), Term("nll", nll, "prompt", self.sft_weight)])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.avg_logp().detach()


def win_rates(ranking: Rankings, dtype: torch.dtype) -> Tensor:
    """[S] each entry's mean chance to beat the others of its list, if scores are rewards of Bradley-Terry."""
    first, second = ranking.couples()
    score = ranking.score.to(dtype)
    wins = torch.zeros_like(score).index_add(0, first, torch.sigmoid(score[first] - score[second]))
    return wins / (ranking.sizes - 1)[ranking.list]


def swap_gain(ratio: Tensor, psi: Tensor, better: Tensor, worse: Tensor, ranking: Rankings) -> Tensor:
    """[C] by how much DCG changes where two entries swap their ranks by log-ratio; gain 2^psi - 1, discount ln(1 + rank), ties in order.

    Ratios count in hundredths of a nat: at the start all are 0 but for rounding, which must not decide who is first.
    """
    s = (100 * ratio).round()
    first, second = ranking.couples()
    ahead = (s[second] > s[first]) | ((s[second] == s[first]) & (second < first))
    rank = 1 + torch.zeros_like(s).index_add(0, first, ahead.to(s.dtype))
    gain, discount = torch.exp2(psi), 1 / torch.log1p(rank)
    return ((gain[better] - gain[worse]) * (discount[better] - discount[worse])).abs()


@dataclass
class LiPO(Objective):
    """LiPO-lambda: learning to rank a list by DPO's implicit reward, each pair weighted by its effect on DCG (arXiv 2402.01878).

    s_i = beta [log pi(y_i) - log ref(y_i)], token sums, nats; psi_i = label of y_i, tau(i) = its rank by s; no gradient through Delta
    Delta_ij = |2^psi_i - 2^psi_j| |1/ln(1+tau(i)) - 1/ln(1+tau(j))|
    L = sum over psi_i > psi_j of Delta_ij log(1 + exp(-(s_i - s_j))), mean over prompts
    psi: `win_rate` is the paper's mean chance to beat the others, the data's scores being rewards; `score`: they are psi, in [0, 1].
    `loss` has the family the paper compares: dpo_bt (Delta = 1), slic_norm (Delta = 1, hinge at 1), list_mle (Plackett-Luce), softmax
    (cross-entropy of softmax(psi) and softmax(s)), pointwise_mse. A list of two is DPO with dpo_bt; Delta only scales it. No official
    code is public. Ranks count log-ratios in hundredths of a nat, ties in the order of the labels, as all are at the start, where
    the loss is ln 2 times the sum of Delta. Rewards: s. Ranges: rewards start at 0; pointwise_mse starts at the sum of psi^2.
    When: lists of four to eight replies with scores that mean something. Limits: mistakes among the last ranks hardly count, and a list
    that is nearly tied teaches next to nothing.
    """

    beta: float = 0.05
    loss: Literal["lambdarank", "list_mle", "softmax", "pointwise_mse", "dpo_bt", "slic_norm"] = "lambdarank"
    psi: Literal["win_rate", "score"] = "win_rate"

    view: ClassVar = "ranking"
    paper: ClassVar = "2402.01878"
    require: ClassVar = ("beta > 0", "psi in ('win_rate', 'score')",
                         "loss in ('lambdarank', 'list_mle', 'softmax', 'pointwise_mse', 'dpo_bt', 'slic_norm')")  # fmt: skip
    formula: ClassVar = {
        "preference": f"{PLACKETT_LUCE} if loss == 'list_mle' else sum(({PSI[0]} - beta*(y-r))**2 {EACH}) if loss == 'pointwise_mse'"
        f" else sum(exp({PSI[0]}) * log(sum(exp(beta*((x-q) - (y-r))) for x, q, k, u in S)) {EACH}) / sum(exp({PSI[0]}) {EACH})"
        f" if loss == 'softmax' else sum((abs(2**{PSI[0]} - 2**{PSI[1]}) * abs(1/log(1 + rank(i, S)) - 1/log(1 + rank(j, S)))"
        " if loss == 'lambdarank' else 1) * (max(0, 1 - beta*((y-r) - (x-q))) if loss == 'slic_norm'"
        f" else log(1 + exp(-beta*((y-r) - (x-q))))) {EACH} for j, (x, q, k, u) in enumerate(S) if v > u)"
    }
    golden: ClassVar = (
        ({"S": [(-8, -10, 1, 0.9), (-5, -10, 2, 0.5), (-11, -10, 3, 0.1)], "beta": 0.1, "psi": "score"}, 0.396791),
        ({"S": [(-8, -10, 1, 0.9), (-5, -10, 2, 0.5), (-11, -10, 3, 0.1)], "beta": 0.1, "psi": "score", "loss": "softmax"}, 1.097113),
        ({"S": [(-8, -10, 1, 0.9), (-5, -10, 2, 0.5), (-11, -10, 3, 0.1)], "beta": 0.1, "psi": "score", "loss": "pointwise_mse"}, 0.53),
        ({"S": [(-10, -11, 3, 1), (-12, -11.5, 2, 0)], "beta": 0.1, "loss": "dpo_bt"}, 0.620957),
        ({"S": [(-5, -5, 1, 2), (-6, -6, 3, 1), (-7, -7, 2, 0)], "loss": "list_mle"}, 1.791759),
    )
    limits: ClassVar = (({"S": [(-10, -11, 3, 1), (-12, -11.5, 2, 0)], "loss": "slic_norm"}, "max(0, 1 - 1.5*beta)"),)

    def __call__(self, batch: Batch) -> Terms:
        ranking, ratio = batch.ranking, batch.log_ratio()[batch.ranking.edge]
        s = self.beta * ratio
        psi = win_rates(ranking, s.dtype) if self.psi == "win_rate" else ranking.score.to(s.dtype)
        better, worse = ranking.compared()
        gap, every = s[better] - s[worse], slice(None)
        if self.loss == "list_mle":
            values = choices(-gap, better, ranking)
        elif self.loss == "pointwise_mse":
            values = per_list((psi - s) ** 2, every, ranking)
        elif self.loss == "softmax":
            shares, logs = (x - logsumexp(x, ranking.list, len(ranking.weight))[ranking.list] for x in (psi, s))
            values = per_list(-shares.exp() * logs, every, ranking)
        else:
            delta = swap_gain(ratio.detach(), psi, better, worse, ranking) if self.loss == "lambdarank" else 1
            values = per_list(delta * (F.relu(1 - gap) if self.loss == "slic_norm" else -F.logsigmoid(gap)), better, ranking)
        return Terms([Term("preference", values, "prompt")])


@dataclass
class RRHF(Objective):
    """RRHF: answers must be ranked as their scores by log-prob per token, and the best one is imitated (arXiv 2304.05302).

    s_i = log pi(y_i) / number of response tokens
    L = rrhf_weight sum over v_i > v_j of max(0, s_j - s_i) - log pi(y_1), v the scores, y_1 the best; mean over prompts
    The paper adds the two as they are. Its code weighs the first by `rrhf_weight=100` and takes the second as a mean over tokens, padding
    included: `nll_token_mean=true` is the mean over the reply's tokens. Rewards: s, always negative. Ranges: once every pair is in
    order the first term is 0 and only imitation is left. When: scores are reliable and no reference is at hand.
    Limits: the hinge has no margin, so it stops at equal likelihoods; nothing ties the policy to where it started.
    """

    rrhf_weight: float = 1.0
    nll_token_mean: bool = False

    view: ClassVar = "ranking"
    quantities: ClassVar = {"policy": ("logp",)}
    paper: ClassVar = "2304.05302"
    require: ClassVar = ("rrhf_weight >= 0",)
    formula: ClassVar = {
        "ranking": "rrhf_weight * sum(max(0, x/k - y/n) for y, r, n, v in S for x, q, k, u in S if v > u)",
        "nll": "-S[0][0] / (S[0][2] if nll_token_mean else 1)",
    }
    golden: ClassVar = (
        ({"S": [(-6, None, 3, 2), (-1, None, 2, 1), (-5, None, 5, 0)]}, {"ranking": 2.5, "nll": 6.0}),
        ({"S": [(-6, None, 3, 2), (-1, None, 2, 2), (-5, None, 5, 0)], "nll_token_mean": True}, {"ranking": 1.0, "nll": 2.0}),
    )
    limits: ClassVar = (({"S": [(-3, None, 3, 2), (-4, None, 2, 1), (-15, None, 5, 0)], "nll_token_mean": True}, "1"),)

    def __call__(self, batch: Batch) -> Terms:
        ranking, s = batch.ranking, batch.avg_logp()[batch.ranking.edge]
        better, worse = ranking.compared()
        hinge = per_list(F.relu(s[worse] - s[better]), better, ranking)
        nll = -(batch.avg_logp() if self.nll_token_mean else batch.logp())[ranking.edge[ranking.best]]
        return Terms([Term("ranking", hinge, "prompt", self.rrhf_weight), Term("nll", nll, "prompt")])

    def rewards(self, batch: Batch) -> Tensor:
        return batch.avg_logp().detach()


def win_shares(ranking: Rankings, dtype: torch.dtype) -> Tensor:
    """[S] the share of the others of its list that each entry beats by score."""
    first, second = ranking.couples()
    beaten = (ranking.score[first] > ranking.score[second]).to(dtype)
    return torch.zeros(len(ranking.list), dtype=dtype, device=beaten.device).index_add(0, first, beaten) / (ranking.sizes - 1)[ranking.list]


def place_discount(ranking: Rankings, dtype: torch.dtype) -> Tensor:
    """[S] 1 / ln(1 + place), places from 1 by score; entries with equal scores share the mean of theirs: their order says nothing."""
    place = torch.arange(len(ranking.list), device=ranking.list.device) - ranking.best[ranking.list]
    own = 1 / torch.log1p(1 + place.to(dtype))
    first, second = ranking.couples()
    first, second = (side[ranking.score[first] == ranking.score[second]] for side in (first, second))
    return (own + torch.zeros_like(own).index_add(0, first, own[second])) / (1 + torch.bincount(first, minlength=len(own)))


@dataclass
class RankDPO(Objective):
    """RankDPO: DPO on every two of a ranked list, each weighted by how much DCG their swap would cost (arXiv 2410.18013).

    s_i = beta [log pi(y_i) - log ref(y_i)], nats; phi_i in [0, 1] how good y_i is, tau(i) its rank, from 1; no gradient through Delta
    Delta_ij = |2^phi_i - 2^phi_j| |1/ln(1+tau(i)) - 1/ln(1+tau(j))|
    L = sum over phi_i > phi_j of Delta_ij log(1 + exp(-(s_i - s_j))), mean over prompts
    phi: `wins` is the share of the others that are beaten by score, the paper's label with one judge; with several of them give their mean
    share as the score, and gain=score. rank_by: `labels`, the paper's listing, in which equals share their ranks' discount; `model`, by s,
    as a caption there has it (and LiPO). Another base of the logarithm scales the loss only. Rewards: s. Ranges: the loss starts at ln 2
    times the sum of Delta, rewards at 0. When: several pictures per prompt, of several models, ranked by several judges.
    Limits: mistakes among the last ranks hardly count; scores enter by their order alone unless gain=score.
    """

    beta: float = 5000 / 16384
    gain: Literal["wins", "score"] = "wins"
    rank_by: Literal["labels", "model"] = "labels"

    view: ClassVar = "ranking"
    paper: ClassVar = "2410.18013"
    require: ClassVar = ("beta > 0", "gain in ('wins', 'score')", "rank_by in ('labels', 'model')")
    formula: ClassVar = {
        "preference": "sum(abs(2**(v if gain == 'score' else sum(1 for *_, o in S if o < v)/(len(S)-1))"
        " - 2**(u if gain == 'score' else sum(1 for *_, o in S if o < u)/(len(S)-1))) * (abs(1/log(1 + rank(i, S)) - 1/log(1 + rank(j, S)))"
        " if rank_by == 'model' else abs(mean(1/log(2 + k) for k, (*_, o) in enumerate(S) if o == v)"
        " - mean(1/log(2 + k) for k, (*_, o) in enumerate(S) if o == u))) * log(1 + exp(-beta*((y-r) - (x-q))))"
        f" {EACH} for j, (x, q, k, u) in enumerate(S) if v > u)"
    }
    golden: ClassVar = (
        ({"S": [(-10, -11, 1, 1), (-12, -11.5, 1, 0)], "beta": 0.1}, 0.330632),
        ({"S": [(-5, -5, 1, 9), (-6, -6, 1, 4), (-7, -7, 1, -2)]}, 0.770429),
        ({"S": [(-5, -5, 1, 1), (-6, -6, 1, 0.5), (-7, -7, 1, 0)], "gain": "score"}, 0.770429),
    )
    limits: ClassVar = (({"S": [(-10, -11, 1, 1), (-12, -11.5, 1, 0)]}, "(1/log(2) - 1/log(3)) * log(1 + exp(-1.5*beta))"),)

    def __call__(self, batch: Batch) -> Terms:
        ranking, ratio = batch.ranking, batch.log_ratio()[batch.ranking.edge]
        phi = win_shares(ranking, ratio.dtype) if self.gain == "wins" else ranking.score.to(ratio.dtype)
        better, worse = ranking.compared()
        if self.rank_by == "model":
            delta = swap_gain(ratio.detach(), phi, better, worse, ranking)
        else:
            gain, discount = torch.exp2(phi), place_discount(ranking, ratio.dtype)
            delta = ((gain[better] - gain[worse]) * (discount[better] - discount[worse])).abs()
        values = per_list(delta * -F.logsigmoid(self.beta * (ratio[better] - ratio[worse])), better, ranking)
        return Terms([Term("preference", values, "prompt")])
