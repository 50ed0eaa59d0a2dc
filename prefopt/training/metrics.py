"""What a step is summarised by. Everything is a mean over units gathered from all micro-batches and ranks, never a mean of means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prefopt.objectives.base import Batch, Objective, Terms, double

# Margins below this are rounding (of log-probs computed in another batch, or read from the store) and count as ties.
TIE = 1e-4


class Averages:
    """Sums and counts by name, kept on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Adds units to a mean."""
        self.sums[name] = self.sums.get(name, 0) + double(values.detach()).sum()
        self.counts[name] = self.counts.get(name, 0) + values.numel()

    def add_share(self, name: str, share: Tensor) -> None:
        """Adds a share of a quantity that is already normalised over the global batch."""
        self.sums[name] = self.sums.get(name, 0) + double(share.detach())
        self.counts.setdefault(name, 0)

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all ranks, in one exchange."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = torch.stack([double(torch.as_tensor(self.sums[n])) for n in names])
        counts = torch.tensor([float(self.counts[n]) for n in names], dtype=sums.dtype, device=sums.device)
        sums, counts = sum_over_ranks(torch.stack([sums, counts])).tolist()
        return {n: s / c if c else s for n, s, c in zip(names, sums, counts, strict=True)}


def batch_metrics(objective: Objective, batch: Batch, terms: Terms, shares: Mapping[str, Tensor], averages: Averages) -> None:
    """Adds a scored batch to the running averages of a step."""
    if len(shares) > 1:
        for name, share in shares.items():
            averages.add_share(f"loss/{name}", share)
    for name, value in terms.metrics.items():
        averages.add(name, value)
    if batch.pairs is not None:
        pair_metrics(objective, batch, averages)
    elif batch.ranking is not None:
        ranking_metrics(objective, batch, averages)
    elif batch.unary is not None:
        good, rewards, logp = batch.unary.desirable, objective.rewards(batch)[batch.unary.edge], batch.logp()[batch.unary.edge]
        for name, which in (("desirable", good), ("undesirable", ~good)):
            averages.add(f"reward/{name}", rewards[which])
            averages.add(f"logp/{name}", logp[which])
    elif batch.demonstrations is not None:
        averages.add("logp/demonstrations", batch.logp()[batch.demonstrations.edge])


def wins(margin: Tensor) -> Tensor:
    """1 where a margin is positive, 0 where it is negative. A tie is half a win."""
    return 0.5 * (1 + torch.sign(margin) * (margin.abs() > TIE))


def pair_metrics(objective: Objective, batch: Batch, averages: Averages) -> None:
    """Rewards, margin and accuracy of pairs, and log-probs where the policy has any (a reward model has none).

    With d = log pi(preferred) - log pi(other), token sums: `misranked` is the share of pairs with d < 0, and `undesirable` the share with
    d_ref < d < 0, which are still misranked although the policy is past what it started from (arXiv 2605.20834).
    """
    pairs, rewards, logp = batch.pairs, objective.rewards(batch), batch.scores["policy"].get("logp")
    chosen, rejected = rewards[pairs.chosen], rewards[pairs.rejected]
    margin = chosen - rejected
    towards = torch.where(pairs.label >= 0.5, margin, -margin)  # a soft label below one half prefers the other side
    averages.add("reward/chosen", chosen)
    averages.add("reward/rejected", rejected)
    averages.add("reward/margin", margin)
    averages.add("accuracy", wins(towards))
    if logp is not None:
        averages.add("logp/chosen", logp[pairs.chosen])
        averages.add("logp/rejected", logp[pairs.rejected])
        sign = torch.where(pairs.label >= 0.5, 1.0, -1.0)
        d = sign * (logp[pairs.chosen] - logp[pairs.rejected])
        averages.add("misranked", (d < 0).to(d.dtype))
        reference = batch.scores.get("reference", {}).get("logp")
        if reference is not None:
            past = d - sign * (reference[pairs.chosen] - reference[pairs.rejected]) > TIE
            averages.add("undesirable", (past & (d < 0)).to(d.dtype))


def ranking_metrics(objective: Objective, batch: Batch, averages: Averages) -> None:
    """The same of lists: `chosen` is the best completion of each and `rejected` the worst; accuracy is the share of every two completions
    of a list with different scores whose rewards are in the right order.
    """
    ranking = batch.ranking
    rewards, logp = objective.rewards(batch)[ranking.edge], batch.logp()[ranking.edge]
    better, worse = ranking.compared()
    averages.add("reward/chosen", rewards[ranking.best])
    averages.add("reward/rejected", rewards[ranking.worst])
    averages.add("reward/margin", rewards[ranking.best] - rewards[ranking.worst])
    averages.add("accuracy", wins(rewards[better] - rewards[worse]))
    averages.add("logp/chosen", logp[ranking.best])
    averages.add("logp/rejected", logp[ranking.worst])
