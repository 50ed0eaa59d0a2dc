"""Synthetic extra sequences of pairs, for objectives that name some."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefopt.data.batch import Row
from prefopt.data.extra import EXTRA
from prefopt.data.tokenise import Branch, Tokens
from prefopt.objectives.base import Batch, Objective


def with_extra_edges(objective: Objective, layout: Batch, rng: random.Random) -> Batch:
    """The layout with edges for the extra sequences of its pairs, after all others."""
    if not objective.extra:
        return layout
    pairs, count, made = layout.pairs, len(layout.lengths), []
    for sides in zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True):
        for how in map(EXTRA.__getitem__, objective.extra):
            made.append(int(layout.lengths[sides[how.aligned]]) if how.aligned is not None else rng.randint(1, 6))
    edges = (count + torch.arange(len(made))).view(len(pairs.chosen), len(objective.extra))
    lengths = torch.cat([layout.lengths, torch.tensor(made, dtype=torch.long)])
    tokens = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return replace(layout, lengths=lengths, token_edge=tokens, pairs=replace(pairs, extra=edges))


def silenced(objective: Objective, layout: Batch, scorer: str, token_logp: Tensor) -> Tensor:
    """[N] zeros for the tokens of extra sequences that this scorer is not asked about."""
    if not objective.extra or scorer in objective.extra_scorers:
        return token_logp
    return token_logp * ~layout.tokens_of(layout.pairs.extra.flatten())


def extreme_tokens(layout: Batch, old: int, tokens: list[float], values: tuple[float, ...], shift: int) -> list[float]:
    """`tokens` of the first `old` edges, and `values` in turn, beginning at `shift`, for the sums of the edges after them."""
    more = [(values[(e + shift) % len(values)], int(layout.lengths[e])) for e in range(old, len(layout.lengths))]
    return tokens + [value / n for value, n in more for _ in range(n)]


# ---- names of formulas: XS, (y, r, n) of each sequence; X, (t, s) of each of its tokens -----------------


def random_extra(objective: Objective, rng: random.Random, nw: int, nl: int) -> dict[str, Any]:
    """Values for the names, of sequences as long as a pair of `nw` and `nl` tokens asks for."""
    hows = [EXTRA[name] for name in objective.extra]
    if not hows:
        return {}
    if all(how.aligned is not None for how in hows):
        return {"X": [[(-rng.uniform(0.05, 3), -rng.uniform(0.05, 3)) for _ in range((nw, nl)[how.aligned])] for how in hows]}
    lengths = [rng.randint(1, 5) for _ in hows]
    return {"XS": [(-n * rng.uniform(0.05, 3), -n * rng.uniform(0.05, 3), n) for n in lengths]}


def extra_tokens(objective: Objective, names: dict[str, Any]) -> list[list[tuple[float, float]]]:
    """(t, s) of each token of each sequence that the names state; zeros where they state none."""
    if "X" in names:
        return names["X"]
    return [[(y / n, r / n)] * n for y, r, n in names.get("XS", [(0.0, 0.0, 1)] * len(objective.extra))]


def with_sums(names: dict[str, Any]) -> dict[str, Any]:
    """The names, and XS where only X is stated."""
    if "X" not in names:
        return names
    return {"XS": [(math.fsum(t for t, _ in own), math.fsum(s for _, s in own), len(own)) for own in names["X"]]} | names


def extra_of(batch: Batch) -> list[dict[str, Any]]:
    """XS and, where tokens were scored, X of each pair of a batch, from its lists."""
    scores, lengths = batch.scores, batch.lengths.tolist()
    sums = [scores[s]["logp"].tolist() if "logp" in scores.get(s, {}) else [0.0] * len(lengths) for s in ("policy", "reference")]
    tokens: list[list[tuple[float, float]]] = [[] for _ in lengths]
    if all("token_logp" in scores.get(s, {}) for s in ("policy", "reference")):
        policy, reference = (scores[s]["token_logp"].tolist() for s in ("policy", "reference"))
        for edge, t, s in zip(batch.token_edge.tolist(), policy, reference, strict=True):
            tokens[edge].append((t, s))
    return [{"XS": [(sums[0][e], sums[1][e], lengths[e]) for e in edges], "X": [tokens[e] for e in edges]}
            for edges in batch.pairs.extra.tolist()]


# ---- rows ------------------------------------------------------------------------------------------------


def row_with_extra(objective: Objective, row: Row, rng: random.Random, words: int = 100) -> Row:
    """The row with an objective's extra sequences for all of its pairs: under its own prompt, under that of the sequence before, or under a
    new one."""
    made: list[Tokens] = []
    for pair in row.pairs() if objective.extra else ():
        for how in map(EXTRA.__getitem__, objective.extra):
            prompts = [[rng.randrange(4, words) for _ in range(rng.randint(1, 9))], row.tokens.prompt, made[-1].prompt if made else []]
            own = row.tokens.branches[pair[how.aligned]] if how.aligned is not None else _reply(rng, words)
            made.append(Tokens(rng.choice([p for p in prompts if p]), [own]))
    return replace(row, extra=made) if objective.extra else row


def _reply(rng: random.Random, words: int) -> Branch:
    count = rng.randint(1, 6)
    return Branch([rng.randrange(4, words) for _ in range(count)], [rng.random() < 0.75 for _ in range(count - 1)] + [True], True)
