"""Synthetic hidden states, masks, degrees and reasoning steps, for objectives that read them (see samples.py)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from prefopt.objectives.base import Batch


def derived(layout: Batch, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantities of the policy that no log-prob gives, made of the reference's scores of each token: whatever batch it stands in, a token
    has the same ones. Masks are above 0. All depend on the policy's scores, with a gradient of 0."""
    t = tokens.get("reference", tokens["policy"]).detach()
    nothing = 0 * tokens["policy"]
    total = layout.edge_sum(t)
    degrees = torch.arange(6, dtype=t.dtype).view(2, 3)
    return {
        "hidden": torch.stack([(7 * t).sin(), (3 * t).cos(), 1 / (1 + t**2)], -1),
        "mask_reward": 0.1 + (5 * t).sin() ** 2 + nothing, "mask_kl": 0.1 + (3 * t).cos() ** 2 + nothing,
        "degree_logits": ((1 + degrees) * total[:, None, None] + degrees).sin() + layout.edge_sum(nothing)[:, None, None],
    }  # fmt: skip


def random_steps(layout: Batch, rng: random.Random) -> Tensor:
    """[N] steps of random lengths, of every edge from 0 on."""
    out: list[int] = []
    for length in layout.lengths.tolist():
        step = 0
        for place in range(length):
            step += place > 0 and rng.random() < 0.4
            out.append(step)
    return torch.tensor(out, dtype=torch.long)


def pinned(batch: Batch, names: dict[str, Any]) -> dict[str, Tensor]:
    """The quantities that a golden number or a limit states for a batch of one pair: MW, ML (masks), ZW, ZL (logits of the degrees)."""
    found: dict[str, Tensor] = {}
    if "MW" in names:
        masks = torch.tensor([*names["MW"], *names["ML"]], dtype=torch.float64)
        found |= {"mask_reward": masks[:, 0], "mask_kl": masks[:, 1]}
    if "ZW" in names:
        logits = torch.zeros(len(batch.lengths), 2, 3, dtype=torch.float64)
        pairs = batch.pairs
        for side, (own, degrees) in enumerate(((pairs.chosen, names["ZW"]), (pairs.rejected, names["ZL"]))):
            versions = [int(own), *pairs.extra[0, 2 * side : 2 * side + 2].tolist()]
            logits[versions, side] = torch.tensor(degrees, dtype=torch.float64)
        found["degree_logits"] = logits
    return found


def steps_of(names: dict[str, Any]) -> list[tuple[int, int, float, tuple[float, ...]]]:
    """(entry, step, log-ratio, hidden state) of each step in T, which is one token."""
    return [(entry, step, x, h) for entry, own in enumerate(names["T"]) for step, (h, x) in enumerate(own)]


# ---- for the oracle: plain lists ------------------------------------------------------------------------


def masks_of(batch: Batch, edge: int) -> list[tuple[float, float]]:
    """(u, d) of each token of an edge."""
    policy = batch.scores["policy"]
    every = zip(batch.token_edge.tolist(), policy["mask_reward"].tolist(), policy["mask_kl"].tolist(), strict=True)
    return [(u, d) for e, u, d in every if e == edge]


def degrees_of(batch: Batch, pair: int, side: int) -> list[list[float]]:
    """Logits of the degrees of each version of one side of a pair, the whole reply first."""
    own = (batch.pairs.chosen, batch.pairs.rejected)[side][pair]
    versions = [int(own), *batch.pairs.extra[pair, 2 * side : 2 * side + 2].tolist()]
    return [batch.scores["policy"]["degree_logits"][e, side].tolist() for e in versions]


def tree_of(batch: Batch, edges: list[int]) -> list[list[tuple[list[float], float]]]:
    """T of a list: summed hidden state and log-ratio of each step of each entry, the last one with all that others lack."""
    policy, reference = batch.scores["policy"], batch.scores["reference"]
    step = [0] * len(batch.token_edge) if batch.step is None else batch.step.tolist()
    rows = list(zip(batch.token_edge.tolist(), step, policy["token_logp"].tolist(), reference["token_logp"].tolist(),
                    policy["hidden"].tolist(), strict=True))
    last = min(max(k for e, k, *_ in rows if e == edge) for edge in edges)
    made = []
    for edge in edges:
        own = [(min(k, last), t - s, h) for e, k, t, s, h in rows if e == edge]
        made.append([([sum(column) for column in zip(*(h for j, _, h in own if j == k), strict=True)], sum(x for j, x, _ in own if j == k))
                     for k in range(last + 1)])
    return made
