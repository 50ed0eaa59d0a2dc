"""A sampler that is stopped after a few steps, and its last state noised again (Self-NPO, arXiv 2505.11777), as pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prefopt.policies.process import Process

LATEST = 0.999  # of a flow's process; at 1 nothing of a picture is left


def truncated(process: Process, predict: Callable[[Tensor, Tensor, list[int]], Tensor], x: Tensor, times: Tensor, start: Tensor,
              steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(last states x_s [B, ...], the pictures foreseen there [B, ...], their times s [B]), of states `x` [B, ...] that enter a
    deterministic sampler of the schedule `times` [S + 1] at its step `start` [B] and take up to so many `steps` of it: fewer where it would
    go beyond its last prediction. `predict(x_t, t, rows)` predicts for `rows` of the batch."""
    place, end = start.clone(), torch.minimum(start + steps, torch.full_like(start, len(times) - 2))
    x, target = x.clone(), torch.empty_like(x)
    while len(rows := torch.nonzero(place <= end).flatten()):
        here, t = x[rows.to(x.device)], times[place[rows]].to(x.device)
        said = predict(here, t, rows.tolist())
        target[rows.to(x.device)] = process.x0_of(said, here, t)
        going = place[rows] < end[rows]
        if going.any():
            to = times[place[rows] + 1].to(x.device)
            x[rows[going].to(x.device)] = process.step(said, here, t, to)[going.to(x.device)]
        place[rows] += 1
    return x, target, times[end]


def renoised(process: Process, x_s: Tensor, s: Tensor, share: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x_r [B, ...], r [B]) at a time r after s, which `share` [B] in [0, 1) draws uniformly:

        x_r = alpha_r / alpha_s x_s + sqrt(sigma_r^2 - (alpha_r / alpha_s)^2 sigma_s^2) noise

    Where x_s lies on the way of a picture x0, x_r has mean alpha_r x0 and variance sigma_r^2.
    """
    if process.kind == "flow":
        s = s.clamp(max=LATEST)
        r = s + (LATEST - s) * share
    else:
        last = process.steps - 1
        r = (s + 1 + (share * (last - s)).long()).clamp(max=last)
    (alpha_s, sigma_s), (alpha_r, sigma_r) = process.scales(s), process.scales(r)
    kept = alpha_r / alpha_s
    spread = (sigma_r.square() - (kept * sigma_s).square()).clamp_min(0).sqrt()
    shape = (-1, *[1] * (x_s.dim() - 1))
    return kept.to(x_s).view(shape) * x_s + spread.to(x_s).view(shape) * noise, r
