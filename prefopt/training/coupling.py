"""Joining scored micro-batches, over ranks too, for objectives that need the whole global batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from prefopt.objectives.base import Batch

EDGE_FIELDS = {"chosen", "rejected", "extra", "edge", "mismatched", "group"}  # fields of views that hold edge numbers


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all edges, in order; numbers of edges and of lists in the views are shifted."""
    offsets, lists = [0], [0]
    for batch in batches:
        offsets.append(offsets[-1] + len(batch.lengths))
        lists.append(lists[-1] + (len(batch.ranking.weight) if batch.ranking else 0))
    first = batches[0]

    parts = [b.views(lambda f, t, o=o, k=k: t + o if f in EDGE_FIELDS else t + k if f == "list" else t)
             for b, o, k in zip(batches, offsets, lists, strict=False)]
    views = {
        name: type(view)(**{f: torch.cat([getattr(p[name], f) for p in parts]) for f in vars(view)})
        for name, view in parts[0].items()
    }
    return Batch(
        torch.cat([b.lengths for b in batches]),
        torch.cat([b.token_edge + o for b, o in zip(batches, offsets, strict=False)]),
        {s: {q: torch.cat([b.scores[s][q] for b in batches]) for q in first.scores[s]} for s in first.scores},
        step=None if first.step is None else torch.cat([b.step for b in batches]),
        **views,
    )


def gather_batches(batch: Batch, world: int) -> list[Batch]:
    """Every rank's batch, in rank order. All of its scores travel: a few bytes per edge and token, and what is more than a number for each
    (`SHAPES` of objectives/base.py: hidden states) in full, which no objective with `coupling = "global"` reads.
    """
    if world == 1:
        return [batch]
    device = batch.lengths.device
    everyone: list[Batch | None] = [None] * world
    dist.all_gather_object(everyone, _to(batch, "cpu"))
    return [_to(b, device) for b in everyone]


def _to(batch: Batch, device) -> Batch:
    scores = {s: {q: t.detach().to(device) for q, t in qs.items()} for s, qs in batch.scores.items()}
    step = None if batch.step is None else batch.step.to(device)
    return Batch(batch.lengths.to(device), batch.token_edge.to(device), scores, step=step, **batch.views(lambda _, t: t.to(device)))
