"""The way of a picture up to its noise, as a model sees it: deterministic sampling backwards (DDIM, arXiv 2010.02502; Euler of a flow).

    d = direction(network(x_(i-1), told t_i)),   x_i = the step from t_(i-1) to t_i along d,   x_0 the picture, t_1 < ... < t_K

The network is asked at the state before a step and told the time after it. ReNoise (arXiv 2403.14602) asks again at the state it arrives
at, and steps along the mean of all answers: a fixed point would be the exact inverse of a sampling step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.policies.process import Process


@dataclass
class Leg:
    """Step number `i` (from 1) of the pictures `rows` [B]: x_(i-1), what the network said of it, and x_i."""

    i: int
    rows: Tensor
    before: Tensor
    said: Tensor
    after: Tensor


def grid(process: Process, steps: int) -> Tensor:
    """[steps + 1] times from the picture itself up to noise alone: those of the sampler, backwards."""
    return process.schedule(steps).flip(0)


def floored(times: Tensor, grid: Tensor) -> Tensor:
    """[N] numbers of the last times of the grid that are not above `times`, at least 1: the picture itself has no noise to predict."""
    return (torch.searchsorted(grid, times.to(grid.dtype), right=True) - 1).clamp(1, len(grid) - 1)


@torch.no_grad()
def walk(process: Process, predict: Callable[[Tensor, Tensor, Tensor], Tensor], pictures: Tensor, reach: Tensor, steps: int,
         eta: float = 0.0, renoise: int = 0, noise: Callable[[int, Tensor], Tensor] | None = None) -> Iterator[Leg]:
    """The steps 1, 2, ... of the pictures [N, ...], each picture up to step `reach` [N] (on the CPU).

    `predict(x, t, rows)` is the network. `eta` times the deviation of the ancestral step, of fresh `noise(i, rows)`, is added after each.
    """
    at, x, device = grid(process, steps), pictures.clone(), pictures.device
    for i in range(1, int(reach.max()) + 1):
        rows = (reach >= i).nonzero().squeeze(1)
        now, to = (at[k].expand(len(rows)).to(device) for k in (i - 1, i))
        before = x[rows.to(device)]
        said = predict(before, to, rows)
        along = process.direction(said, before, to)
        after = process.climb(along, before, now, to)
        for again in range(renoise):
            along = along + (process.direction(predict(after, to, rows), after, to) - along) / (again + 2)
            after = process.climb(along, before, now, to)
        if eta and noise is not None:
            deviation = process.variance(to, now).sqrt().to(after.dtype).view(-1, *[1] * (after.dim() - 1))
            after = after + eta * deviation * noise(i, rows)
        x[rows.to(device)] = after
        yield Leg(i, rows, before, said, after)
