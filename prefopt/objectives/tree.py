"""Learning from trees of reasoning steps: TPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Term, Terms
from prefopt.objectives.listwise import per_list, swap_gain, win_rates


@dataclass
class TreePO(Objective):
    """TPO: all branches of a tree of reasoning steps are ranked, each step by its likeness to the best branch's (arXiv 2410.12854).

    c_ik = 1 + cos(mean hidden state of step k of branch i, that of the best branch), last layer of the policy, from 0 to 2
    s_i = beta sum_k c_ik sum_{t in step k} (log pi - log ref), nats; steps beyond those of the shortest branch belong to its last one
    L = sum over v_i > v_j of Delta_ij log(1 + exp(-(s_i - s_j))), mean over prompts; Delta, from win rates and ranks by s, as in LiPO
    No gradient passes through c; `hidden_gradient=true` lets it, as the released code does. That code is not followed otherwise: its loss
    falls as the ranking loss grows, it reads the logits of one position, and it has neither Delta nor a sum over the right pairs.
    `adaptive=false` sets c to 1, which is LiPO, and `lambdarank=false` sets Delta to 1: a list of two is then DPO. Steps: a completion that
    is a list of texts has these; else paragraphs, lines or sentences, whichever comes first in more than one piece; sampled replies (source
    rounds) are one step. Rewards: s, over its lists where a branch is in several the mean. Ranges: rewards start at 0.
    When: reasoning, with several scored branches per question. Limits: likeness in hidden states need not be likeness in meaning.
    """

    beta: float = 0.5
    adaptive: bool = True
    lambdarank: bool = True
    hidden_gradient: bool = False

    view: ClassVar = "ranking"
    quantities: ClassVar = {"policy": ("logp", "token_logp", "hidden"), "reference": ("logp", "token_logp")}
    steps: ClassVar = True
    paper: ClassVar = "2410.12854"
    require: ClassVar = ("beta > 0",)
    formula: ClassVar = {
        "preference": "sum(sum((abs(2**win_rate(i, S) - 2**win_rate(j, S)) * abs(1/log(1 + rank(i, V)) - 1/log(1 + rank(j, V)))"
        " if lambdarank else 1) * log(1 + exp(beta*(q[0] - x[0]))) for i, x in enumerate(V) for j, q in enumerate(V) if S[i][3] > S[j][3])"
        " for V in [[(sum((1 + cos(h, g) if adaptive else 1)*x for (h, x), (g, z) in zip(own, T[0])), 0) for own in T]])"
    }
    golden: ClassVar = (
        ({"S": [(-1, -2, 2, 1), (-3, -2, 2, 0)], "T": [[((1, 0), 0.5), ((0, 1), 0.5)], [((1, 0), 0.5), ((1, 0), -1.5)]], "beta": 1.0,
          "lambdarank": False}, 0.078890),
        ({"S": [(-10, -11, 3, 1), (-12, -11.5, 2, 0)], "T": [[((1, 0), 1.0)], [((0, 1), -0.5)]], "beta": 0.1, "adaptive": False,
          "lambdarank": False}, 0.620957),
    )  # fmt: skip
    limits: ClassVar = (
        ({"S": [(-1, -2, 2, 1), (-1, -2, 2, 0)], "T": [[((1, 2), 1.0)], [((1, 2), 1.0)]], "lambdarank": False}, "log(2)"),
    )

    def __call__(self, batch: Batch) -> Terms:
        ranking, ratio = batch.ranking, weighted_ratios(batch, self.adaptive, self.hidden_gradient)
        better, worse = ranking.compared()
        delta = swap_gain(ratio.detach(), win_rates(ranking, ratio.dtype), better, worse, ranking) if self.lambdarank else 1
        values = delta * F.softplus(self.beta * (ratio[worse] - ratio[better]))
        return Terms([Term("preference", per_list(values, better, ranking), "prompt")])

    def rewards(self, batch: Batch) -> Tensor:
        edge, found = batch.ranking.edge, weighted_ratios(batch, self.adaptive, False).detach()
        whole = batch.log_ratio().detach()
        times = torch.zeros_like(whole).index_add(0, edge, torch.ones_like(found))
        mean = torch.zeros_like(whole).index_add(0, edge, found) / times.clamp(min=1)
        return self.beta * torch.where(times > 0, mean, whole)


def weighted_ratios(batch: Batch, adaptive: bool, hidden_gradient: bool) -> Tensor:
    """[S] the log-ratio of each entry's tokens, by the weights of their steps (1 unless `adaptive`)."""
    ranking, hidden = batch.ranking, batch.scores["policy"]["hidden"]
    ratio = batch.scores["policy"]["token_logp"] - batch.scores["reference"]["token_logp"].detach()
    place, token, step = by_step(batch)
    c = torch.ones_like(ratio[token])
    if adaptive and len(place):
        hidden, count = hidden if hidden_gradient else hidden.detach(), int(step.max()) + 1
        total = hidden.new_zeros(len(ranking.edge) * count, hidden.shape[1]).index_add(0, place * count + step, hidden[token])
        total = total.view(-1, count, hidden.shape[1])  # as good as means: a cosine does not see lengths
        likeness = F.cosine_similarity(total, total[ranking.best[ranking.list]], dim=-1)
        c = 1 + likeness[place, step].to(ratio.dtype)
    return ratio.new_zeros(len(ranking.edge)).index_add(0, place, c * ratio[token])


def by_step(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """([T] place, [T] token, [T] step) of every token of every entry of a list; steps end with those of the shortest entry of the list."""
    ranking, lengths = batch.ranking, batch.lengths
    of = torch.zeros_like(batch.token_edge) if batch.step is None else batch.step
    last = torch.zeros_like(lengths).scatter_reduce(0, batch.token_edge, of, "amax")[ranking.edge]
    last = torch.full_like(ranking.sizes, len(of)).scatter_reduce(0, ranking.list, last, "amin")
    place = torch.arange(len(ranking.edge), device=of.device).repeat_interleave(lengths[ranking.edge])
    count = lengths[ranking.edge]
    within = torch.arange(len(place), device=of.device) - (count.cumsum(0) - count)[place]
    token = (lengths.cumsum(0) - lengths)[ranking.edge][place] + within
    return place, token, torch.minimum(of[token], last[ranking.list][place])
