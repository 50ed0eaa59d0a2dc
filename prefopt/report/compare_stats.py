"""The statistics of a comparison. Grids are [S, P]: S seeds of one method, P held-out prompts, the same for every seed.

Two things are drawn by chance: the prompts and the seeds. Every interval and every p-value lets both vary. Prompts are resampled, one
set for all seeds and all methods, so that a hard prompt is hard for everybody and cancels in a difference. Seeds are too few to be
resampled: two or three numbers do not show their tails (simulated with seeds as the main source of chance, a test at a level of 5 % then
rejects 8 to 14 % of true hypotheses). Their part is drawn from Student's t with S - 1 degrees of freedom and the variance between seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 2000
RANDOM_SEED = 20_240_229  # fixed: the same runs give the same page
# A p-value cannot fall below 1 / resamples, and Holm multiplies the smallest by the number of pairs: 100 per pair allow 0.01.
RESAMPLES_PER_PAIR = 100
MOST_RESAMPLES = 50_000
CHUNK = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, where there is one; `seeds` that went into it."""

    mean: float
    low: float | None = None
    high: float | None = None
    seeds: int = 1


@dataclass
class Difference:
    """Method `a` compared with method `b` (indices). `value` is what is tested against `null`; `p` is two-sided, `adjusted` after Holm."""

    a: int
    b: int
    value: float
    low: float
    high: float
    p: float
    adjusted: float = 1.0
    null: float = 0.0

    @property
    def significant(self) -> bool:
        return self.adjusted < 0.05


@dataclass
class Pair:
    """What a test needs: one value per prompt, and the spread that seeds of either side add to its mean."""

    a: int
    b: int
    prompts: np.ndarray  # [P]
    spread_a: float
    spread_b: float
    null: float = 0.0


def prompt_weights(prompts: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[R, P] weights of a mean over prompts drawn with replacement."""
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts


def seed_variance(grid: np.ndarray) -> float:
    """Variance that seeds alone add to the mean of a grid.

    The variance of the seeds' means also holds the noise of single samples. That noise is in the prompts' part already (where it is
    averaged over seeds), so it is taken out here, by the residual of a two-way layout; 0 where nothing is left or there is one seed.
    """
    seeds, prompts = grid.shape
    if seeds < 2:
        return 0.0
    means = grid.mean(1)
    residual = grid - means[:, None] - grid.mean(0) + grid.mean()
    noise = (residual**2).sum() / ((seeds - 1) * max(prompts - 1, 1)) / (seeds * prompts)
    return max(0.0, float(means.var(ddof=1) / seeds - noise))


def seed_draws(seeds: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[R] deviations of a mean over seeds in units of its standard error."""
    return rng.standard_t(seeds - 1, resamples) if seeds > 1 else np.zeros(resamples)


@cache
def _weights_once(prompts: int) -> np.ndarray:
    """The resamples of an interval are the same for every quantity, so they are drawn once."""
    return prompt_weights(prompts, RESAMPLES, np.random.default_rng(RANDOM_SEED))


@cache
def _seed_draws_once(seeds: int) -> np.ndarray:
    return seed_draws(seeds, RESAMPLES, np.random.default_rng([RANDOM_SEED, seeds]))


def mean_interval(grid: np.ndarray, share: bool = False) -> Estimate:
    """Mean over seeds and prompts. `share`: the values are 0 or 1."""
    seeds, prompts = grid.shape
    mean = float(grid.mean())
    if share and np.all(grid == grid[0, 0]):  # a bootstrap of equal values has no width; the exact binomial bound has
        bound = 1 - 0.025 ** (1 / prompts)
        return Estimate(mean, *((mean - bound, 1.0) if mean > 0.5 else (0.0, bound)), seeds)
    deviations = _weights_once(prompts) @ (grid.mean(0) - mean) + _seed_draws_once(seeds) * np.sqrt(seed_variance(grid))
    low, high = np.quantile(mean + deviations, (0.025, 0.975))
    return Estimate(mean, *_inside(low, high, share), seeds)


def share_interval(shares: Sequence[float], units: int | None) -> Estimate:
    """Mean of shares of which only the mean over `units` is known for each seed.

    All seeds are judged on the same units, so the binomial error of one seed counts in full, however many seeds there are. Nothing
    is known about one seed whose number of units is unknown.
    """
    values = np.asarray(shares, dtype=float)
    mean, seeds = float(values.mean()), len(values)
    if seeds < 2 and not units:
        return Estimate(mean, seeds=seeds)
    deviations = _seed_draws_once(seeds) * (values.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else 0.0)
    if units:
        noise = np.random.default_rng(RANDOM_SEED + 1).standard_normal(RESAMPLES)
        deviations = deviations + noise * np.sqrt(mean * (1 - mean) / units)
    low, high = np.quantile(mean + deviations, (0.025, 0.975))
    return Estimate(mean, *_inside(low, high, True), seeds)


def _inside(low: float, high: float, share: bool) -> tuple[float, float]:
    return (max(0.0, float(low)), min(1.0, float(high))) if share else (float(low), float(high))


def reward_pair(a: int, b: int, grid_a: np.ndarray, grid_b: np.ndarray) -> Pair:
    """Difference of means, prompt by prompt."""
    return Pair(a, b, grid_a.mean(0) - grid_b.mean(0), np.sqrt(seed_variance(grid_a)), np.sqrt(seed_variance(grid_b)))


def win_pair(a: int, b: int, grid_a: np.ndarray, grid_b: np.ndarray, seeds_a: Sequence, seeds_b: Sequence) -> Pair:
    """Share of prompts on which a sample of `a` beats one of `b`, ties half, over all pairs of runs; rows of grids are runs."""
    wins = 0.5 * (1 + np.sign(grid_a[:, None, :] - grid_b[None, :, :]))  # [Ra, Rb, P]
    of_a, of_b = by_seed(wins.mean(1), seeds_a), by_seed(wins.mean(0), seeds_b)
    return Pair(a, b, of_a.mean(0), np.sqrt(seed_variance(of_a)), np.sqrt(seed_variance(of_b)), null=0.5)


def by_seed(rows: np.ndarray, seeds: Sequence) -> np.ndarray:
    """Runs that share a seed are averaged: they are one draw of the seed, not two."""
    names = list(dict.fromkeys(seeds))
    return np.stack([rows[[s == name for s in seeds]].mean(0) for name in names])


def compare_pairs(pairs: Sequence[Pair], seeds: Sequence[int]) -> list[Difference]:
    """Two-sided tests of every pair, corrected together. `seeds[i]` is the number of seeds of method i.

    p is the share of resamples that lie at least as far from the observed value as that lies from the null value. A few prompts resample
    to hardly anything but themselves: p is never below 2^(1 - P), how often P fair coins fall alike.
    """
    if not pairs:
        return []
    values = np.stack([p.prompts for p in pairs], axis=1)  # [P, K]
    observed = values.mean(0)
    distance = np.abs(observed - np.array([p.null for p in pairs]))
    a, b = [p.a for p in pairs], [p.b for p in pairs]
    spread_a, spread_b = np.array([p.spread_a for p in pairs]), np.array([p.spread_b for p in pairs])
    rng = np.random.default_rng(RANDOM_SEED)
    total = min(MOST_RESAMPLES, max(RESAMPLES, RESAMPLES_PER_PAIR * len(pairs)))
    beyond, ends, done = np.zeros(len(pairs)), None, 0
    while done < total:
        draws = np.stack([seed_draws(n, CHUNK, rng) for n in seeds], axis=1)  # one per method, whatever it is compared with
        deviations = prompt_weights(len(values), CHUNK, rng) @ (values - observed) + draws[:, a] * spread_a - draws[:, b] * spread_b
        beyond += (np.abs(deviations) >= distance - 1e-12).sum(0)
        ends = np.quantile(observed + deviations, (0.025, 0.975), axis=0) if ends is None else ends
        done += CHUNK
    p = np.maximum((1 + beyond) / (1 + done), 2.0 ** (1 - len(values)))
    found = [
        Difference(pair.a, pair.b, *map(float, (observed[k], ends[0, k], ends[1, k], p[k])), null=pair.null) for k, pair in enumerate(pairs)
    ]
    for difference, adjusted in zip(found, holm([d.p for d in found]), strict=True):
        difference.adjusted = adjusted
    return found


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: the smallest times m, the next times m - 1, ..., never falling."""
    adjusted, running = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted
