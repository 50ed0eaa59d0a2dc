"""Synthetic divergences and teachers, for objectives that read them (see samples.py)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from prefopt.objectives.base import Batch, Objective

# Names of formulas -> (scorer, quantity), of the tokens of the chosen (W) and of the rejected (L) reply.
SIDES = {"D": ("policy", "divergence"), "T": ("teacher", "token_logp"), "V": ("teacher", "value")}
STATED = {"DW", "DL", "TW", "TL", "VW", "VL", "DIST"}


def compared(objective: Objective, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """[N] a divergence of the policy: 0 with slope 0 where it agrees with the other scorer, above 0 elsewhere, and not steep, so that
    log-probs decide where rewards are made of both."""
    other = tokens.get(objective.divergence_from[1])
    if other is None:
        return {}
    gap = tokens["policy"] - other.detach()
    return {"divergence": 0.1 * gap * gap.tanh()}


def taught(token_logp: Tensor) -> dict[str, Tensor]:
    """[N] what a teacher with these log-probs says beside them: soft values, and distances between 0 and 2."""
    return {"value": token_logp.exp(), "distance": 2 * token_logp.exp()}


def stated(layout: Batch, names: dict[str, Any]) -> dict[str, Tensor]:
    """The quantities that names of a batch of one pair state: `teacher` for its log-probs, else the quantity's own name."""
    counts, found = layout.lengths.tolist(), {}
    blank = [0.0] * sum(counts[2:])  # of extra sequences
    for letter, (_, quantity) in SIDES.items():
        if f"{letter}W" in names:
            sides = [names.get(f"{letter}{side}", [0.0] * count) for side, count in zip("WL", counts, strict=False)]
            assert [len(side) for side in sides] == counts[:2], f"{letter}W and {letter}L are of other lengths than the replies"
            found["teacher" if letter == "T" else quantity] = torch.tensor([*sides[0], *sides[1], *blank], dtype=torch.float64)
    if "DIST" in names:
        found["distance"] = torch.tensor([*names["DIST"], *([0.0] * counts[1]), *blank], dtype=torch.float64)
    return found


def random_stated(objective: Objective, rng: random.Random, nw: int, nl: int) -> dict[str, list[float]]:
    """Values for the names of what the objective reads."""
    found: dict[str, list[float]] = {}
    for letter, (scorer, quantity) in SIDES.items():
        if quantity in objective.quantities.get(scorer, ()):
            sign = -1 if letter == "T" else 1
            found |= {f"{letter}{side}": [sign * rng.uniform(0.05, 2) for _ in range(n)] for side, n in (("W", nw), ("L", nl))}
    if "distance" in objective.quantities.get("teacher", ()):
        found["DIST"] = [rng.uniform(0, 2) for _ in range(nw)]
    return found


# ---- for the oracle: plain lists ------------------------------------------------------------------------


def stated_of(batch: Batch, symbols: set[str]) -> list[dict[str, list[float]]]:
    """The names among `symbols` for each pair of a batch."""
    out: list[dict[str, list[float]]] = [{} for _ in batch.pairs.weight]
    wanted = {"DIST": ("teacher", "distance", "W")}
    wanted |= {f"{letter}{side}": (*of, side) for letter, of in SIDES.items() for side in "WL"}
    for name in symbols & wanted.keys():
        scorer, quantity, side = wanted[name]
        own: dict[int, list[float]] = {}
        for edge, value in zip(batch.token_edge.tolist(), batch.scores[scorer][quantity].tolist(), strict=True):
            own.setdefault(edge, []).append(value)
        edges = (batch.pairs.chosen if side == "W" else batch.pairs.rejected).tolist()
        for names, edge in zip(out, edges, strict=True):
            names[name] = own[edge]
    return out
