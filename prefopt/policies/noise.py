"""Which times and noises a picture is scored at: pure functions of numbers, so that nothing depends on batch, rank or resume.

Everything a policy looks up has an *address*, a positive 63-bit number made of a sha256: an encoded picture, a caption, a group (the
pictures of one row, which share what they are scored at). A *draw* is a number too. Its time and its noise follow from (seed, group, draw).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor

from prefopt.config.schema import NoiseConfig
from prefopt.data.batch import Row
from prefopt.data.tokenise import Branch

GOLDEN = (math.sqrt(5) - 1) / 2
HELD_OUT = 1 << 40  # draws from here on are those that held-out pictures are judged at: the same in every run
HEAD = 3  # ids of a branch before its draws: picture, caption, group


def address(*parts: object) -> int:
    """A positive 63-bit number that stands for `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def share(*parts: object) -> float:
    """A number in [0, 1) that stands for `parts`, as if drawn uniformly."""
    return (address(*parts) >> 10) / (1 << 53)


def normals(shape: tuple[int, ...], *parts: object) -> Tensor:
    """Standard normal numbers, fp32, that stand for `parts`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(address(*parts)))


class Draws:
    """The times, noises, dropped captions and dropped users of draws, as `cfg` wants them. `seed` is the run's."""

    def __init__(self, cfg: NoiseConfig, seed: int):
        self.cfg, self.seed = cfg, seed

    def _seed(self, number: int) -> int | str:
        """With a pool the draws are the same in all runs, so that these can share what the reference says of them."""
        return "held out" if number >= HELD_OUT else "pool" if self.cfg.pool else self.seed

    def quantile(self, group: int, number: int) -> float:
        """Where in the distribution of times a draw lies, in [0, 1). The draws of a group are a low-discrepancy sequence (multiples of the
        golden ratio from a random start), each of them uniform."""
        return math.fmod(share("time", self._seed(number), group) + (number % HELD_OUT) * GOLDEN, 1.0)

    def time(self, group: int, number: int) -> tuple[float, float]:
        """(share of the process in [0, 1), weight) of a draw. `importance` draws half of the times from the logit-normal distribution and
        half uniformly, with 1 / density as weight: the expectation is that of uniform times. Held-out draws are uniform."""
        cfg, u = self.cfg, self.quantile(group, number)
        weight = 1.0
        if number < HELD_OUT and cfg.timesteps != "uniform":
            if cfg.timesteps == "logit_normal" or share("mixture", self._seed(number), group, number) < 0.5:
                u = 1 / (1 + math.exp(-(cfg.logit_mean + cfg.logit_std * _inverse_normal(u))))
            if cfg.timesteps == "importance":
                weight = 1 / (0.5 + 0.5 * _logit_normal_density(u, cfg.logit_mean, cfg.logit_std))
        return cfg.low + (cfg.high - cfg.low) * u, weight

    def noise(self, shape: tuple[int, ...], group: int, number: int, picture: int) -> Tensor:
        own = (picture,) if self.cfg.plan == "independent" and number < HELD_OUT else ()
        return normals(shape, "noise", self._seed(number), group, number, *own)

    def dropped(self, group: int, number: int) -> bool:
        """Whether the caption is left out, for all pictures of the group alike; never on held-out draws."""
        return number < HELD_OUT and share("dropout", self._seed(number), group, number) < self.cfg.dropout

    def user_dropped(self, group: int, number: int) -> bool:
        """Whether the user is left out, likewise; apart from the caption."""
        return number < HELD_OUT and share("user", self._seed(number), group, number) < self.cfg.user_dropout

    def mirrored(self, group: int, number: int) -> bool:
        """Whether all pictures of the group are seen in a mirror (`data.flip`); never on held-out draws."""
        return number < HELD_OUT and share("mirror", self._seed(number), group, number) < 0.5

    def branch(self, picture: int, caption: int, group: int, numbers: list[int]) -> Branch:
        """A picture to be scored: what it is, its caption, its group, and the numbers of its draws, which are what is trained on."""
        return Branch([picture, caption, group, *numbers], [False] * HEAD + [True] * len(numbers), True)

    def numbers(self, held_out: bool) -> list[int]:
        """The draws of a row as it is kept: those of its first visit, its whole pool, or those it is judged at."""
        if held_out:
            return [HELD_OUT + i for i in range(self.cfg.held_out)]
        return list(range(self.cfg.pool or self.cfg.draws))

    def at(self, row: Row, visit: int) -> Row:
        """The row with the draws of its visit number `visit` (from 0), which are new at every visit, or taken in turn from the pool."""
        first, pool = visit * self.cfg.draws, self.cfg.pool
        numbers = [(first + i) % pool if pool else first + i for i in range(self.cfg.draws)]

        def narrowed(branch: Branch) -> Branch:
            return Branch([*branch.ids[:HEAD], *numbers], [False] * HEAD + [True] * len(numbers), True)

        stored = {scorer: [_taken(values, numbers) for values in replies] for scorer, replies in row.stored.items()}
        mismatched = None if row.mismatched is None else [narrowed(b) for b in row.mismatched]
        extra = [replace(made, branches=[narrowed(b) for b in made.branches]) for made in row.extra]
        tokens = replace(row.tokens, branches=[narrowed(b) for b in row.tokens.branches])
        return replace(row, tokens=tokens, mismatched=mismatched, extra=extra, stored=stored)


def _taken(values, numbers: list[int]) -> list[float]:
    """Of the stored scores of a pool those of a visit. Each draw's share of the pool's mean becomes that of the visit's."""
    return [float(values[number]) * len(values) / len(numbers) for number in numbers]


def _inverse_normal(u: float) -> float:
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * min(max(u, 1e-9), 1 - 1e-9) - 1, dtype=torch.float64)))


def _logit_normal_density(u: float, mean: float, std: float) -> float:
    u = min(max(u, 1e-9), 1 - 1e-9)
    z = (math.log(u / (1 - u)) - mean) / std
    return math.exp(-0.5 * z * z) / (math.sqrt(2 * math.pi) * std * u * (1 - u))
